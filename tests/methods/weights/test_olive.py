"""OliVe: number types, pairs, their search, products straight from codes, and the method on models."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import random_ids, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from broadsheet.core.microworld.encoding import encode_session
from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.models import load
from broadsheet.core.models.outliers import inject_input_outliers
from broadsheet.methods.weights.base import Unreachable, shapes, size
from broadsheet.methods.weights.olive import Olive, OVPLinear, OVPTensor, PairType, Search, kernel, pairs, saturation
from broadsheet.methods.weights.olive.grids import NAMES, tables
from broadsheet.methods.weights.quantiser import save

GOLDEN = Path(__file__).parents[2] / "golden" / "olive_official.safetensors"
KINDS = [PairType(name, signed) for name in NAMES for signed in (True, False)]
#: plain 4-bit quantisation whose clipping is searched over all of max |x|
CLIPPED = {"outliers": False, "mode": "int", "w_low": 5, "w_up": 102, "a_low": 1, "a_up": 102}


def planted(*shape: int, share: float = 0.02, low: float = 6, high: float = 20, seed: int = 0) -> torch.Tensor:
    """Normal values, a ``share`` of them replaced by outliers of ``low`` to ``high`` standard deviations."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=draw)
    chosen = torch.rand(*shape, generator=draw) < share
    count = int(chosen.sum())
    signs = torch.where(torch.rand(count, generator=draw) < 0.5, -1.0, 1.0)
    x[chosen] = (low + (high - low) * torch.rand(count, generator=draw)) * signs
    return x


def scanned(y: torch.Tensor, kind: PairType) -> torch.Tensor:
    """The nearest value as the official kernel finds it: normals, then outliers, each ascending; the later of equals."""
    normals = [value for value in kind.values if abs(value) <= kind.top]
    grid = normals + [value for value in kind.values if abs(value) > kind.top]
    best, found = torch.full_like(y, torch.inf), torch.zeros_like(y)
    for value in grid:
        distance = (y - value).abs()
        found = torch.where(distance <= best, torch.tensor(float(value)), found)
        best = torch.minimum(distance, best)
    return found


def official(y: torch.Tensor, kind: PairType) -> torch.Tensor:
    """The official rule on ``y`` [rows, even width]: nearest values, of two outliers the even one, victims zero."""
    q = scanned(y.clamp(-kind.reach, kind.reach), kind)
    outlier = q.abs() > kind.top
    even, odd = outlier[:, ::2], outlier[:, 1::2]
    q[:, ::2][odd & ~even] = 0
    q[:, 1::2][even] = 0
    return q


def searched(x: torch.Tensor, kind: PairType, ratios: torch.Tensor, policy: str) -> list[float]:
    """Squared errors of one tensor over candidates, each tried in full."""
    wide = x.double()
    base = max(abs(wide.mean() + 3 * wide.std()), abs(wide.mean() - 3 * wide.std())).float()
    lost = []
    for ratio in ratios:
        codes, *_ = pairs.encode_reference(x, (base * ratio / kind.top).expand(len(x)), kind, policy)
        lost.append(
            float((pairs.decode(codes, kind)[:, : x.shape[1]] * (base * ratio / kind.top) - x).double().square().sum())
        )
    return lost


# --- acceptance -------------------------------------------------------------------------------------------------------


def test_acceptance_1_types_are_as_listed_and_codes_are_bijective():
    int4, flint4 = PairType("int4"), PairType("flint4")
    assert {v for v in int4.values if abs(v) <= 7} == set(range(-7, 8))
    assert {v for v in int4.values if v > 7} == {12, 16, 24, 32, 48, 64, 96}
    assert {v for v in flint4.values if 0 <= v <= 16} == {0, 1, 2, 3, 4, 6, 8, 16}
    assert {v for v in flint4.values if v > 16} == {24, 32, 48, 64, 96, 128, 192}
    # on the official ruler, where normals end at 32
    assert (
        {4 * v for v in int4.values if v > 7} == {2 * v for v in flint4.values if v > 16} == {48, 64, 96, 128, 192, 256, 384}
    )
    int8 = PairType("int8")
    assert {v for v in int8.values if abs(v) <= 127} == set(range(-127, 128))
    assert {v / 4 for v in int8.values if v > 127} == {2**e * (1 + m / 32) for e in range(5, 9) for m in range(32)} - {32}
    for kind in (int4, flint4):
        assert kind.identifier == 0b1000
        assert len(kind.values) == 15 + 14
    for kind in KINDS:
        normals = {code: value for code, value in enumerate(kind.normal_values) if code != kind.identifier}
        outliers = {code: value for code, value in enumerate(kind.outlier_values) if value}
        assert len(set(normals.values())) == len(normals) == 2**kind.bits - 1
        assert len(set(outliers.values())) == len(outliers) == 2**kind.bits - (2 if kind.signed else 1)
        assert not set(normals.values()) & set(outliers.values())
        assert kind.code_of == {v: c for c, v in [*normals.items(), *outliers.items()]}
        assert kind.identifier not in kind.code_of.values()
        assert (tables(kind)[2].unique() == torch.tensor(kind.values)).all()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("bits", "mode"), [(4, "int"), (4, "flint"), (8, "int")])
