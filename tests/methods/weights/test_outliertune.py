"""OutlierTune and SmoothQuant: folds, integers, errors against each other, the authors' numbers, saved models."""

import copy
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import random_ids, tiny
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig

from broadsheet.core.models import folds, load
from broadsheet.core.models.observers import Range
from broadsheet.core.models.outliers import inject_input_outliers
from broadsheet.core.models.walker import Block, Pass, decoder_blocks, walk
from broadsheet.core.numerics import integer
from broadsheet.methods.weights.base import Unreachable, shapes, size
from broadsheet.methods.weights.bench import Workload, calibration
from broadsheet.methods.weights.integer import FoldedNorm, IntegerLinear, Rows, clip_rates, quantise_rows, widen
from broadsheet.methods.weights.outliertune import OutlierTune, Peaks
from broadsheet.methods.weights.quantiser import save
from broadsheet.methods.weights.smoothquant import SmoothQuant, smoothing

GOLDEN = Path(__file__).parents[2] / "golden" / "outliertune_official.safetensors"
KINDS = ("gqa", "qwen2", "qwen3", "neox", "opt", "bloom")
BIASED = ("neox", "opt", "bloom")


def made(kind: str) -> nn.Module:
    if kind != "bloom":
        return tiny(kind)
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "n_layer": 3, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1}
    return AutoModelForCausalLM.from_config(BloomConfig(**sizes, eos_token_id=2)).eval()


def uneven(kind: str, factor: float = 3.0, offset: float = 40.0) -> nn.Module:
    """A random model with 6 outlier channels before every norm-fed layer, shifted where the norm has a bias."""
    return inject_input_outliers(made(kind), factor, 6, offset=offset if kind in BIASED else 0.0)


@torch.no_grad()
def relative(model: nn.Module, reference: nn.Module, ids: torch.Tensor) -> float:
    """Error of the logits over their size."""
    true = reference(ids).logits
    return float((model(ids).logits.to(true.dtype) - true).norm() / true.norm())


def quantised(method, model: nn.Module, ids: torch.Tensor) -> nn.Module:
    return method.compress(copy.deepcopy(model), ids)


# --- one layer: the specification's synthetic inputs ---------------------------------------------------------------


