"""AccLLM's weights: n:m masks, packed places, learned ranges, what is stored and what is multiplied."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import SHARED, needs_stories, random_ids, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from broadsheet.core.models import load
from broadsheet.core.models.outliers import inject_input_outliers
from broadsheet.core.models.walker import blocks, walk
from broadsheet.core.numerics.packed import PackedLinear
from broadsheet.core.texts import pieces
from broadsheet.methods.weights.accllm import AccLLM, SparseLinear, Sparsity, prune_nm, smooth
from broadsheet.methods.weights.accllm.clipping import Clip, plain_grid
from broadsheet.methods.weights.accllm.sparsity import mask_nm, patterns, sparsegpt, wanda_score
from broadsheet.methods.weights.base import Unreachable, linears, shapes, size
from broadsheet.methods.weights.quantiser import save
from broadsheet.methods.weights.rtn import RTN

QUICK = {"epochs": 2, "activation_bits": 0}
LAYOUTS = [
    Sparsity(2, 4, "patterns"),
    Sparsity(2, 4, "indices"),
    Sparsity(1, 4),
    Sparsity(4, 8),
    Sparsity(3, 4),
    Sparsity(1, 1),
]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers_of(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def at_most(weight: torch.Tensor, n: int, m: int) -> bool:
    return bool(((weight != 0).unflatten(-1, (-1, m)).sum(-1) <= n).all())


def layer(
    rows: int, columns: int, layout: Sparsity, bits: int, group: int = 128, **plain: int
) -> tuple[SparseLinear, nn.Linear]:
    linear = nn.Linear(columns, rows)
    linear.weight.data, linear.bias.data = gaussian(rows, columns), gaussian(rows, seed=1)
    mask = mask_nm(linear.weight.detach().abs(), layout.n, layout.m)
    kept = linear.weight.detach()[mask].view(rows, -1)
    grid = None if bits == 16 else plain_grid(kept, bits, group * layout.n // layout.m)
    return SparseLinear.of(linear, mask, layout, grid, **plain), linear


# --- pruning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4)])
def test_acceptance_1_the_mask_is_the_argsort_of_the_score(n, m):
    score = gaussian(7, 48).abs()
    mask = mask_nm(score, n, m)
    for row, first in itertools.product(range(7), range(0, 48, m)):
        best = sorted(range(m), key=lambda j: -float(score[row, first + j]))[:n]
        assert [j for j in range(m) if mask[row, first + j]] == sorted(best)
    assert mask_nm(torch.zeros(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]  # ties: the first


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_acceptance_1_at_most_two_of_four_stay(score):
    model = prune_nm(tiny("gqa"), random_ids(6, 24), score=score)
    for linear in linears(model).values():
        assert at_most(linear.weight, 2, 4)
        assert ((linear.weight != 0).sum() / linear.weight.numel()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_acceptance_1_places_pack_and_unpack(layout):
    mask = mask_nm(gaussian(37, 88).abs(), layout.n, layout.m)
    packed = layout.encode(mask)
    assert packed.shape == (37, layout.row_bytes(88))
    columns = layout.decode(packed, 88)
    assert torch.equal(torch.zeros_like(mask).scatter_(1, columns, True), mask)
    assert bool((columns.diff(dim=1) > 0).all())
    with pytest.raises(ValueError, match="does not keep"):
        layout.encode(torch.ones(2, 8, dtype=torch.bool))


def test_six_patterns_in_three_bits_and_two_places_in_four():
    assert patterns(2, 4) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert Sparsity().row_bytes(4096) == 4096 // 4 * 3 // 8
    assert Sparsity(places="indices").row_bytes(4096) == 4096 // 4 * 4 // 8


def test_sparsegpt_makes_losses_good():
    mixing = gaussian(64, 64, seed=1) + 0.5
    x = gaussian(500, 64, seed=2) @ mixing
    weight, gram = gaussian(24, 64), x.T @ x / 500

    def error(pruned):
        return float(((pruned - weight) @ x.T).square().sum())

    pruned, mask = sparsegpt(weight, gram, 2, 4)
    assert torch.equal(pruned != 0, mask)
    plain = error(weight * mask_nm(weight.abs(), 2, 4))
    wanda = error(weight * mask_nm(wanda_score(weight, x.square().sum(0).sqrt()), 2, 4))
    assert error(pruned) < 0.7 * min(plain, wanda)
    # What stays, given the mask, cannot be far from the best there is: least squares row by row.
    best = torch.zeros_like(weight)
    for row in range(24):
        some = mask[row]
        best[row, some] = torch.linalg.lstsq(x[:, some], (x @ weight[row]).unsqueeze(1)).solution.squeeze(1)
    assert error(best) <= error(pruned) < 2 * error(best)
    whole, everything = sparsegpt(weight, gram, 4, 4)
    assert bool(everything.all())
    assert torch.equal(whole, weight)
    dead = gram.clone()
    dead[5], dead[:, 5] = 0, 0
    assert bool((sparsegpt(weight, dead, 2, 4)[0][:, 5] == 0).all())


def test_sparsegpt_is_its_algorithm_written_out():
    """Each column in turn, with the whole inverse Hessian eliminated step by step instead of one Cholesky factor."""
    x = gaussian(200, 16, seed=3) @ (gaussian(16, 16, seed=4) + 0.4)
    weight, gram = gaussian(5, 16, seed=5).double(), (x.T @ x / 200).double()
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(16)
    left, mask = weight.clone(), torch.zeros(5, 16, dtype=torch.bool)
    for column in range(16):
        inverse = torch.linalg.inv(hessian[column:, column:])  # of the columns not done yet
        if column % 4 == 0:
            elimination = [torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(column, column + 4)]
            score = left[:, column : column + 4] ** 2 / torch.stack(elimination)
            mask[:, column : column + 4] = mask_nm(score, 2, 4)
        lost = torch.where(mask[:, column], 0.0, left[:, column])
        left[:, column:] -= (lost / inverse[0, 0]).unsqueeze(1) * inverse[0]
        left[:, column] *= mask[:, column]
    ours, found = sparsegpt(weight.float(), gram.float(), 2, 4, block=8)
    assert torch.equal(found, mask)
    assert torch.allclose(ours.double(), left, atol=1e-4)


def test_wanda_sees_the_inputs():
    model, ids = tiny("gqa"), random_ids(6, 24)
    inject_input_outliers(model, 50, channels=2)
    kept = []
    for score in ("magnitude", "wanda"):
        twin = prune_nm(copy.deepcopy(model), ids, score=score)
        kept.append(F.mse_loss(twin(ids).logits, model(ids).logits).item())
    assert kept[1] < 0.8 * kept[0]


def test_later_layers_see_pruned_earlier_ones():
    model, ids = tiny("gqa"), random_ids(6, 24)
    alone = copy.deepcopy(model)
    pruned = prune_nm(copy.deepcopy(model), ids)
    norms = {}
    for block in walk(alone, ids):  # the original inputs
        if block.index == 2:
            from broadsheet.core.models.observers import Gram

            name = next(iter(block.linears))
            norms[name] = Gram()
            block.observe(norms)
            weight, _ = sparsegpt(block.get(name).weight.detach(), norms[name].matrix, 2, 4)
            assert not torch.allclose(weight, pruned.get_submodule(name).weight, atol=1e-6)


# --- what is stored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("places", "bits"), [("indices", 2.25), ("patterns", 2.0)])
def test_acceptance_2_bits_of_the_tensors(places, bits):
    rows, columns = 256, 1024
    sparse, _ = layer(rows, columns, Sparsity(2, 4, places), 2)
    dense, _ = layer(rows, columns, Sparsity(1, 1), 2)
    held = (sparse.nbytes - sparse.bias.nbytes) * 8 / (rows * columns)
    assert held == bits
    assert (dense.nbytes - dense.bias.nbytes) * 8 / (rows * columns) == 2.25
    four, _ = layer(rows, columns, Sparsity(2, 4, places), 4)
    assert (four.nbytes - four.bias.nbytes) * 8 / (rows * columns) == bits + 1


@pytest.mark.parametrize(("places", "bits"), [("indices", 2.25), ("patterns", 2.0)])
def test_acceptance_2_bits_of_the_files(tmp_path, places, bits):
    from safetensors import safe_open

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    model = tiny("mha", **sizes)
    weights = sum(rows * columns for rows, columns in shapes(model))
    small = AccLLM(places=places, clip="none", score="magnitude", activation_bits=0).compress(model)
    assert size(small).bits == bits
    save(small, tmp_path / "small")
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        packed = {"values", "positions", "scale", "zero"}
        held = sum(file.get_tensor(name).nbytes for name in file.keys() if name.rsplit(".", 1)[-1] in packed)  # noqa: SIM118
    assert 8 * held / weights == bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_what_is_multiplied_is_what_is_stored(layout, bits):
    for rows, columns, group in ((70, 344, 64), (3, 40, 128)):
        sparse, linear = layer(rows, columns, layout, bits, group)
        x = gaussian(2, 5, columns, seed=2)
        with torch.no_grad():
            assert torch.allclose(sparse(x), F.linear(x, sparse.weight(), linear.bias), atol=1e-3)
        assert at_most(sparse.weight(), layout.n, layout.m)
        assert torch.equal(sparse.mask, mask_nm(linear.weight.detach().abs(), layout.n, layout.m))
        if bits == 16:
            assert torch.equal(sparse.weight(), linear.weight.half().float() * sparse.mask)


def test_gradients_reach_the_input_of_codes_and_of_pruned_weights():
    for bits in (2, 16):
        sparse, _ = layer(8, 16, Sparsity(), bits)
        x = gaussian(3, 16).requires_grad_()
        sparse(x).sum().backward()
        assert torch.allclose(x.grad, sparse.weight().sum(0).expand(3, -1), atol=1e-5)


def test_groups_take_only_weights_that_stay():
    linear = nn.Linear(128, 1, bias=False)
    linear.weight.data = torch.full((1, 128), 0.01)
    linear.weight.data[0, ::2] = torch.linspace(1.0, 2.0, 64)
    mask = mask_nm(linear.weight.detach().abs(), 2, 4)
    grid = plain_grid(linear.weight.detach()[mask].view(1, -1), 2, 64)
    assert grid.zero.item() == pytest.approx(1.0, abs=1e-3)
    assert grid.scale.item() == pytest.approx(1 / 3, abs=1e-3)


@pytest.mark.parametrize("layout", [Sparsity(), Sparsity(places="indices")])
def test_acceptance_5_pruned_zeros_stay_zero(layout, tmp_path):
    ids = random_ids(8, 24)
    pruned = prune_nm(tiny("gqa"), ids)
    zeros = {name: linear.weight == 0 for name, linear in linears(pruned).items()}
    method = AccLLM(score="given", places=layout.places, bits=2, group_size=32, epochs=2, smooth=0.0)
    small = method.compress(pruned, ids)
    save(small, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    for model in (small, loaded):
        for name, module in layers_of(model).items():
            weight = module.weight()
            assert bool((weight[zeros[name]] == 0).all())
            assert bool((weight[~zeros[name]] != 0).any())
    ours, theirs = small.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(small(ids).logits, loaded(ids).logits)
    assert loaded.config.quantization_config.parameters["score"] == "given"


# --- ranges ---------------------------------------------------------------------------------------------------


def test_a_range_that_is_not_learned_is_the_weights_own():
    values = gaussian(6, 70)
    grid = plain_grid(values, 3, 32)
    read = grid.decode(grid.encode(values), 70)
    for row, first in itertools.product(range(6), (0, 32, 64)):
        some = values[row, first : first + 32]
        step = (some.max() - some.min()) / 7
        assert (read[row, first : first + 32] - some).abs().max() < 0.51 * step + 2e-3


def test_training_sees_what_will_be_read_back():
    clip = Clip(gaussian(6, 70), 2, 32)
    with torch.no_grad():
        clip.gamma.fill_(0.3)
        clip.beta.fill_(-0.2)
    grid = clip.grid()
    read = grid.decode(grid.encode(clip.values), 70)
    same = (read - clip.rounded().detach()).abs() < 5e-3  # scale and least value are rounded to 16 bits
    assert same.float().mean() > 0.99
    clip.rounded().square().sum().backward()
    assert bool((clip.gamma.grad != 0).all())
    assert bool((clip.beta.grad != 0).all())


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "neox", "opt"])
def test_every_model_is_compressed_saved_and_loaded(kind, tmp_path):
    model, ids = tiny(kind), random_ids(8, 16)
    exact = model(ids).logits
    small = AccLLM(bits=8, n=3, epochs=1).compress(model, ids)
    assert set(layers_of(small)) == {name for name, m in small.named_modules() if isinstance(m, PackedLinear)}
    assert not linears(small)
    save(small, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(small(ids).logits, loaded(ids).logits)
        assert F.cosine_similarity(loaded(ids).logits, exact, dim=-1).mean() > 0.9


def test_a_sixteen_bit_model_learns_as_the_same_one_in_32():
    ids = random_ids(8, 16)
    method = AccLLM(epochs=2, weight_learning_rate=1e-4, group_size=32, bits=8)
    narrow = method.compress(tiny("gqa").to(torch.bfloat16), ids)
    wide = method.compress(tiny("gqa").to(torch.bfloat16).float(), ids)
    agree = [(module.mask == layers_of(wide)[name].mask).float().mean() for name, module in layers_of(narrow).items()]
    assert min(agree[:7]) > 0.97  # the first block's: what it gets is the same
    with torch.no_grad():
        assert F.cosine_similarity(narrow(ids).logits.float(), wide(ids).logits, dim=-1).mean() > 0.95


def test_learned_ranges_come_closer_to_the_exact_block():
    model, ids = tiny("gqa"), random_ids(16, 24)
    errors = {}
    for name, settings in {
        "nearest": {"clip": "none"},
        "learned": {"learning_rate": 0.1, "epochs": 8},
        "recovered": {"learning_rate": 0.1, "epochs": 8, "weight_learning_rate": 5e-3},
    }.items():
        small = AccLLM(**{"activation_bits": 0, "group_size": 32, **settings}).compress(copy.deepcopy(model), ids)
        errors[name] = F.mse_loss(small(ids).logits, model(ids).logits).item()
    assert errors["learned"] < 0.95 * errors["nearest"]
    assert errors["recovered"] < 0.9 * errors["learned"]


@needs_stories
def test_acceptance_6_learned_ranges_halve_the_perplexity_of_rounding_to_nearest():
    model, tokenizer = load(str(SHARED / "models" / "stories260K"))
    texts = pieces(str(SHARED / "data" / "tinystories_wikitext_1000" / "tinystories_1000.json"), tokenizer, 128)
    ids, held_out = texts[:32], texts[100:116]

    def perplexity(method):
        small = method.compress(copy.deepcopy(model), ids if method.calibrated else None)
        with torch.no_grad():
            return float(small(held_out, labels=held_out).loss.exp())

    ours = perplexity(AccLLM(epochs=8, learning_rate=0.1, activation_bits=0))
    assert perplexity(AccLLM(clip="none", activation_bits=0)) >= 2 * ours
    assert perplexity(RTN(bits=2, group_size=64)) >= 2 * ours


# --- activations, order, stages -------------------------------------------------------------------------------


def test_inputs_are_rounded_to_eight_bits_by_token():
    sparse, linear = layer(6, 32, Sparsity(), 2, 128, activation_bits=8)
    x = gaussian(4, 32) * torch.tensor([1e-3, 1.0, 50.0, 1e4]).unsqueeze(1)
    scale = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    with torch.no_grad():
        wanted = F.linear(rounded, sparse.weight(), linear.bias)
        assert torch.allclose(sparse(x), wanted, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(sparse(x), F.linear(x, sparse.weight(), linear.bias), rtol=1e-4, atol=1e-3)
        assert sparse(torch.zeros(1, 32)).equal(linear.bias.unsqueeze(0))


def test_smoothing_leaves_the_function_and_moves_the_outliers():
    model, ids = tiny("gqa"), random_ids(8, 24)
    inject_input_outliers(model, 60, channels=2)
    before = model(ids).logits
    for block in walk(model, ids):
        smooth(block, 0.5)
    assert torch.allclose(model(ids).logits, before, atol=1e-3)
    errors = {}
    model = inject_input_outliers(tiny("gqa"), 60, channels=2)
    for alpha in (0.0, 0.5):
        small = AccLLM(score="none", bits=16, smooth=alpha).compress(copy.deepcopy(model), ids)
        errors[alpha] = F.mse_loss(small(ids).logits, before).item()
    assert errors[0.5] < 0.3 * errors[0.0]


def test_scores_are_those_of_smoothed_weights():
    model, ids = inject_input_outliers(tiny("gqa"), 40, channels=3), random_ids(8, 24)
    smoothed = copy.deepcopy(model)
    block = next(iter(walk(smoothed, ids)))
    with torch.no_grad():
        smooth(block, 0.5)
        AccLLM(score="magnitude", bits=16).prune(block)
    wanted = {name: linear.weight != 0 for name, linear in block.linears.items()}
    small = AccLLM(score="magnitude", bits=16, smooth=0.5).compress(copy.deepcopy(model), ids)
    for name, mask in wanted.items():
        assert torch.equal(small.get_submodule(name).mask, mask)


def test_quantise_first_prunes_rounded_weights():
    model = tiny("gqa")
    weights = {name: linear.weight.detach().clone() for name, linear in linears(model).items()}
    settings = {"score": "magnitude", "clip": "none", "bits": 3, "group_size": 32, "activation_bits": 0}
    small = AccLLM(order="quantise first", **settings).compress(model)
    for name, module in layers_of(small).items():
        grid = plain_grid(weights[name], 3, 32)
        rounded = grid.decode(grid.encode(weights[name]), weights[name].shape[1])
        mask = mask_nm(rounded.abs(), 2, 4)
        assert torch.equal(module.mask, mask)
        assert torch.allclose(module.weight(), rounded * mask, atol=1e-3)


def test_budgets_count_everything_that_is_stored():
    model = tiny("gqa")
    layers = shapes(model)
    for bits in (2.25, 3.25, 4.25, 8.25, 9.0):
        method = AccLLM(score="magnitude", clip="none", activation_bits=0).at_budget(bits, layers)
        held = size(method.compress(copy.deepcopy(model))).bits
        assert held == method.stored_bits(layers)
        assert method.stored_bits(layers) <= bits
    llama = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert AccLLM().stored_bits(llama) == 2.0
    assert AccLLM(places="indices").stored_bits(llama) == 2.25
    assert AccLLM(score="none").stored_bits(llama) == 2.25
    assert AccLLM(bits=4).stored_bits(llama) == AccLLM(places="indices", bits=4).stored_bits(llama) - 0.25 == 3.0
    with pytest.raises(Unreachable, match=r"1\.28 bits"):
        AccLLM().at_budget(1.0, llama)


def test_bad_input_is_named():
    for wrong, words in (
        ({"score": "obs"}, "score must be one of sparsegpt"),
        ({"places": "bitmap"}, "places must be one of patterns, indices"),
        ({"clip": "on"}, "clip must be one of"),
        ({"order": "both"}, "order must be one of"),
        ({"n": 5}, "n:m with 1 <= n <= m <= 8, got 5:4"),
        ({"n": 0}, "got 0:4"),
        ({"bits": 0}, "bits must be 1 to 8, or 16"),
        ({"bits": 12}, "bits must be 1 to 8, or 16"),
        ({"group_size": 6}, "group_size must be a multiple of 4"),
        ({"epochs": 0}, "epochs, learning_rate and damping"),
        ({"activation_bits": 4}, "activation_bits must be 8, or 0"),
        ({"smooth": 2.0}, "smooth must be between 0 and 1"),
        ({"order": "quantise first", "score": "sparsegpt"}, "prune first"),
    ):
        with pytest.raises(ValueError, match=words):
            AccLLM(**wrong)
    with pytest.raises(ValueError, match="needs calibration"):
        AccLLM().compress(tiny("gqa"))
    with pytest.raises(ValueError, match="needs calibration"):
        prune_nm(tiny("gqa"))
    with pytest.raises(ValueError, match="98 input features are no multiple of 4"):
        AccLLM(score="magnitude", clip="none", activation_bits=0).compress(tiny("gqa", intermediate_size=98))
    with pytest.raises(ValueError, match="98 input features are no multiple of 4"):
        prune_nm(tiny("gqa", intermediate_size=98), score="magnitude")
    with pytest.raises(ValueError, match=r"q_proj is not 2:4 sparse; prune it first"):
        AccLLM(score="given", clip="none", activation_bits=0).compress(tiny("gqa"))
    compressed = AccLLM(score="magnitude", clip="none", activation_bits=0).compress(tiny("gqa"))
    with pytest.raises(ValueError, match="compressed already"):
        AccLLM().compress(compressed, random_ids(2, 4))
    assert len(list(blocks(compressed))) == 3


# --- the code of the works that the paper builds on -----------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "golden" / "accllm_official.safetensors")


def test_pruned_weights_are_those_of_the_official_sparsegpt(golden):
    x, weight = golden["sparsegpt.x"].float().flatten(0, 1), golden["sparsegpt.w"].float()
    ours, mask = sparsegpt(weight, x.T @ x / len(x), 2, 4)
    theirs = golden["sparsegpt.2of4"]
    assert torch.equal(ours != 0, theirs != 0)
    assert torch.allclose(ours, theirs, atol=3e-4)
    assert bool((ours[:, 7] == 0).all())
    assert torch.equal(mask.unflatten(1, (-1, 4)).sum(-1), torch.full((24, 40), 2))


def test_ranges_are_those_of_the_official_omniquant(golden):
    clip = Clip(golden["sparsegpt.w"].float(), 2, 80)
    with torch.no_grad():
        clip.gamma.copy_(golden["clip.gamma"])
        clip.beta.copy_(golden["clip.beta"])
    scale, low = clip.range()
    assert torch.allclose(scale, golden["clip.scale"], rtol=1e-6)
    assert ((-low / scale).round() - golden["clip.zero"]).abs().max() == 0  # which the official code stores in its place