def test_acceptance_2_packing_is_quantising_bit_for_bit(bits, mode, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(pairs, "kernels", lambda: None)
    x = planted(1000, 1000)
    x[0, :8] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 3e38, -3e38])
    packed = OVPTensor.pack(x, bits=bits, mode=mode, alpha=torch.tensor(2.3), oo_policy="even")
    scale = torch.tensor(2.3) / packed.kind.top
    faked = official(x / scale, packed.kind) * scale
    assert torch.equal(packed.unpack(), faked)
    assert packed.stats()["saturated"] == int(((x / scale).abs() > packed.kind.reach).sum()) >= 2


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_acceptance_3_the_even_policy_is_the_official_rule(kind):
    x = planted(300, 64, share=0.2)
    x = x if kind.signed else x.abs()
    x[:100] = (x[:100] * 4).round() / 4  # ties
    scale = torch.tensor([0.5, 0.05 if kind.bits == 8 else 1.0, 0.37]).repeat(100)
    values = official(x / scale[:, None], kind)
    for encode in (pairs.encode, pairs.encode_reference):
        codes, lost, beyond = encode(x, scale, kind, "even")
        assert torch.equal(pairs.decode(codes, kind).float(), values)
        outlier = scanned((x / scale[:, None]).clamp(max=kind.reach), kind).abs() > kind.top
        assert lost == int((outlier[:, ::2] & outlier[:, 1::2]).sum()) > 0
        assert beyond == int(((x / scale[:, None]).abs() > kind.reach).sum())


def test_acceptance_4_errors_on_planted_outliers():
    # Means of four draws: one of 200,000 values moves by 8 %. The figures at 2 % belong to outliers of 6 to 15, not 20,
    # standard deviations: 15 gives their row of absmax.
    table = {
        (0.0, 20): (0.0381, 0.0130, 0.0129, None),
        (0.001, 20): (0.606, 0.136, 0.0162, None),
        (0.005, 20): (0.607, 0.294, 0.0357, 0.0268),
        (0.02, 15): (0.376, 0.248, 0.0925, 0.0676),
    }

    def plain(x: torch.Tensor, alpha: float) -> float:
        return float(((x * 7 / alpha).round().clamp(-7, 7) * alpha / 7 - x).square().mean())

    for (share, high), figures in table.items():
        draws = []
        for seed in range(4):
            x = planted(200_000, share=share, high=high, seed=seed)
            top = float(x.abs().max())
            clipped = min(plain(x, top * i / 100) for i in range(10, 101))
            ours = [float((OVPTensor.pack(x, mode=mode).unpack() - x).square().mean()) for mode in ("int", "flint")]
            draws.append([plain(x, top), clipped, *ours])
            if share == 0:
                assert ours[0] <= clipped * 1.01
            if share == 0.001:
                assert ours[0] * 5 <= clipped
        for got, figure in zip(torch.tensor(draws).mean(0).tolist(), figures):
            assert figure is None or got == pytest.approx(figure, rel=0.1), (share, draws)


def test_acceptance_4_gaussian_pairs_at_three_sigma():
    x = planted(1_000_000, share=0)
    count = (x.abs() > 3).reshape(-1, 2).sum(1).bincount(minlength=3) / 500_000
    assert count.tolist() == pytest.approx([0.9973002**2, 2 * 0.0026998 * 0.9973002, 0.0026998**2], abs=3e-4)
    assert count.tolist() == pytest.approx([0.9948, 0.0052, 0.00001], abs=5e-4)  # measured on 100,000 pairs