def synthetic(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x [512, 256] with 6 channels scaled 3 times and shifted by 40 either way; W [256, 256] of deviation 0.05."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 256, generator=draw, dtype=torch.float64)
    channels = torch.randperm(256, generator=draw)[:6]
    signs = torch.randint(0, 2, (6,), generator=draw) * 2 - 1
    x[:, channels] = 3 * x[:, channels] + 40 * signs
    return x, 0.05 * torch.randn(256, 256, generator=draw, dtype=torch.float64)


def layer_error(x: torch.Tensor, weight: torch.Tensor, bits: int, way: str, clock: str = "after") -> float:
    """Relative error of x Wᵀ with both quantised in one way, by the functions that models are compressed with."""
    true, bias = x @ weight.T, 0.0
    if way in ("full", "unsymmetrised"):
        if way == "full":
            span = Range()
            span(x[None])
            center = span.midpoint.double()
            scales = Peaks(center if clock == "after" else 0.0)
            scales(x[None])
            x, bias = x - center, weight @ center
        else:
            scales = Peaks()
            scales(x[None])
        scale = integer.scale_of(scales.largest, bits)
        codes, scale, weight = integer.quantise(x, scale, bits), 1.0, weight * scale
    elif way == "smoothquant":
        factor = smoothing(x.abs().amax(0), [weight], 0.5)
        codes, scale = integer.quantise_per_token(x / factor, bits)
        weight = weight * factor
    else:
        codes, scale = (integer.quantise_per_token if way == "token" else integer.quantise_per_tensor)(x, bits)
    y = codes.double() @ quantise_rows(weight, bits).dequantise(torch.float64).T * scale + bias
    return float((y - true).norm() / true.norm())


NUMBERS = {
    6: {"tensor": 0.081, "token": 0.072, "smoothquant": 0.024, "unsymmetrised": 0.034, "full": 0.0086},
    8: {"tensor": 0.0196, "token": 0.0176, "smoothquant": 0.0060, "unsymmetrised": 0.0085, "full": 0.0021},
    4: {"tensor": 0.20, "token": 0.20, "smoothquant": 0.107, "unsymmetrised": 0.137, "full": 0.037},
}


@pytest.mark.parametrize("bits", NUMBERS)
def test_acceptance_4_synthetic_errors(bits):
    inputs = [synthetic(seed) for seed in range(5)]
    found = {way: sum(layer_error(*one, bits, way) for one in inputs) / len(inputs) for way in NUMBERS[bits]}
    assert found == pytest.approx(NUMBERS[bits], rel=0.15)


def test_acceptance_4_order_at_six_bits():
    for seed in range(5):
        errors = [layer_error(*synthetic(seed), 6, way) for way in ("full", "smoothquant", "unsymmetrised", "token")]
        assert all(less < more for less, more in pairwise(errors))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_acceptance_6_scales_are_taken_after_symmetrisation(bits):
    x, weight = synthetic()
    assert layer_error(x, weight, bits, "full", "before") > 2 * layer_error(x, weight, bits, "full", "after")


# --- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BIASED)
@pytest.mark.parametrize("center", ["mean_midpoint", "midpoint"])
def test_acceptance_1_folds_preserve_the_function(kind, center):
    model, ids, later = uneven(kind).double(), random_ids(6, 20), random_ids(3, 20, seed=1)
    moved = OutlierTune(center=center).transform(copy.deepcopy(model), ids)
    assert relative(moved, model, later) < 1e-9
    block = next(iter(walk(moved, ids)))
    for fold in folds.norm_folds(block):  # every channel now fills its codes, from end to end
        span, peaks = Range(), Peaks()
        block.observe({fold.readers[0]: span})
        block.observe({fold.readers[0]: peaks})
        assert torch.allclose(peaks.largest, torch.full_like(peaks.largest, 127.0))
        assert float(span.midpoint.abs().max()) < 1e-2 or center == "midpoint"


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "qwen3"])
def test_acceptance_9_rms_norms_get_biases(kind, tmp_path):
    """Exact as far as the model's own norms are, which compute in float32 whatever the model's dtype."""
    model, ids, later = uneven(kind), random_ids(6, 20), random_ids(3, 20, seed=1)
    moved = OutlierTune().transform(copy.deepcopy(model), ids)
    assert relative(moved, model, later) < 2e-6
    small = quantised(OutlierTune(), model, ids)
    norm, layer = small.model.layers[1].input_layernorm, small.model.layers[1].self_attn.q_proj
    assert isinstance(norm, FoldedNorm)
    assert float(norm.bias.abs().max()) > 0.1
    assert float(layer.bias.abs().max()) > 0
    save(small, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(later).logits, small(later).logits)
    assert torch.equal(again.model.layers[1].input_layernorm.bias, norm.bias)
    official = quantised(OutlierTune(symmetrize="biased"), model, ids)
    assert official.model.layers[1].input_layernorm.bias is None


def test_half_precision_models_are_folded_in_float32():
    """Offsets of 50 and their products with 16-bit weights neither overflow nor round the function away."""
    model, ids = uneven("opt", 3, 50), random_ids(6, 20)
    narrow = copy.deepcopy(model).half()
    small = quantised(OutlierTune(), narrow, ids)
    assert small.dtype == torch.float16
    layer = small.model.decoder.layers[0]
    assert layer.self_attn.q_proj.bias.dtype == layer.self_attn_layer_norm.weight.dtype == torch.float32
    assert relative(small, model, ids) < 1.2 * relative(quantised(OutlierTune(), model, ids), model, ids)


def test_dead_channels_stay_dead():
    model, ids = tiny("opt"), random_ids(4, 20)
    norm = model.model.decoder.layers[0].self_attn_layer_norm
    norm.weight.data[5] = norm.bias.data[5] = 0
    for method in (OutlierTune(), OutlierTune(fold=False), OutlierTune(clip_search=True), SmoothQuant()):
        small = quantised(method, model, ids)
        assert bool(torch.isfinite(small(ids).logits).all())
        assert relative(small, model, ids) < 0.05


def test_projections_that_make_q_k_and_v_together_give_each_its_scale():
    model, ids = made("bloom"), random_ids(4, 20)
    layer = quantised(OutlierTune(bits=4), model, ids).transformer.h[0].self_attention.query_key_value
    assert layer.output_shape == [4, 3, 16]
    y = torch.randn(2, 3, 192) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(16).repeat(4)
    rounded = layer.round_output(y).view(2, 3, 4, 3, 16)
    for part in range(3):
        alone = y.view(2, 3, 4, 3, 16)[..., part, :].flatten(-2)
        codes, scale = integer.quantise_per_token(alone, 4)
        assert torch.equal(rounded[..., part, :].flatten(-2), codes * scale)