@given(
    st.integers(0, 1 << 30), st.sampled_from(KINDS), st.sampled_from(pairs.POLICIES), st.floats(0, 0.5), st.integers(1, 9)
)
@settings(max_examples=60, deadline=None)
def test_acceptance_5_a_pair_has_one_outlier_at_most_and_its_victim_is_zero(seed, kind, policy, share, rows):
    x = planted(rows, 40, share=share, seed=seed)
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * (0.6 if kind.bits == 4 else 0.06)
    codes, *_ = pairs.encode(x, scale, kind, policy)
    assert torch.equal(codes, pairs.encode_reference(x, scale, kind, policy)[0])
    values = pairs.decode(codes, kind).unflatten(-1, (-1, 2))
    outlier = values.abs() > kind.top
    assert not outlier.all(-1).any()
    assert (values[outlier.flip(-1)] == 0).all()
    y = torch.where(scale[:, None] > 0, x / scale[:, None], 0.0)
    plain = scanned(y.clamp(-kind.reach, kind.reach) if kind.signed else y.clamp(0, kind.reach), kind).unflatten(-1, (-1, 2))
    was = plain.abs() > kind.top
    assert torch.equal(outlier.any(-1), was.any(-1))  # an outlier is lost to another one only
    kept = values != 0
    assert torch.equal(values[kept].float(), plain[kept])
    if policy == "larger":
        both = was.all(-1)
        size_of = y.abs().unflatten(-1, (-1, 2))
        assert torch.equal(outlier[both][:, 1], size_of[both][:, 1] > size_of[both][:, 0])


@pytest.mark.parametrize("shape", [(6, 10), (5, 7), (2, 3, 8)])
def test_acceptance_6_bytes_are_half_the_values_and_alpha(shape):
    for bits in (4, 8):
        packed = OVPTensor.pack(planted(*shape), bits=bits)
        rows, columns = math.prod(shape[:-1]), shape[-1]
        assert packed.codes.numel() == packed.codes.nbytes == rows * -(-columns // 2) * bits // 4
        assert packed.nbytes == packed.codes.nbytes + 4 * rows
    packed = OVPTensor.pack(planted(6, 10))
    assert packed.codes.nbytes == math.ceil(6 * 10 / 2)


@given(
    st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3000),
    st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_acceptance_7_products_of_codes_are_products_of_values(a_kind, w_kind, inputs, outputs, width, seed):
    draw = torch.Generator().manual_seed(seed)
    a, w = (
        torch.randint(0, 256, (rows, -(-width // 2) * 2 * kind.bits // 8), generator=draw, dtype=torch.uint8)
        for rows, kind in ((inputs, a_kind), (outputs, w_kind))
    )  # any bytes, so outliers are everywhere
    a_values, w_values = pairs.decode(a, a_kind), pairs.decode(w, w_kind)
    exact = a_values.long() @ w_values.long().T
    assert torch.equal(kernel.integer_matmul(a, a_kind, w, w_kind), exact)
    x = torch.randn(inputs, w_values.shape[1], generator=draw)
    bound = (w_values.shape[1] + 2) * 2.0**-24 * (x.double().abs() @ w_values.double().abs().T)
    assert ((kernel.float_matmul(x, w, w_kind) - x.double() @ w_values.double().T).abs() <= bound).all()


def test_acceptance_7_float_product_of_dequantised_tensors():
    a, w = OVPTensor.pack(planted(9, 512), per_row=False), OVPTensor.pack(planted(33, 512, seed=1))
    sums = kernel.integer_matmul(a.codes, a.kind, w.codes, w.kind)
    product = sums.double() * (pairs.scale_of(a.alpha, a.kind) * pairs.scale_of(w.alpha, w.kind)).double()
    wanted = a.unpack().double() @ w.unpack().double().T
    assert (product - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("a_kind", KINDS, ids=str)
@pytest.mark.parametrize("w_kind", [kind for kind in KINDS if kind.signed], ids=str)
def test_acceptance_7_the_worst_case_overflows_nothing(a_kind, w_kind):
    def worst(kind: PairType, width: int) -> torch.Tensor:
        pair = torch.tensor([[[kind.code_of[kind.reach], kind.identifier]]], dtype=torch.uint8)
        return pairs.join(pair.expand(1, width // 2, 2), kind).clone()

    width = 28_672  # of the widest layers there are
    sums = kernel.integer_matmul(worst(a_kind, width), a_kind, worst(w_kind, width), w_kind)
    assert sums.item() == width // 2 * a_kind.reach * w_kind.reach
    four = a_kind.bits == w_kind.bits == 4
    if four and a_kind.signed:
        assert sums.item() < 2**31  # int32 alone would do
    # the kernel's own int32 sums are of tiles: of as many columns as keep this below 2**31
    tile = min(kernel.TILE, (2**31 - 1) // (a_kind.reach * w_kind.reach) * 2 // kernel.BLOCK * kernel.BLOCK)
    assert tile >= kernel.BLOCK
    assert tile // 2 * a_kind.reach * w_kind.reach < 2**31


@pytest.fixture(scope="module")
def pocket():
    """The tokenizer, calibration tokens, and sessions with their labels."""
    _, tokenizer = load("pocket-2m")
    tasks = ("kv", "vt", "many_shot", "needle", "arithmetic")
    some = [encode_session(session, tokenizer)[0] for task in tasks for session in make_sessions(task, 3, 300, 3, seed=77)]
    calibration = torch.tensor([ids[:160] for ids in some if len(ids) >= 160][:8])
    scored = [encode_session(session, tokenizer) for task in tasks for session in make_sessions(task, 2, 300, 3, seed=5)]
    return calibration, scored


def injected(factor: float, channels: int, adjacent: bool = False) -> nn.Module:
    """pocket-2m with ``channels`` channels of every norm's output ``factor`` times as large, in neighbours or anywhere."""
    return inject_input_outliers(load("pocket-2m")[0], factor, channels, adjacent=adjacent)


@torch.no_grad()
def accuracy(model: nn.Module, scored: list) -> float:
    """Answer tokens that are the likeliest after the true ones before them."""
    right = total = 0
    for ids, labels in scored:
        answer = torch.tensor(labels[1:]) >= 0
        predicted = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
        right += int((predicted == torch.tensor(ids[1:]))[answer].sum())
        total += int(answer.sum())
    return right / total


def test_acceptance_8_four_bits_survive_outlier_channels_that_stand_alone(pocket):
    calibration, scored = pocket
    full = accuracy(injected(20, 2), scored)
    assert full > 0.98
    plain = accuracy(Olive(**CLIPPED).compress(injected(20, 2), calibration), scored)
    paired = accuracy(Olive().compress(injected(20, 2), calibration), scored)
    assert (full - plain) >= 3 * (full - paired), (full, plain, paired)


def test_acceptance_8_without_outliers_both_are_about_equal(pocket):
    calibration, scored = pocket
    plain, paired = (
        accuracy(method.compress(load("pocket-2m")[0], calibration), scored) for method in (Olive(**CLIPPED), Olive())
    )
    assert abs(plain - paired) < 0.06


def test_acceptance_8_outlier_channels_side_by_side_are_where_it_fails(pocket):
    calibration, scored = pocket
    adjacent = accuracy(Olive().compress(injected(60, 8, adjacent=True), calibration), scored)
    spread = accuracy(Olive(pairing="spread").compress(injected(60, 8, adjacent=True), calibration), scored)
    assert adjacent < 0.2  # of 99 % with full precision
    assert spread > 0.5


# --- the official code ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.mark.parametrize("name", ["w", "a"])
@pytest.mark.parametrize("mode", ["int", "flint", "ant-int-flint", "8"])
def test_golden_search_and_values(golden, name, mode):
    with safe_open(GOLDEN, "pt") as file:
        chosen = file.metadata().get(f"{name}.{mode}", "int") + ("8" if mode == "8" else "4")
    x, signed = golden[name].float(), True if name == "w" else None
    bits, mode_ = (8, "int") if mode == "8" else (4, mode)
    packed = OVPTensor.pack(x, bits=bits, mode=mode_, per_row=name == "w", signed=signed, oo_policy="even")
    assert packed.kind.name == chosen
    assert torch.allclose(packed.alpha.flatten(), golden[f"{name}.{mode}.alpha"], rtol=2.5e-7, atol=0)  # they sum in float32
    assert torch.equal(packed.values(), golden[f"{name}.{mode}.values"])
    error = (packed.unpack() - x).square().mean()
    assert torch.allclose(error, golden[f"{name}.{mode}.mse"], rtol=1e-5)


@pytest.mark.parametrize(("mode", "bits"), [("int", 4), ("flint", 4), ("8", 8)])
def test_golden_values_at_a_given_alpha(golden, mode, bits):
    alpha = golden[f"fixed.{mode}.alpha"][0]
    packed = OVPTensor.pack(golden["w"].float(), bits=bits, mode="int" if bits == 8 else mode, alpha=alpha, oo_policy="even")
    assert packed.stats()["oo"] > 0
    assert torch.equal(packed.values(), golden[f"fixed.{mode}.values"])


def test_golden_layer(golden):
    linear = nn.Linear(48, 20)
    linear.weight.data, linear.bias.data = golden["layer.weight"].float(), golden["layer.bias"].float()
    ours = Olive(oo_policy="even").pack(linear, golden["layer.x"].float().flatten(0, -2))
    with safe_open(GOLDEN, "pt") as file:
        assert f"{ours.weight_type} {ours.input_type}".replace("4", "") == file.metadata()["layer"]
    for x, y in (("layer.x", "layer.y"), ("layer.later", "layer.later_y")):
        assert torch.allclose(ours(golden[x].float()), golden[y], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "kind"), [("int", PairType("int4", False)), ("8", PairType("int8", False))])
def test_golden_unsigned_values_but_the_one_that_leaves_no_identifier(golden, mode, kind):
    x, theirs = golden["relu"].float().flatten(0, -2), golden[f"relu.{mode}.values"].flatten(0, -2)
    scale = golden[f"relu.{mode}.alpha"] / (kind.top + 1)
    codes, *_ = pairs.encode(x, scale.expand(len(x)), kind, "even")
    ours = pairs.decode(codes, kind)
    last = ((x / scale) > kind.top + 0.5).unflatten(1, (-1, 2)).any(-1, keepdim=True).expand(-1, -1, 2).flatten(1)
    taken = last & ((x / scale) < kind.values[kind.top + 1]).logical_or(theirs == 0)  # pairs near the sixteenth level
    assert torch.equal(ours[~taken], theirs[~taken])
    assert (~taken).float().mean() > 0.95


def test_golden_fault_huge_values_saturate_here(golden):
    assert golden["huge.official"][0, 0] == golden["huge.official"][0, 2] == 0
    alpha = golden["huge.alpha"][0]
    ours = OVPTensor.pack(golden["huge.x"], mode="int", alpha=alpha, oo_policy="even").unpack()
    assert ours[0, 0] == -ours[0, 2] == alpha / 7 * 96
    assert ours[0, 4] == pytest.approx(golden["huge.official"][0, 4].item())


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, PairType("int4", True, False), PairType("flint4", False, False)], ids=str)
@pytest.mark.parametrize("policy", pairs.POLICIES)
def test_the_search_gives_the_error_of_every_scale(kind, policy, monkeypatch):
    x = planted(7, 90, share=0.05, seed=3)
    x = x if kind.signed else x.clamp(min=-0.2)
    scales = torch.rand(7, 25, generator=torch.Generator().manual_seed(1)) * (0.7 if kind.bits == 4 else 0.07)
    scales[0, 0] = 0
    tried = torch.stack([
        (pairs.decode(pairs.encode_reference(x, some, kind, policy)[0], kind) * some[:, None].double() - x).square().sum(-1)
        for some in scales.unbind(1)
    ], 1)  # fmt: skip
    assert torch.allclose(pairs.errors(x, scales, kind, policy), tried, rtol=1e-6)
    monkeypatch.setattr(pairs, "kernels", lambda: None)
    assert torch.allclose(pairs.errors(x, scales, kind, policy), tried, rtol=1e-6)


def test_the_search_takes_the_best_of_all_candidates_for_rows_and_for_tensors():
    x = planted(3, 101, share=0.03)
    ratios = Search().ratios
    assert len(ratios) == 88
    assert ratios[0] == 0.75
    assert ratios[-1] == pytest.approx(2.49)
    for kind in KINDS[:3:2]:
        for per_row in (True, False):
            found = pairs.find(x, kind, per_row)
            for row in range(3 if per_row else 1):
                one = x[row : row + 1] if per_row else x
                lost = searched(one, kind, ratios, "larger")
                wide = one.double()
                base = max(abs(wide.mean() + 3 * wide.std()), abs(wide.mean() - 3 * wide.std())).float()
                alpha = found.alpha[row] if per_row else found.alpha
                assert alpha == base * ratios[lost.index(min(lost))]
    types = [PairType("int4"), PairType("flint4")]
    best = min((pairs.find(x, kind, True) for kind in types), key=lambda one: one.error)
    chosen = pairs.choose(x, types, True)
    assert (chosen.kind, chosen.error) == (best.kind, best.error)


def test_victims_belong_into_the_search():
    # a search that does not see the victims takes a small scale, which makes ever more of them
    x = planted(1, 4000, share=0.1, low=4, high=12)
    kind = PairType("int4")
    alpha, blind, wide = pairs.find(x, kind, False).alpha, [], x.double()
    base = max(abs(wide.mean() + 3 * wide.std()), abs(wide.mean() - 3 * wide.std())).float()
    for ratio in Search().ratios:
        scale = base * ratio / kind.top
        blind.append(float((scanned((x / scale).clamp(-96, 96), kind) * scale - x).square().sum()))
    wrong = base * Search().ratios[blind.index(min(blind))]
    lost = [float((OVPTensor.pack(x, mode="int", alpha=one).unpack() - x).square().sum()) for one in (alpha, wrong)]
    assert lost[0] < 0.5 * lost[1]


def test_a_tensor_large_enough_for_several_pieces(monkeypatch):
    x = planted(40, 64, share=0.03)
    whole = {per_row: OVPTensor.pack(x, per_row=per_row) for per_row in (True, False)}
    monkeypatch.setattr(pairs, "BLOCK", 200)
    for per_row, packed in whole.items():
        again = OVPTensor.pack(x, per_row=per_row)
        assert torch.equal(again.codes, packed.codes)
        assert torch.equal(again.alpha, packed.alpha)
        assert torch.equal(pairs.encode_reference(x, torch.full((40,), 0.3), packed.kind)[0],
                           pairs.encode(x, torch.full((40,), 0.3), packed.kind)[0])  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_any_axis_can_be_the_one_of_pairs(axis):
    x = planted(6, 8, 10)
    packed = OVPTensor.pack(x, axis=axis)
    assert packed.unpack().shape == x.shape
    moved = OVPTensor.pack(x.movedim(axis, -1))
    assert torch.equal(packed.codes, moved.codes)
    assert torch.equal(packed.unpack(), moved.unpack().movedim(-1, axis))


def test_pairs_do_not_run_across_rows_of_odd_length():
    x = torch.full((3, 5), 0.1)
    x[1, 0] = 20
    packed = OVPTensor.pack(x, mode="int", alpha=torch.tensor(2.0), per_row=False)
    back = packed.unpack()
    assert back.shape == x.shape
    assert (back[0] == back[2]).all()
    assert back[1, 1] == 0
    assert (back[0, 4] != 0) == (back[1, 2] != 0)
    assert packed.codes.shape == (3, 3)


def test_rows_of_zeros_and_what_underflows_are_zeros():
    x = planted(4, 8)
    x[1], x[2] = 0, 1e-45
    packed = OVPTensor.pack(x)
    assert packed.alpha[1] == 0
    assert (packed.unpack()[1] == 0).all()
    assert packed.unpack().isfinite().all()
    huge = torch.full((2, 4), 3e38)
    assert OVPTensor.pack(huge).unpack().isfinite().all()
    assert OVPTensor.pack(torch.tensor([[5.0]])).unpack() == pytest.approx(5, rel=0.1)
    assert OVPTensor.pack(torch.tensor([1.0, -2.0])).unpack().shape == (2,)


def test_stats_count_pairs_and_saturation():
    x = torch.tensor([[1.0, 2.0, 30.0, 1.0, 30.0, -40.0, 200.0, 0.0]])
    packed = OVPTensor.pack(x, mode="int", alpha=torch.tensor(7.0))
    assert packed.stats() == {"nn": 1, "on": 2, "oo": 1, "saturated": 1}
    assert packed.unpack().tolist() == [[1, 2, 32, 0, 0, -32, 96, 0]]
    even = OVPTensor.pack(x, mode="int", alpha=torch.tensor(7.0), oo_policy="even")
    assert even.unpack().tolist() == [[1, 2, 32, 0, 32, 0, 96, 0]]
    below = OVPTensor.pack(torch.tensor([-3.0, 2.0]), mode="int", alpha=torch.tensor(14.0), signed=False)
    assert below.unpack().tolist() == [0, 2]
    assert below.stats()["saturated"] == 1


def test_a_larger_later_batch_saturates_at_96_sevenths_of_alpha():
    packed = OVPTensor.pack(torch.tensor([1e6, 0.0]), mode="int", alpha=torch.tensor(1.0), signed=True)
    assert packed.unpack()[0] == pytest.approx(96 / 7)


def test_outliers_have_their_own_error():
    x = planted(100_000, share=0.005)
    packed = OVPTensor.pack(x, mode="int")
    values = packed.values()
    relative, y = ((packed.unpack() - x) / x).abs(), x.abs() * 7 / packed.alpha
    assert relative[y >= 12].max() <= 0.2001  # two magnitudes an octave: 4 / 20 between 16 and 24
    assert relative[values.abs() > 7].max() <= 2.5 / 9.5 + 1e-4  # below the first outlier
    assert relative[values.abs() > 7].mean() < 0.1


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(2, 3), {"pad": False}, "rows of 3 values cannot be paired"),
        (torch.ones(2, 4), {"bits": 5}, "bits must be 4 or 8, got 5"),
        (torch.ones(2, 4), {"mode": "float"}, "mode must be one of ant-int-flint, int, flint, got 'float'"),
        (torch.ones(2, 4), {"oo_policy": "odd"}, "oo_policy must be one of larger, even, got 'odd'"),
        (torch.tensor([1.0, torch.nan]), {}, "inf or nan"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), {}, "inf or nan"),
        (torch.ones(0, 4), {}, "nothing to pack"),
        (torch.tensor(1.0), {}, "nothing to pack"),
        (torch.ones(2, 4), {"alpha": torch.ones(2)}, "belongs to one type"),
        (torch.ones(2, 4), {"alpha": torch.ones(3), "mode": "int"}, r"alpha must have shape \[2\] or \[\]"),
        (torch.ones(2, 4), {"alpha": torch.tensor(-1.0), "mode": "int"}, "alpha must be finite and not negative"),
    ],
)
def test_bad_tensors_are_refused_with_a_reason(x, options, message):
    with pytest.raises(ValueError, match=message):
        OVPTensor.pack(x, **options)
    with pytest.raises(ValueError, match="type must be one of"):
        PairType("int5")
    with pytest.raises(ValueError, match="0 < low < up"):
        Search(80, 80)


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instruction", [("", 0), ("llvm.x86.ssse3.pshuf.b.128", 16)])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.bits == 4], ids=str)
def test_decoding_without_the_processors_widest_shuffle(instruction, kind, monkeypatch):
    if instruction[0] and not kernel._has("ssse3"):
        pytest.skip("another processor")
    monkeypatch.setattr(kernel, "_shuffle_instruction", lambda: instruction)
    monkeypatch.setattr(kernel, "compiled", njit)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    out = torch.empty(2, 512, dtype=torch.int16)
    kernel._decoder.__wrapped__(kernel._number(kind))(codes.numpy(), out.numpy())
    wanted = kernel._reorder(pairs.decode(codes, kind), kernel._order(kind))
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_threads_and_many_inputs_give_the_same_products(kind):
    draw = torch.Generator().manual_seed(0)
    w = torch.randint(0, 256, (37, 300), generator=draw, dtype=torch.uint8)
    a = torch.randint(0, 256, (71, 300), generator=draw, dtype=torch.uint8)
    exact = pairs.decode(a, kind).long() @ pairs.decode(w, kind).long().T
    x = torch.randn(5, 600 * 4 // kind.bits, generator=draw)
    threads, floats = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel.integer_matmul(a, kind, w, kind), exact)
            floats.append(kernel.float_matmul(x, w, kind))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(floats[0], floats[1])
    assert torch.equal(floats[0], floats[2])


# --- the layer and the method -----------------------------------------------------------------------------------------


def layer_of(
    method: Olive, rows: int = 40, columns: int = 30, bias: bool = True, seed: int = 0
) -> tuple[OVPLinear, torch.Tensor]:
    torch.manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias)
    linear.weight.data = planted(rows, columns, share=0.03, seed=seed) * 0.1
    x = planted(24, columns, share=0.03, seed=seed + 1)
    return method.pack(linear, x if method.a_bits else None), x