# --- integers --------------------------------------------------------------------------------------------------------


def layer_of(kind: str, bits: int, outputs: int = 0, seed: int = 0) -> tuple[IntegerLinear, Rows]:
    torch.manual_seed(seed)
    linear = nn.Linear(96, 80)
    rows = quantise_rows(linear.weight, bits)
    scale = {"static": torch.rand(96) + 0.01}.get(kind)
    return IntegerLinear.of(linear, rows, kind, bits, scale, output_bits=outputs), rows


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("kind", ["codes", "static", "token"])
def test_acceptance_2_integers_are_the_fake_quantised_floats(kind, bits):
    layer, rows = layer_of(kind, bits)
    for tokens in range(1, 65):
        x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens)) * 3
        scale = torch.ones(1)
        if kind == "codes":
            x = codes = integer.round_to_codes(x * 2**bits / 8, bits)
        elif kind == "static":
            codes = integer.quantise(x, layer.input_scale, bits)
        else:
            codes, scale = integer.quantise_per_token(x, bits)
        exact = codes.double() @ rows.whole.double().T  # sums of whole numbers are exact in float64
        sums, _ = layer.sums(x)
        assert sums.dtype == torch.int32
        assert torch.equal(sums.double(), exact)
        fake = exact.float() * layer.scale
        fake = (fake * scale if kind == "token" else fake) + layer.bias
        assert torch.equal(layer(x), fake)
        rounded = codes * layer.input_scale if kind == "static" else codes * scale
        assert torch.allclose(layer(x), F.linear(rounded, layer.weight(), layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "norm", "reader"),
    [
        ("opt", "model.decoder.layers.0.self_attn_layer_norm", "self_attn.k_proj"),
        ("opt", "model.decoder.layers.0.final_layer_norm", "fc1"),
        ("gqa", "model.layers.0.input_layernorm", "self_attn.q_proj"),
        ("gqa", "model.layers.0.post_attention_layernorm", "mlp.up_proj"),
    ],
)
@pytest.mark.parametrize("bits", [6, 8])
def test_acceptance_3_a_folded_norm_makes_the_codes_of_the_plain_one(kind, norm, reader, bits):
    """In the first block, where both were calibrated on the very same inputs."""
    model, ids = uneven(kind), random_ids(6, 20)
    folded, apart = (quantised(OutlierTune(bits=bits, fold=fold), model, ids) for fold in (True, False))
    x = 2 * torch.randn(10_000, 64, generator=torch.Generator().manual_seed(0))
    codes = folded.get_submodule(norm)(x)
    layer = apart.get_submodule(f"{norm.rpartition('.')[0]}.{reader}")
    steps = layer.scaled(apart.get_submodule(norm)(x))
    explicit = integer.quantise(apart.get_submodule(norm)(x), layer.input_scale, bits)
    ties = (steps - steps.floor() - 0.5).abs() < 1e-3
    assert float(ties.float().mean()) < 0.01
    assert torch.equal(codes[~ties], explicit[~ties].float())
    assert int((codes - explicit).abs().max()) <= 1


def test_codes_that_pass_as_half_precision_numbers_are_whole():
    model, ids = uneven("opt"), random_ids(4, 20)
    small = quantised(OutlierTune(), model.bfloat16(), ids)
    seen = []
    layer = small.model.decoder.layers[1].fc1
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    small(ids)
    assert seen[0].dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[0].to(torch.int8).to(torch.bfloat16))
    assert int(seen[0].abs().max()) >= 120


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_layers_hold_their_bits(bits):
    layer, _ = layer_of("token", bits)
    assert layer.nbytes == 80 * (96 * bits // 8 + 4 + 1 + 4)
    assert layer.codes.dtype == (torch.int8 if bits == 8 else torch.uint8)


def test_rows_of_zeros_and_rows_of_one_sign():
    weight = torch.stack([torch.zeros(8), torch.arange(1.0, 9), -torch.arange(1.0, 9)])
    for symmetric in (False, True):
        rows = quantise_rows(weight, 8, symmetric)
        assert not rows.dequantise()[0].any()
        assert torch.allclose(rows.dequantise(), weight, atol=0.5 * 8 / 127 + 1e-6)


def test_searched_ranges_and_gptq_do_what_they_are_for():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=draw)
    weight[:, 3] *= 8
    x = torch.randn(2000, 128, generator=draw) @ torch.randn(128, 128, generator=draw)
    gram = x.T @ x / len(x)

    def error(**how) -> tuple[float, float]:
        off = quantise_rows(weight, 4, **how).dequantise() - weight
        return float(off.abs().pow(2.4).sum()), float((x @ off.T).square().mean())

    assert error(clip=True)[0] < error()[0]
    assert error(gram=gram)[1] < 0.75 * error()[1]


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [OutlierTune(bits=6), SmoothQuant(bits=6, activations="static")], ids=lambda m: m.slug())
def test_every_family_compresses_and_round_trips(kind, method, tmp_path):
    model, ids = uneven(kind), random_ids(4, 16)
    small = quantised(method, model, ids)
    save(small, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, small(ids).logits)
    assert sum(isinstance(m, IntegerLinear) for m in again.modules()) == len(shapes(model))
    held = sum(m.nbytes for m in again.modules() if isinstance(m, IntegerLinear))
    weights = sum(rows * columns for rows, columns in shapes(model))
    assert held < weights * 6 / 8 + sum(9 * rows + 4 for rows, _ in shapes(model)) + 1