@pytest.mark.parametrize("pairing", ["adjacent", "halves", "spread"])
@pytest.mark.parametrize("columns", [30, 31, 64])
@pytest.mark.parametrize(
    "method", [Olive(), Olive(8, 8), Olive(4, 8), Olive(8, 4), Olive(4, None), Olive(**CLIPPED)], ids=str
)
def test_a_layer_computes_with_its_weight_and_quantised_input(method, columns, pairing, monkeypatch):
    layer, x = layer_of(replace(method, pairing=pairing), columns=columns)
    weight, bias = layer.weight(torch.float64), layer.bias.double()
    fed = x
    if layer.input_kind:
        order = layer.channels if layer.channels is not None else torch.arange(columns)
        stored = OVPTensor.pack(
            x[:, order], bits=method.a_bits, mode=layer.input_type.rstrip("48"), alpha=layer.input_alpha[0],
            signed=layer.input_signed, outliers=method.outliers,
        )  # fmt: skip
        fed = stored.unpack()[:, order.argsort()]
    wanted = F.linear(fed.double(), weight, bias)
    got = layer(x)
    assert torch.allclose(got.double(), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(layer(x.reshape(2, 12, columns)), got.reshape(2, 12, -1))
    monkeypatch.setattr("broadsheet.methods.weights.olive.kernels", lambda: None)
    monkeypatch.setattr(pairs, "kernels", lambda: None)
    assert torch.allclose(layer(x), got, atol=1e-5, rtol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_weights_alone_pass_gradients_to_their_input():
    layer, x = layer_of(Olive(a_bits=None))
    x = x.requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight().sum(0).expand_as(x), atol=1e-5)
    assert not layer_of(Olive())[0](x).requires_grad


def test_saturation_of_later_inputs_is_counted_and_bad_ones_are_refused():
    layer, x = layer_of(Olive(mode="int"))
    model = nn.Sequential(layer)
    assert saturation(model) == {}
    model(x)
    assert saturation(model) == {"0": 0.0}
    model(x * 1000)
    assert 0.4 < saturation(model)["0"] <= 0.5
    with pytest.raises(ValueError, match="input holds inf or nan"):
        model(x * torch.nan)


def test_an_input_without_negative_values_is_unsigned():
    linear = nn.Linear(16, 4)
    x = planted(50, 16).relu()
    layer = Olive().pack(linear, x)
    assert layer.input_signed is False
    assert Olive().pack(linear, x - 1).input_signed is True


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "neox", "opt"])
@pytest.mark.parametrize(
    "method",
    [
        Olive(),
        Olive(8, 8),
        Olive(a_bits=None),
        Olive(layer_8bit_n=3, pairing="spread"),
        Olive(pairing="halves", outliers=False),
    ],
    ids=str,
)
def test_a_model_is_saved_and_loaded_to_the_bit(kind, method, tmp_path):
    ids = random_ids(4, 16)
    model = method.compress(tiny(kind, num_hidden_layers=2), ids)
    save(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(again(ids).logits, model(ids).logits)
    packed = [module for module in again.modules() if isinstance(module, OVPLinear)]
    assert len(packed) == len(shapes(model))
    assert size(again) == size(model)


def test_sizes_are_those_of_the_codes_and_budgets_are_met():
    model = tiny("gqa", hidden_size=128, intermediate_size=256)
    layers = shapes(model)
    for bits in (4.5, 5.5, 8.5):
        method = Olive().at_budget(bits, layers)
        compressed = method.compress(tiny("gqa", hidden_size=128, intermediate_size=256), random_ids(2, 12))
        assert size(compressed).bits <= bits
    assert Olive().at_budget(4.5, layers) == Olive()
    assert 0 < Olive().at_budget(5.5, layers).layer_8bit_n < len(layers)
    assert Olive().at_budget(9, layers) == Olive(8, 8)
    assert Olive(a_bits=None).at_budget(9, layers) == Olive(8, None)
    with pytest.raises(Unreachable, match=r"4\.22 bits"):
        Olive().at_budget(4, layers)


def test_the_layers_of_largest_error_and_the_last_two_go_to_eight_bits():
    ids = random_ids(4, 16)
    errors = Olive().errors(tiny("gqa"), ids)
    *others, _, _ = errors  # in the order of the model
    worst = sorted(others, key=lambda name: -errors[name])[:2]
    compressed = Olive(layer_8bit_n=4, layer_8bit_l=("model.layers.0.self_attn.k_proj",)).compress(tiny("gqa"), ids)
    layers = {name: module for name, module in compressed.named_modules() if isinstance(module, OVPLinear)}
    wide = {name for name, module in layers.items() if module.weight_type == "int8"}
    last = {"model.layers.2.mlp.up_proj", "model.layers.2.mlp.down_proj"}
    assert wide == last | set(worst) | {"model.layers.0.self_attn.k_proj"}
    assert wide == {name for name, module in layers.items() if module.input_type == "int8"}


def test_layers_are_calibrated_in_order_on_the_first_batch_alone():
    ids = random_ids(12, 16)
    model = Olive().compress(tiny("gqa"), ids)
    again = Olive().compress(tiny("gqa"), ids[:8])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), again.buffers()))
    # the second layer of an MLP is calibrated on what the compressed first ones give
    seen = []
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids[:8])
    types = pairs.kinds(4, "ant-int-flint", True)
    assert down.input_alpha == pairs.choose(seen[0].flatten(0, 1), types, False).alpha


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 3}, "w_bits must be 4 or 8, got 3"),
        ({"a_bits": 16}, "a_bits must be 4 or 8, got 16"),
        ({"w_bits": None}, "w_bits must be 4 or 8, got None"),
        ({"mode": "ant"}, "mode must be one of"),
        ({"oo_policy": "both"}, "oo_policy must be one of"),
        ({"pairing": "far"}, "pairing must be one of adjacent, halves, spread, got 'far'"),
        ({"a_low": 300}, "0 < low < up"),
        ({"layer_8bit_n": -1}, "layer_8bit_n must be at least 0"),
    ],
)
def test_bad_parameters_are_refused_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        Olive(**options)


def test_models_and_calibration_that_do_not_fit_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="Olive needs calibration"):
        Olive().compress(tiny("gqa"))
    with pytest.raises(ValueError, match="layer_8bit_n needs calibration"):
        Olive(a_bits=None, layer_8bit_n=2).compress(tiny("gqa"))
    with pytest.raises(ValueError, match="more than the model's 21 linear layers"):
        Olive(layer_8bit_n=22).compress(tiny("gqa"), random_ids(2, 8))
    with pytest.raises(ValueError, match="token ids of shape"):
        Olive().compress(tiny("gqa"), random_ids(0, 8))
    broken = tiny("gqa")
    broken.model.embed_tokens.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: its input holds inf or nan"):
        Olive().compress(broken, random_ids(2, 8))