def test_a_folder_loads_in_a_new_process_as_what_was_saved(tmp_path):
    uneven("opt").save_pretrained(tmp_path / "original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    ids = random_ids(3, 9)
    model = OutlierTune(bits=6).compress(original, ids)
    save(model, tmp_path / "small")
    torch.save(model(ids).logits, tmp_path / "logits.pt")
    code = (
        "import broadsheet, torch, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/small')\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "assert torch.equal(model(ids).logits, torch.load(sys.argv[1] + '/logits.pt', weights_only=True))\n"
        "model.generate(ids, max_new_tokens=3, do_sample=False)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ids.tolist()), str(torch.get_num_threads())], check=True)


@pytest.mark.parametrize("bits", [6, 8])
def test_acceptance_5_half_the_error_of_smoothquant_where_channels_are_off_centre(bits):
    """Offsets that are large against the spread of their channels; where they are small the two tie (next test)."""
    model, ids, later = uneven("opt", 3, 40), random_ids(16, 32), random_ids(4, 32, seed=1)
    errors = {
        name: relative(quantised(method, model, ids), model, later)
        for name, method in {
            "full": OutlierTune(bits=bits),
            "off": OutlierTune(bits=bits, symmetrize="off"),
            "smoothquant": SmoothQuant(bits=bits),
            "with zeros": SmoothQuant(bits=bits, symmetric=False),
            "token": SmoothQuant(bits=bits, smooth=False),
            "tensor": SmoothQuant(bits=bits, smooth=False, activations="static"),
        }.items()
    }
    rivals = [errors[name] for name in ("smoothquant", "with zeros", "off")]
    assert errors["full"] < min(rivals) * (0.5 if bits == 6 else 1)
    assert max(errors["smoothquant"], errors["off"]) < min(errors["token"], errors["tensor"])


def test_acceptance_5_a_tie_where_channels_are_centred():
    """Pure scaling is what SmoothQuant takes back exactly; without outliers there is nothing to take back.

    The same with an offset of little more than the channel's own deviation.
    """
    ids, later = random_ids(16, 32), random_ids(4, 32, seed=1)
    for model in (made("opt"), uneven("opt", 30, 0), uneven("opt", 30, 40), made("gqa"), uneven("gqa", 30)):
        ours, theirs = (
            relative(quantised(method(bits=6), model, ids), model, later) for method in (OutlierTune, SmoothQuant)
        )
        assert 2 / 3 < ours / theirs < 3 / 2


@pytest.fixture(scope="module")
def pocket():
    """A trained model, tokens to calibrate on, more of the same kind, and of another."""
    model, tokenizer = load("pocket-2m")
    ids, held = (calibration(Workload(samples=samples, seed=seed), tokenizer) for samples, seed in ((16, 0), (4, 1)))
    shifted = torch.randint(3, model.config.vocab_size, held.shape, generator=torch.Generator().manual_seed(0))
    return model, ids, held, shifted, OutlierTune().compress(copy.deepcopy(model), ids)


def test_acceptance_7_clip_rates(pocket):
    _, ids, held, shifted, small = pocket
    rates = clip_rates(small, held)
    assert len(rates) == 8
    assert max(rates.values()) < 1e-3
    assert sum(clip_rates(small, ids).values()) <= sum(rates.values())
    assert 0 < max(clip_rates(small, shifted).values()) < 0.1


def test_acceptance_8_bytes(pocket):
    *_, small = pocket
    assert size(small).bits / 16 <= 0.52


def test_acceptance_8_bytes_of_whole_blocks(pocket):
    """Norms and new biases counted, they miss 0.52 by a hair in blocks that are 256 wide; wider ones do not."""
    model, _, _, _, small = pocket
    wide = tiny("gqa", hidden_size=512, intermediate_size=1024, num_hidden_layers=1)
    for one, other, most in ((model, small, 0.5201), (wide, quantised(OutlierTune(), wide, random_ids(2, 8)), 0.512)):
        whole, held = (
            sum(t.nbytes for b in decoder_blocks(m).values() for t in [*b.parameters(), *b.buffers()]) for m in (one, other)
        )
        assert held / (whole / 2) < most


def test_eight_bits_keep_what_a_trained_model_says(pocket):
    model, _, held, _, small = pocket
    with torch.no_grad():
        same = (small(held).logits.argmax(-1) == model(held).logits.argmax(-1)).float().mean()
    assert float(same) > 0.97


def test_a_token_means_the_same_alone_and_in_a_batch(pocket):
    _, ids, _, _, small = pocket
    with torch.no_grad():
        batch, alone = small(ids[:3, :40]).logits, small(ids[1:2, :40]).logits
        cut = small(ids[1:2, :20]).logits
    assert torch.allclose(batch[1], alone[0], atol=1e-3)
    assert torch.allclose(cut[0], alone[0, :20], atol=1e-3)


def test_switches_change_what_they_name():
    model, ids = uneven("opt"), random_ids(6, 24)
    whole = quantised(OutlierTune(bits=6), model, ids)
    layer = whole.model.decoder.layers[0]
    assert (layer.self_attn.q_proj.input, layer.self_attn.q_proj.output_bits) == ("codes", 6)
    assert (layer.fc1.input, layer.fc2.input, layer.self_attn.out_proj.input) == ("codes", "token", "token")
    assert (layer.fc1.output_bits, layer.fc2.output_bits) == (0, 0)
    for name, value in {
        "w_bits": 4, "symmetrize": "off", "center": "midpoint", "threshold": 0.5, "scales": "token", "clip_search": True,
        "clamp": 0.8, "weight_method": "gptq", "quantize_bmm": False, "bmm": "tensor",
    }.items():  # fmt: skip
        other = quantised(replace(OutlierTune(bits=6), **{name: value}), model, ids)
        assert not torch.equal(other(ids).logits, whole(ids).logits), name
    seen = Peaks(bits=6)
    x = torch.randn(3, 200, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 20
    seen(x)
    assert bool((seen.largest < 20).all())
    seen = Peaks(clamp=0.8)
    seen(torch.tensor([[[1.0, -10.0], [10.0, 3.0]]]))
    assert seen.largest.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("method", [OutlierTune(), SmoothQuant(), SmoothQuant(symmetric=False)])
@pytest.mark.parametrize("bits", [4.0, 6.0, 8.5])
def test_a_budget_is_met_by_what_is_stored(method, bits):
    model = tiny("gqa", hidden_size=128, intermediate_size=256)
    fitted = method.at_budget(bits, shapes(model))
    held = size(fitted.compress(model, random_ids(2, 8))).bits
    assert bits - 1.4 < held <= bits
    assert fitted.bits == 8
    with pytest.raises(Unreachable):
        method.at_budget(2.0, shapes(model))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 9}, "bits must be 2 to 8"),
        ({"w_bits": 16}, "w_bits must be 2 to 8"),
        ({"symmetrize": "yes"}, "symmetrize must be one of auto, biased, off"),
        ({"center": "mean"}, "center must be one of"),
        ({"scales": "row"}, "scales must be one of"),
        ({"weight_method": "awq"}, "weight_method must be one of rtn, gptq"),
        ({"bmm": "head"}, "bmm must be one of"),
        ({"threshold": 1.0}, "threshold is a share"),
        ({"clamp": 0.0}, "clamp is a share"),
    ],
)
def test_parameters_out_of_range_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        OutlierTune(**wrong)


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"w_bits": 9}, {"alpha": 1.5}, {"activations": "channel"}])
def test_smoothquant_refuses_parameters_out_of_range(wrong):
    with pytest.raises(ValueError, match=r"must be"):
        SmoothQuant(**wrong)


@pytest.mark.parametrize("method", [OutlierTune(), SmoothQuant()])
def test_what_cannot_be_calibrated_is_refused_with_a_reason(method):
    with pytest.raises(ValueError, match="needs calibration"):
        method.compress(tiny("opt"))
    with pytest.raises(ValueError, match=r"at least 2|at least one of each"):
        method.compress(tiny("opt"), torch.zeros(0, 4, dtype=torch.long))
    broken = tiny("opt")
    broken.model.decoder.layers[1].fc1.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.[12]\S+ gets inf or nan on the calibration tokens"):
        method.compress(broken, random_ids(2, 8))
    with pytest.raises(ValueError, match="compressed already"):
        method.compress(quantised(method, tiny("opt"), random_ids(2, 8)), random_ids(2, 8))


def test_models_without_a_norm_to_fold_into_are_refused():
    with pytest.raises(ValueError, match="no norm that feeds linear layers alone"):
        OutlierTune().compress(tiny("opt", do_layer_norm_before=False), random_ids(2, 8))

    class LowNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x):
            return self.weight * x / x.abs().mean(-1, keepdim=True)

    model = tiny("gqa")
    model.model.layers[0].input_layernorm = LowNorm()
    with pytest.raises(ValueError, match="LowNorm is neither a LayerNorm nor an RMSNorm"):
        OutlierTune().compress(model, random_ids(2, 8))
    with pytest.raises(ValueError, match="give at least 2"):
        OutlierTune().compress(tiny("gqa"), torch.ones(1, 1, dtype=torch.long))


def test_layers_too_wide_for_32_bits_are_refused():
    linear = nn.Linear(70_000, 1)
    with pytest.raises(ValueError, match="too many for sums in 32 bits"):
        IntegerLinear.of(linear, quantise_rows(linear.weight, 8))


# --- the authors' code -----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """A norm and two layers that it feeds."""

    def __init__(self, golden: dict[str, torch.Tensor]):
        super().__init__()
        self.ln, self.q_proj, self.k_proj = nn.LayerNorm(32), nn.Linear(32, 20), nn.Linear(32, 20)
        for tensor, name in (
            (self.ln.weight, "gain"), (self.ln.bias, "beta"), (self.q_proj.weight, "q"), (self.q_proj.bias, "q_bias"),
            (self.k_proj.weight, "k"), (self.k_proj.bias, "k_bias"),
        ):  # fmt: skip
            tensor.data.copy_(golden[name])

    def forward(self, hidden):
        x = self.ln(hidden)
        return self.q_proj(x) * self.k_proj(x)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def pair(golden):
    return Block(0, "layers.0", Pair(golden), [Pass(golden["h"].float())])


def test_statistics_and_folds_are_those_of_the_official_code(golden, pair):
    method = OutlierTune(bits=6)
    ((fold, moved),) = method.statistics(pair).items()
    assert torch.allclose(moved.center, golden["z"], atol=1e-6)
    alive = golden["gain"] != 0
    assert torch.allclose(moved.scale[alive], golden["a"][alive] / 31, rtol=1e-5)
    whole = OutlierTune(bits=6, symmetrize="off", clamp=0.8).statistics(pair)[fold].scale
    assert torch.allclose(whole[alive] * 31, golden["a_clamped"][alive], rtol=1e-6)
    plain = OutlierTune(bits=6, symmetrize="off").statistics(pair)[fold].scale
    assert torch.allclose(plain[alive] * 31, golden["a_unsymmetrized"][alive], rtol=1e-6)
    method.fold_in(pair, fold, moved)
    module = pair.module
    assert torch.allclose(module.ln.bias * moved.scale, golden["beta_sym"], atol=1e-5)
    for name in ("q", "k"):
        assert torch.allclose(getattr(module, f"{name}_proj").bias, golden[f"{name}_bias_sym"], atol=1e-5)
    assert torch.allclose(module.q_proj.weight[:, alive], golden["q_scaled"][:, alive], rtol=1e-4)


def test_searched_peaks_are_those_of_the_official_code(golden, pair):
    """Of which it takes the next shares from the best so far, where ours are all of the sample's largest |x|.

    With that emulated the peaks are the same (it keeps them in float16); without, two of 31 are a hundredth away.
    """
    ((fold, moved),) = OutlierTune(bits=6, clip_search=True).statistics(pair).items()
    alive, official = golden["gain"] != 0, golden["a_searched"].float()
    off = (moved.scale * 31 / official - 1).abs()[alive]
    assert int((off > 1e-3).sum()) == 2
    assert float(off.max()) < 0.011
    x = pair.get(fold.producer)(golden["h"].float()).detach() - golden["z"]
    peak = x.abs().amax(1)
    least = torch.full_like(peak, float("inf"))
    for hundredth in range(100, 20, -1):
        tried = peak * hundredth / 100
        scale = (tried / 31).unsqueeze(1)
        error = ((x / scale).round().clamp(-32, 31) * scale - x).abs().pow(2.4).sum(1)
        peak, least = torch.where(error < least, tried, peak), torch.minimum(error, least)
    assert torch.allclose(peak.amax(0)[alive], official[alive], rtol=1e-3)


def test_codes_weights_and_outputs_are_those_of_the_official_code(golden, pair):
    """Its weight is that of a channel scale of at least 1e-5, which differs in the dead channel only."""
    OutlierTune(bits=6).compress_block(pair)
    codes = pair.module.ln(golden["later"].float())
    assert torch.equal(codes.to(torch.int8), golden["codes"])
    layer = pair.module.q_proj
    alive = golden["gain"] != 0
    assert torch.allclose(layer.weight()[:, alive], golden["q_quantised"][:, alive], rtol=1e-4, atol=1e-6)
    assert torch.allclose(layer(codes), golden["y"], rtol=1e-4, atol=1e-4)
    clipped = (golden["codes_unclamped"] != golden["codes"]).float().mean()
    assert clip_rates(pair.module, golden["later"].float())["ln"] == pytest.approx(float(clipped))


def test_gptq_is_that_of_the_official_code(golden):
    codes = golden["calibration_codes"].flatten(0, 1).float()
    rows = quantise_rows(golden["q_scaled"], 6, clip=True, gram=codes.T @ codes / len(codes))
    assert torch.allclose(rows.scale, golden["q_gptq_scale"], rtol=1e-6)
    assert torch.equal(rows.zero + 32.0, golden["q_gptq_zero"])
    assert torch.allclose(rows.dequantise(), golden["q_gptq"], rtol=1e-5, atol=1e-6)


def test_layers_no_norm_feeds_and_biased_rms_norms_are_those_of_the_official_code(golden):
    linear = nn.Linear(32, 20)
    linear.weight.data, linear.bias.data = golden["k"].float(), golden["k_bias"].float()
    layer = IntegerLinear.of(linear, quantise_rows(linear.weight, 6), "token", 6)
    assert torch.allclose(layer(golden["later"].float() * 2), golden["out_y"], atol=1e-5)
    norm = FoldedNorm({"weight": golden["gain"].float(), "bias": -golden["z"]}, kind="rms", eps=1e-6, bits=0)
    assert torch.allclose(norm(golden["later"].float()), golden["rms_y"], rtol=1e-5, atol=1e-5)


def test_smoothing_is_equation_4():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.rand(8, generator=draw) * 100, torch.randn(5, 8, generator=draw)
    other = torch.randn(3, 8, generator=draw)
    factor = smoothing(x, [weight, other], 0.3)
    columns = torch.cat([weight, other]).abs().amax(0)
    assert torch.allclose(factor, x**0.3 / columns**0.7)
    assert bool((smoothing(torch.zeros(8), [weight], 0.5) > 0).all())
    block = next(iter(walk(uneven("gqa", 50), random_ids(4, 16))))
    fold = folds.norm_folds(block)[0]
    before = Range()
    block.observe({fold.readers[0]: before})
    scale = smoothing(before.largest, [block.get(name).weight for name in fold.readers], 0.5)
    widen(block, fold)
    folds.scale(block, fold, scale)
    after = Range()
    block.observe({fold.readers[0]: after})
    assert torch.allclose(after.largest, before.largest / scale, rtol=1e-4)
    columns = torch.stack([block.get(name).weight.abs().amax(0) for name in fold.readers]).amax(0)
    assert torch.allclose(after.largest, columns, rtol=1e-3)  # at 0.5 both sides share the range evenly
