"""BitStack: blocks, order, file and layers against the paper's numbers and the authors' code; models at every size."""

import copy
import gc
import json
import math
import random
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import SHARED, needs_stories, random_ids, tiny
from transformers import AutoModelForCausalLM

from broadsheet.core.microworld.train import RECIPES, Stage, answer_loss, make_batch
from broadsheet.core.models import folds, load
from broadsheet.core.models.walker import blocks as decoder_blocks
from broadsheet.methods.weights.base import Unreachable, shapes, size
from broadsheet.methods.weights.bitstack import BitStack, BitStackLinear, set_size, size_table
from broadsheet.methods.weights.bitstack import scores as scores_module
from broadsheet.methods.weights.bitstack.decompose import (
    auto_rank,
    compose,
    decompose,
    layout_of,
    pack_signs,
    truncated_svd,
    unpack_signs,
)
from broadsheet.methods.weights.bitstack.kernel import covers, forward
from broadsheet.methods.weights.bitstack.layer import base_bytes, bitstack_layers, stack_of
from broadsheet.methods.weights.bitstack.order import counts_at, error_scores, prefix_bytes, stack_order, whole_order
from broadsheet.methods.weights.bitstack.scale import apply_scales, find_scales
from broadsheet.methods.weights.bitstack.stack import INDEX_FILE, STACK_FILE, Index, Stack
from broadsheet.methods.weights.quantiser import save

GOLDEN = Path(__file__).parents[2] / "golden" / "bitstack_official.safetensors"
NAN = float("nan")


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def relative(errors: list[float]) -> list[float]:
    """Relative Frobenius errors after 1, 2, ... blocks."""
    return [math.sqrt(error / errors[0]) for error in errors[1:]]


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        notes = {name: json.loads(file.metadata()[name]) for name in ("sizes", "orders", "scores")}
    return tensors, notes


# --- blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns", "mib"), [(4096, 4096, 2.25), (11008, 4096, 5.84), (14336, 4096, 7.56), (1024, 4096, 0.66)]
)
def test_acceptance_1_block_bytes(golden, rows, columns, mib):
    layout = layout_of(rows, columns, 16)
    assert layout.nbytes == math.ceil(rows * columns / 8) + 2 * 16 * (rows + columns)
    assert layout.nbytes == golden[1]["sizes"][f"{rows}x{columns}"]
    assert abs(layout.nbytes / 2**20 - mib) <= 0.01


@pytest.mark.parametrize(("rows", "columns", "k"), [(7, 5, 2), (48, 40, 3), (31, 33, 1)])
def test_a_block_holds_the_bytes_that_its_layout_says(rows, columns, k):
    layout = layout_of(rows, columns, k)
    blocks, _ = decompose(gaussian(rows, columns), layout, 2)
    assert all(block.dtype == torch.uint8 and block.untyped_storage().nbytes() == layout.nbytes for block in blocks)
    assert layout.nbytes == math.ceil(rows * columns / 8) + 2 * k * (rows + columns)
    plain = layout_of(rows, columns, k, signed=False)
    assert plain.nbytes <= layout.nbytes < plain.nbytes + 2 * (rows + columns) + 1


def test_auto_rank_is_the_largest_within_a_quarter_of_a_bit():
    for rows, columns in ((256, 256), (384, 256), (4096, 4096), (1024, 4096)):
        k = auto_rank(rows, columns)
        assert layout_of(rows, columns, k).bits <= 1.25 < layout_of(rows, columns, k + 1).bits
    assert auto_rank(16, 16) == 1
    assert layout_of(256, 256, "auto").rank == 2


def test_acceptance_3_signs_pack_and_unpack():
    draw = torch.Generator().manual_seed(0)
    for size_ in range(1, 1026):
        positive = torch.rand(size_, generator=draw) < 0.5
        packed = pack_signs(positive)
        assert packed.numel() == -(-size_ // 8)
        assert torch.equal(unpack_signs(packed, positive.shape), positive.float() * 2 - 1)
        assert packed.numpy().tobytes() == np.packbits(positive.numpy()).tobytes()
    assert pack_signs(torch.tensor([True] + 8 * [False])).tolist() == [128, 0]


def test_signs_pack_as_in_the_official_code(golden):
    tensors, _ = golden
    assert torch.equal(pack_signs(tensors["signs37"] > 0), tensors["signs37.packed"])


def test_acceptance_4_residuals_shrink():
    _, errors = decompose(gaussian(512, 512), layout_of(512, 512, 16), 4)
    assert relative(errors) == pytest.approx([0.57, 0.32, 0.20, 0.13], abs=0.01)
    _, errors = decompose(gaussian(64, 96) * torch.logspace(-3, 3, 96), layout_of(64, 96, 2), 16)
    assert all(after <= before for before, after in pairwise(errors))


def test_errors_of_gaussian_weights_are_those_of_the_specification():
    weight = gaussian(256, 256)
    layout = layout_of(256, 256, 1)
    assert layout.bits == 1.125
    _, errors = decompose(weight, layout, 4)
    assert relative(errors) == pytest.approx([0.60, 0.36, 0.24, 0.18], abs=0.01)
    signed, plain = layout_of(256, 256, 4), layout_of(256, 256, 4, signed=False)
    assert signed.bits == plain.bits == 1.5
    _, errors = decompose(weight, signed, 4)
    assert relative(errors) == pytest.approx([0.59, 0.34, 0.22, 0.16], abs=0.01)
    _, errors = decompose(weight, plain, 4)
    assert relative(errors) == pytest.approx([0.92, 0.84, 0.77, 0.70], abs=0.01)


def aligned(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """``ours`` with the sign of every pair of singular vectors as in ``theirs``."""
    flip = (ours[0].float() * theirs[0].float()).sum(0).sign()
    return ours[0].float() * flip, ours[1].float() * flip.unsqueeze(1)


@pytest.mark.parametrize(("case", "k", "n_iter", "signed"), [("k1", 1, 6, True), ("k4", 4, 4, True), ("svd", 1, 3, False)])
def test_acceptance_5_blocks_are_those_of_the_official_code(golden, case, k, n_iter, signed):
    tensors, _ = golden
    weight = tensors["w"].float()
    layout = layout_of(*weight.shape, k, signed)
    blocks, _ = decompose(weight, layout, n_iter, parity="official")
    residual = weight.double()
    for i, block in enumerate(blocks):
        a, b, signs = layout.split(block)
        theirs = tensors[f"{case}.u{i}"], tensors[f"{case}.vt{i}"]
        assert a.shape == theirs[0].shape
        values = torch.linalg.svdvals(residual.abs() if signed else residual)
        # Singular vectors are known to eps |R| / gap: libraries differ by that. 8 roundings before, and one to float16.
        gaps = torch.minimum(values.diff().abs(), torch.cat([torch.tensor([torch.inf]), values.diff().abs()[:-1]]))[:k]
        vague = (8 * 2**-24 * values[0] / gaps * values[:k].sqrt()).float()
        for mine, wanted, unsure in zip(aligned((a, b), theirs), theirs, (vague, vague[:, None])):
            assert ((mine - wanted.float()).abs() <= 2**-10 * wanted.float().abs() + 1e-5 + unsure).all()
            assert vague.max() < 1e-3
        if signed:
            assert torch.equal(signs, tensors[f"{case}.signs{i}"])
        residual = residual - compose([block], layout).double()
    assert (compose(blocks, layout) - tensors[f"{case}.w"].float()).abs().max() < 1e-3


@pytest.mark.parametrize(("rows", "columns", "k"), [(40, 56, 3), (64, 64, 16), (96, 64, 8)])
def test_acceptance_5_blocks_are_those_of_an_independent_svd(rows, columns, k):
    weight, layout = gaussian(rows, columns), layout_of(rows, columns, k)
    blocks, _ = decompose(weight, layout, 3, parity="official")
    residual = weight.double().numpy()
    for block in blocks:
        u, sigma, vt = np.linalg.svd(np.abs(residual), full_matrices=False)
        wanted = torch.from_numpy(u[:, :k] * np.sqrt(sigma[:k])), torch.from_numpy(np.sqrt(sigma[:k])[:, None] * vt[:k])
        a, b, signs = layout.split(block)
        for mine, true in zip(aligned((a, b), wanted), wanted):
            assert (mine - true).abs().max() < 2**-10 * true.abs().max()
        assert np.array_equal(unpack_signs(signs, (rows, columns)).numpy(), np.where(residual < 0, -1, 1))
        residual = residual - np.where(residual < 0, -1, 1) * (wanted[0] @ wanted[1]).numpy()


def test_taking_up_the_rounding_of_the_factors_is_better_on_gaussian_weights():
    for seed in range(3):
        weight, layout = gaussian(128, 96, seed), layout_of(128, 96, 16)
        ours, errors = decompose(weight, layout, 8)
        theirs, _ = decompose(weight, layout, 8, parity="official")
        assert math.sqrt(errors[-1]) == pytest.approx(float((weight - compose(ours, layout)).norm()), rel=1e-4)
        assert (weight - compose(ours, layout)).norm() < (weight - compose(theirs, layout)).norm()


def test_few_singular_vectors_are_found_as_by_the_full_decomposition():
    matrix = gaussian(160, 96).abs()
    fast, u = truncated_svd(matrix, 12), torch.linalg.svd(matrix)
    best = (u.U[:, :12] * u.S[:12]) @ u.Vh[:12]
    assert (fast[0] @ fast[1] - best).norm() < 1e-5 * best.norm()
    assert all(torch.equal(one, two) for one, two in zip(fast, truncated_svd(matrix, 12)))
    assert torch.equal(truncated_svd(torch.zeros(96, 96), 2)[0], torch.zeros(96, 2))


@pytest.mark.parametrize("weight", [torch.zeros(16, 24), torch.eye(16, 24), torch.ones(16, 24)])
def test_singular_weights_decompose(weight):
    layout = layout_of(16, 24, 1)
    blocks, errors = decompose(weight, layout, 3)
    assert torch.isfinite(compose(blocks, layout)).all()
    assert errors[-1] <= errors[0]


def test_weights_that_cannot_be_decomposed_are_refused():
    layout = layout_of(8, 8, 1)
    with pytest.raises(ValueError, match="infinite or NaN"):
        decompose(torch.full((8, 8), math.inf), layout, 1)
    with pytest.raises(ValueError, match="exceed float16"):
        decompose(torch.full((8, 8), 1e12), layout, 1)
    with pytest.raises(ValueError, match=r"no blocks of 8 x 8"):
        decompose(torch.zeros(8, 9), layout, 1)
    for k in (9, 0):
        with pytest.raises(ValueError, match=r"choose k from 1 to 8"):
            layout_of(8, 20, k)


# --- the order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "nan"])
def test_order_and_sizes_are_those_of_the_official_code(golden, case):
    _, notes = golden
    scores = [[NAN if score is None else score for score in row] for row in notes["scores"][case]]
    order = stack_order(scores)
    assert [layer for layer, _ in order] == notes["orders"][case]
    sizes = prefix_bytes(whole_order(order, 4), [10, 11, 12, 13])
    base = 1000 - sum((10, 11, 12, 13))
    assert [base + size_ for size_ in sizes[4:]] == notes["orders"][case + "_bytes"]


def test_a_nan_comes_after_the_finite_scores_of_its_level(golden):
    # The official maximum of a level that begins with a NaN is that NaN, counted as 0: the broken layer may come first.
    scores = [[NAN, 7.0, 3.0, 2.0], [5.0, 6.0, 2.0, 4.0]]
    assert [layer for layer, _ in stack_order(scores)][:4] == [3, 2, 1, 0]
    assert golden[1]["orders"]["nan_first"][:4] == [3, 2, 0, 1]
    order = stack_order([[NAN, NAN, 1.0], [NAN, 9.0, math.inf], [4.0, 4.0, 4.0]])
    assert "".join(str(layer) for layer, _ in order) == "210" + "102" + "012"
    with pytest.raises(ValueError, match="last level is NaN"):
        stack_order([[1.0, 2.0], [NAN, 1.0]])


def test_ties_go_to_the_earlier_layer():
    assert stack_order([[1.0] * 5, [2.0, 1.0, 2.0, 1.0, 1.0]]) == [
        *((layer, 1) for layer in range(5)),
        *((layer, 2) for layer in (1, 3, 4, 0, 2)),
    ]


@given(st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_counts_never_differ_by_more_than_one(layers, levels, draw):
    order = stack_order([[draw.choice([draw.random(), 0.5, math.inf]) for _ in range(layers)] for _ in range(levels)])
    whole = whole_order(order, layers)
    for position in range(layers, len(whole) + 1):
        counts = counts_at(whole, layers, position)
        assert sum(counts) == position
        assert max(counts) - min(counts) <= 1


def test_orders_that_are_none_are_refused():
    with pytest.raises(ValueError, match="names layer 2; there are 2"):
        whole_order([(0, 1), (2, 1)], 2)
    with pytest.raises(ValueError, match="block 2 of layer 0 where 1 is due"):
        whole_order([(0, 2), (1, 1)], 2)
    with pytest.raises(ValueError, match="some layers 1 blocks and some 2"):
        whole_order([(0, 1)], 2)


def test_error_scores_are_shares_by_byte():
    scores = error_scores([[8.0, 4.0, 2.0, 1.0], [800.0, 500.0, 100.0, 50.0]], [10, 20])
    assert scores == pytest.approx(np.array([[-0.25 / 10, -0.5 / 20], [-0.125 / 10, -0.0625 / 20]]))


# --- the file -----------------------------------------------------------------------------------------------


def small_stack(folder: Path, n_iter: int = 3) -> tuple[Stack, list[list[torch.Tensor]]]:
    layouts = (layout_of(16, 24, 1), layout_of(7, 5, 2))
    blocks = [decompose(gaussian(layout.rows, layout.columns), layout, n_iter)[0] for layout in layouts]
    order = stack_order([[2.0, 1.0], [1.0, 2.0]])
    index = Index(("a.q", "a.k"), layouts, n_iter, order, loaded=(n_iter, n_iter))
    return Stack.write(index, blocks, folder), blocks


def test_a_prefix_of_the_order_is_the_beginning_of_the_file(tmp_path):
    _, blocks = small_stack(tmp_path)
    stack = Stack.open(tmp_path)
    assert stack.index.whole == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2)]
    data = (tmp_path / STACK_FILE).read_bytes()
    flat = b"".join(blocks[layer][block].numpy().tobytes() for layer, block in stack.index.whole)
    assert data.endswith(flat)
    for (layer, block), read in stack.read(stack.index.whole[1:4]):
        assert torch.equal(read, blocks[layer][block])
    assert stack.bytes_read == sum(blocks[layer][block].numel() for layer, block in stack.index.whole[1:4])
    with safe_open(tmp_path / STACK_FILE, "pt") as file:  # and any reader of the format finds the blocks
        assert torch.equal(file.get_tensor("a.k.block1"), blocks[1][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [STACK_FILE, INDEX_FILE]


def read_all(folder: Path) -> None:
    stack = Stack.open(folder)
    for _ in stack.read(stack.index.whole):
        pass


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_truncated_or_flipped_file_is_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("stack")
    small_stack(folder)
    name = data.draw(st.sampled_from([STACK_FILE, INDEX_FILE]))
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_all(folder)
    assert "\n" not in str(caught.value)
    assert "again" in str(caught.value)
    shutil.rmtree(folder)


def test_missing_and_grown_files_are_errors(tmp_path):
    small_stack(tmp_path)
    with open(tmp_path / STACK_FILE, "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="bytes where"):
        Stack.open(tmp_path)
    stack, _ = small_stack(tmp_path)
    (tmp_path / STACK_FILE).unlink()
    with pytest.raises(ValueError, match="was the folder moved"):
        list(stack.read([(0, 0)]))
    with pytest.raises(ValueError, match=f"has no {STACK_FILE}"):
        Stack.open(tmp_path)
    with pytest.raises(ValueError, match=f"has no {INDEX_FILE}"):
        Stack.open(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_files(tmp_path):
    stack, blocks = small_stack(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = [[*blocks[0][:2], None], blocks[1]]
    with pytest.raises(AttributeError):
        Stack.write(stack.index, broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- layers -------------------------------------------------------------------------------------------------


def layer_of(rows: int, columns: int, k: int, n_iter: int, bias: bool = False, seed: int = 0) -> BitStackLinear:
    layout = layout_of(rows, columns, k)
    blocks, _ = decompose(gaussian(rows, columns, seed), layout, n_iter)
    tensors = {f"block{i}": block for i, block in enumerate(blocks)}
    if bias:
        tensors["bias"] = gaussian(1, rows, seed + 1)[0]
    return BitStackLinear(tensors, columns, rows, k, True, n_iter)


@given(
    st.integers(1, 300), st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 1 << 30)
)
@settings(max_examples=25, deadline=None)
def test_the_kernel_agrees_with_float64_within_the_rounding_of_float32(rows, eighths, k, n_iter, tokens, seed):
    columns = 8 * eighths
    layout = layout_of(rows, columns, min(k, rows))
    draw = torch.Generator().manual_seed(seed)
    blocks = [
        layout.join(
            torch.randn(rows, layout.rank, generator=draw).half(),
            torch.randn(layout.rank, columns, generator=draw).half(),
            torch.randint(0, 256, (rows * columns // 8,), generator=draw, dtype=torch.uint8),
        )
        for _ in range(n_iter)
    ]
    x = torch.randn(2, tokens, columns, generator=draw)
    assert covers(x, layout)
    exact, bound = torch.zeros(rows, columns).double(), torch.zeros(rows, columns).double()
    for block in blocks:
        a, b, signs = layout.split(block)
        exact += (a.double() @ b.double()) * unpack_signs(signs, (rows, columns))
        bound += a.double().abs() @ b.double().abs()
    # every product is rounded, and so is every one of the sums over ranks, blocks and columns (Higham, section 3.1)
    steps = layout.rank + n_iter + columns + 1
    gamma = steps * 2.0**-24 / (1 - steps * 2.0**-24)
    off = (forward(x, blocks, layout).double() - x.double() @ exact.T).abs()
    assert bool((off <= gamma * (x.double().abs() @ bound.T)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 48), (33, 20), (300, 24)])
@torch.no_grad()
def test_a_layer_is_its_weight(dtype, shape):
    layer, x = layer_of(*shape, 2, 4, bias=True), gaussian(5, shape[1]).to(dtype)
    wanted = F.linear(x.float(), layer.weight(), layer.bias)
    assert layer(x).dtype == dtype
    assert torch.allclose(layer(x).float(), wanted, rtol=torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
    assert layer(x.view(1, 5, -1)).shape == (1, 5, shape[0])


def test_gradients_flow_to_the_input():
    layer, x = layer_of(16, 24, 1, 2), gaussian(3, 24).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight().sum(0).expand(3, -1), atol=1e-5)


def test_blocks_that_are_dropped_are_freed_and_casting_leaves_them_alone(tmp_path):
    stack, blocks = small_stack(tmp_path)
    layer = BitStackLinear({f"block{i}": b.clone() for i, b in enumerate(blocks[0])}, 24, 16, 1, True, 3)
    layer.attach(stack, 0)
    assert layer.n_loaded == 3
    assert layer.memory_bytes() == 3 * stack.index.layouts[0].nbytes
    assert not layer.state_dict()
    gone = weakref.ref(layer.block2)
    layer.set_blocks(1)
    gc.collect()
    assert gone() is None
    assert (layer.n_loaded, layer.memory_bytes()) == (1, stack.index.layouts[0].nbytes)
    layer.half().set_blocks(3)
    assert all(torch.equal(one, two) for one, two in zip(layer.blocks, blocks[0], strict=True))
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"1 to 3 blocks, not {count}"):
            layer.set_blocks(count)
    alone = BitStackLinear({"block0": blocks[0][0]}, 24, 16, 1, True, 3)
    with pytest.raises(ValueError, match="no stack"):
        alone.set_blocks(2)
    with pytest.raises(ValueError, match="different models"):
        alone.attach(stack, 1)


# --- models -------------------------------------------------------------------------------------------------

QUICK = BitStack(n_iter=4, k="auto", sort="error")


def compressed(kind: str = "gqa", method: BitStack = QUICK, seed: int = 0):
    return method.compress(tiny(kind, seed), random_ids(6, 24))


@torch.no_grad()
def logits(model, ids=None):
    return model(random_ids(2, 9) if ids is None else ids).logits


@pytest.mark.parametrize("kind", ["gqa", "mha", "mqa", "qwen2", "qwen3", "neox", "opt"])
def test_acceptance_2_scaling_preserves_the_function(kind):
    model, ids = tiny(kind), random_ids(6, 24)
    before = logits(model)
    found = find_scales(model, ids)
    assert torch.equal(logits(model), before)  # nothing was changed yet
    for block in decoder_blocks(model):
        apply_scales(block, found[block.index])
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    scaled = {name for scales in found for fold, _ in scales for name in fold.readers}
    out = "model.layers.0.self_attn.o_proj"
    assert (out in scaled) == (kind == "mha")
    if kind in ("gqa", "mha"):
        groups = [[name.rsplit(".", 1)[-1] for name in fold.readers] for fold, _ in found[0]]
        assert groups[:2] == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def test_scales_are_the_mean_norms_of_the_inputs():
    model, ids = tiny("gqa"), random_ids(6, 24)
    seen = []
    model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = find_scales(model, ids)
    seen.clear()
    logits(model, ids)
    (factor,) = [factor for fold, factor in found[1] if fold.readers[0].endswith("gate_proj")]
    assert torch.allclose(factor, seen[0].norm(dim=1).mean(0) + 1e-3, rtol=1e-5)


@torch.no_grad()
def test_scaling_rounds_no_gain_of_a_16_bit_model():
    """In 16 bits a gain divided by its scale is rounded; the readers take up the rounding. What would vanish stays."""
    model, ids = tiny("gqa").half(), random_ids(6, 24)
    gains = model.model.layers[0].input_layernorm.weight
    gains[3], gains[5] = 1e-6, 0
    reference = copy.deepcopy(model).float()
    scales = find_scales(model, ids)
    fold, factor = scales[0][0]
    factor[3] = 1e4
    for block in decoder_blocks(model):
        for linear in block.linears.values():
            linear.weight.data = linear.weight.data.float()
        apply_scales(block, scales[block.index])
    assert fold.producer.endswith("layers.0.input_layernorm")
    assert gains[3] == torch.tensor(1e-6).half()
    assert gains[5] == 0
    assert not torch.allclose(gains[6:], torch.ones(58).half())
    wanted = logits(reference)
    assert (logits(model.float()) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_fold_that_changes_the_function_is_an_error(monkeypatch):
    def wrong(block):  # the gate goes through an activation
        return [folds.Fold(f"{block.name}.mlp.gate_proj", (f"{block.name}.mlp.down_proj",))]

    monkeypatch.setattr(folds, "linear_folds", wrong)
    with pytest.raises(ValueError, match=r"scaling changes what model\.layers\.0 computes .* scale=False"):
        find_scales(tiny("mha"), random_ids(6, 24))


def test_acceptance_6_every_budget_is_met_and_used():
    model = compressed()
    table = [step.bytes for step in size_table(model)]
    layers = bitstack_layers(model)
    assert len(table) == 1 + len(layers) * 3
    for budget in range(table[0], table[-1] + 20_000, 1_777):
        set_size(model, budget)
        held = size(model).bytes
        assert held <= budget
        position = table.index(held)
        assert position + 1 == len(table) or table[position + 1] > budget
        counts = [layer.n_loaded for layer in layers]
        assert max(counts) - min(counts) <= 1
        assert held == base_bytes(model) + sum(layer.memory_bytes() for layer in layers)


def bytes_read_by_this_process() -> int | None:
    path = Path("/proc/self/io")
    return int(path.read_text().split()[1]) if path.is_file() else None


def test_acceptance_7_a_change_of_size_is_a_fresh_load_and_reads_just_its_blocks(tmp_path):
    model = compressed()
    save(model, tmp_path / "small")
    table = [step.bytes for step in size_table(model)]
    moving = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    stack = stack_of(bitstack_layers(moving))
    draw, previous = random.Random(0), len(table) - 1
    for target in [0, len(table) - 1, *(draw.randrange(len(table)) for _ in range(6))]:
        read, system = stack.bytes_read, bytes_read_by_this_process()
        moved = set_size(moving, table[target])
        between = abs(table[target] - table[previous])
        assert moved == {"moved_bytes": between, "blocks": abs(target - previous)}
        assert stack.bytes_read - read == (between if target > previous else 0)
        if system is not None:
            assert 0 <= bytes_read_by_this_process() - system - (stack.bytes_read - read) < 1024  # its own report
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        set_size(fresh, table[target])
        assert torch.equal(logits(moving), logits(fresh))
        previous = target
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "small", max_memory_mb=table[previous] / 2**20)
    assert stack_of(bitstack_layers(direct)).bytes_read == table[previous] - base_bytes(direct)
    assert torch.equal(logits(direct), logits(moving))


def test_acceptance_9_a_byte_too_few_names_the_minimum(tmp_path):
    model = compressed()
    least = size_table(model)[0].bytes
    before = logits(model)
    with pytest.raises(ValueError, match=f"the least is {least}"):
        set_size(model, least - 1)
    assert torch.equal(logits(model), before)
    set_size(model, least)
    assert size(model).bytes == least
    save(model, tmp_path / "small")
    with pytest.raises(ValueError, match=f"the least is {least}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", max_memory_mb=(least - 1) / 2**20)


@pytest.mark.parametrize("kind", ["gqa", "mha", "qwen2", "qwen3", "neox", "opt"])
def test_a_folder_loads_at_the_size_it_was_saved_at(kind, tmp_path):
    model = compressed(kind)
    table = [step.bytes for step in size_table(model)]
    set_size(model, table[5])
    save(model, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert size(again).bytes == table[5]
    assert torch.equal(logits(again), logits(model))
    names = sorted(path.name for path in (tmp_path / "small").iterdir())
    assert {STACK_FILE, INDEX_FILE, "model.safetensors"} <= set(names)
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < base_bytes(model) + 20_000
    set_size(again, table[-1])
    set_size(model, table[-1])
    assert torch.equal(logits(again), logits(model))
    shutil.rmtree(tmp_path / "small")
    set_size(again, table[5])  # dropping needs no file
    with pytest.raises(ValueError, match="was the folder moved"):
        set_size(again, table[6])
    assert size(again).bytes == table[5]


def test_a_loaded_model_can_be_saved_to_another_and_to_its_own_folder(tmp_path):
    model = compressed("qwen2")
    model.save_pretrained(tmp_path / "one")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    set_size(again, size_table(again)[3].bytes)
    again.save_pretrained(tmp_path / "two")
    again.save_pretrained(tmp_path / "one")
    save(again, tmp_path / "one")
    set_size(again, size_table(again)[-1].bytes)
    for name in ("one", "two"):
        other = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert size(other).bytes == size_table(other)[3].bytes
        set_size(other, size_table(other)[-1].bytes)
        assert torch.equal(logits(other), logits(again))
    with pytest.raises(ValueError, match="upload that"):
        again.save_pretrained(tmp_path / "three", push_to_hub=True)


def test_a_folder_loads_in_a_new_process(tmp_path):
    model = compressed()
    save(model, tmp_path / "small")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = (
        "import broadsheet, torch, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/small')\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(ids).logits, torch.load(sys.argv[1] + '/logits.pt', weights_only=True))\n"
        "model.generate(ids, max_new_tokens=3, do_sample=False)\n"
    )
    arguments = [str(tmp_path), str(random_ids(2, 9).tolist()), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def test_a_copy_of_a_model_has_blocks_of_its_own(tmp_path):
    model = compressed()
    twin = copy.deepcopy(model)
    set_size(twin, size_table(twin)[0].bytes)
    assert size(model).bytes == size_table(model)[-1].bytes
    twin.save_pretrained(tmp_path / "twin")
    assert size(AutoModelForCausalLM.from_pretrained(tmp_path / "twin")).bytes == size(twin).bytes
    del model
    gc.collect()
    set_size(twin, size_table(twin)[-1].bytes)  # the temporary files live as long as one model does


def test_the_temporary_stack_goes_with_the_model():
    model = compressed()
    folder = stack_of(bitstack_layers(model)).folder
    assert (folder / STACK_FILE).is_file()
    del model
    gc.collect()
    assert not folder.exists()


def test_damage_to_a_folder_is_an_error_and_the_model_stays_what_it_was(tmp_path):
    model = compressed()
    save(model, tmp_path / "small")
    table = size_table(model)
    content = bytearray((tmp_path / "small" / STACK_FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / "small" / STACK_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "small", max_memory_mb=table[-2].bytes / 2**20)
    before = logits(smaller)
    set_size(smaller, table[2].bytes)
    with pytest.raises(ValueError, match="is damaged"):
        set_size(smaller, table[-1].bytes)
    assert size(smaller).bytes == table[2].bytes
    set_size(smaller, table[-2].bytes)
    assert torch.equal(logits(smaller), before)
    other = tmp_path / "other"
    save(compressed("mha"), other)
    for name in (STACK_FILE, INDEX_FILE):
        shutil.copy(other / name, tmp_path / "small" / name)
    with pytest.raises(ValueError, match="different models"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_blocks_keep_float16_factors_whatever_the_model_is_loaded_in(tmp_path):
    model = compressed()
    save(model, tmp_path / "small")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    one, two = bitstack_layers(half)[0], bitstack_layers(model)[0]
    assert all(torch.equal(x, y) for x, y in zip(one.blocks, two.blocks, strict=True))
    assert logits(half).dtype == torch.bfloat16
    assert size_table(half)[0].bytes < size_table(model)[0].bytes


@pytest.mark.parametrize("bits", [1.8, 2.5, 4.0, 6.5])
def test_a_budget_of_bits_is_met(bits):
    model = tiny("gqa", hidden_size=128, intermediate_size=192)
    method = BitStack(sort="error").at_budget(bits, shapes(model))
    method.compress(model, random_ids(4, 16))
    layers = bitstack_layers(model)
    assert bits - 8 * max(layer.layout.nbytes for layer in layers) / size(model).weights < size(model).bits <= bits
    assert min(layer.n_loaded for layer in layers) >= 1
    assert method.n_iter - 1 <= max(layer.n_loaded for layer in layers) <= method.n_iter


def test_a_budget_that_cannot_be_met_says_what_can():
    layers = shapes(tiny("gqa"))
    with pytest.raises(Unreachable) as caught:
        BitStack().at_budget(1.0, layers)
    least = caught.value.least
    assert BitStack().at_budget(least, layers).stored_bits(layers) == least
    wide = [(256, 256), (384, 256)]
    assert [BitStack().at_budget(bits, wide).k for bits in (1.12, 1.5, 16.0)] == [1, "auto", "auto"]
    assert BitStack(k=2).at_budget(2.0, wide).k == 2
    model = tiny("gqa")
    BitStack(n_iter=2, k=1, sort="none", scale=False, bits=least).compress(model)
    assert size(model).bits == pytest.approx(least)
    with pytest.raises(Unreachable, match=f"{least:.2f}"):
        BitStack(n_iter=2, k=1, sort="none", scale=False, bits=least - 0.01).compress(tiny("gqa"))


@pytest.mark.parametrize("sort", ["ppl", "loss"])
def test_scores_are_those_of_whole_evaluations(sort):
    """The shortcut of beginning at the changed block, against building and running every candidate."""
    method = BitStack(n_iter=3, k=1, sort=sort, sort_samples=10)
    ids = random_ids(14, 12)
    model = method.compress(tiny("gqa"), ids)
    held_out = ids[-10:]
    index = stack_of(bitstack_layers(model)).index
    layers = bitstack_layers(model)
    original = tiny("gqa")
    for level in (1, 2):
        scores = []
        for raised in range(len(layers)):
            for place, layer in enumerate(layers):
                layer.set_blocks(level + (place == raised))
            labels = logits(original, held_out).argmax(-1) if sort == "loss" else scores_module.following(held_out)
            losses = F.cross_entropy(logits(model, held_out).mT, labels, reduction="none", ignore_index=-100)
            scores.append(float(losses.sum() / (labels != -100).sum()))
        ranks = [layer for layer, block in index.order if block == level]
        assert [scores[layer] for layer in ranks] == pytest.approx(sorted(scores), rel=1e-5)


def test_calibration_is_asked_for_where_it_is_needed():
    model = tiny("gqa")
    with pytest.raises(ValueError, match="needs calibration"):
        BitStack(n_iter=2, k=1).compress(model)
    with pytest.raises(ValueError, match="needs calibration"):
        BitStack(n_iter=2, k=1, sort="error").compress(model)
    with pytest.raises(ValueError, match="8 calibration sequences are too few: 8 are held out"):
        BitStack(n_iter=2, k=1, sort_samples=8).compress(model, random_ids(8, 12))
    with pytest.raises(ValueError, match="at least one of each"):
        BitStack(n_iter=2, k=1, sort="error").compress(model, torch.zeros(0, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least two tokens"):
        BitStack(n_iter=2, k=1, sort_samples=2).compress(model, random_ids(8, 1))
    assert torch.equal(logits(model), logits(tiny("gqa")))  # a refusal changes nothing
    steps = []
    BitStack(n_iter=3, k=1, sort_samples=8, scale=False).compress(
        model, random_ids(8, 12), lambda done, total: steps.append((done, total))
    )
    assert steps == [(i, 5) for i in range(1, 6)]
    BitStack(n_iter=2, k=1, scale=False, sort="none").compress(tiny("gqa"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_iter": 0}, "n_iter must be at least 1"),
        ({"k": 0}, "k must be at least 1, or 'auto'"),
        ({"k": "full"}, "k must be at least 1, or 'auto'"),
        ({"sort": "random"}, "sort must be"),
        ({"sort_samples": 0}, "sort_samples must be"),
        ({"bits": 0.0}, "bits must be positive"),
        ({"parity": "exact"}, "parity must be"),
    ],
)
def test_parameters_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        BitStack(**fields)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"rank 16 does not fit a weight of 8 x 8; choose k from 1 to 8"):
        BitStack(sort="none", scale=False).compress(tiny("gqa", hidden_size=8, num_attention_heads=2, intermediate_size=8))
    broken = tiny("gqa")
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = NAN
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has weights that are inf or nan"):
        QUICK.compress(broken, random_ids(4, 8))
    model = compressed()
    with pytest.raises(ValueError, match="compressed already"):
        QUICK.compress(model, random_ids(4, 8))
    with pytest.raises(ValueError, match="no BitStack layers"):
        set_size(tiny("gqa"), 1 << 30)


def test_nothing_dense_is_left_and_plain_svd_has_no_signs():
    model = compressed(method=BitStack(n_iter=3, k=1, sort="none", scale=False, avd=False))
    layers = bitstack_layers(model)
    assert len(layers) == len(shapes(model)) == 21
    assert not any(layer.layout.signed for layer in layers)
    left = sum(tensor.numel() for tensor in model.parameters())
    assert left == model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel() + 64 * (2 * 3 + 1)
    signed = compressed(method=BitStack(n_iter=3, k=1, sort="none", scale=False))
    assert size(model).bytes <= size(signed).bytes
    assert torch.isfinite(logits(model)).all()


# --- a trained model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens():
    """Calibration ids [samples, 160], and held-out batches with labels on their answers."""
    _, tokenizer = load("pocket-2m")

    def batches(name: str, count: int) -> list:
        return [make_batch(RECIPES["pocket-2m"], Stage(name, 1, 1536, 192, 192), i, tokenizer) for i in range(count)]

    rows = [row[:160] for batch in batches("calibration", 4) for row in batch.ids if bool((row[:160] != 0).all())]
    return torch.stack(rows[:24]), batches("test", 2)


@torch.no_grad()
def perplexity(model, test) -> float:
    return math.exp(sum(float(answer_loss(model, batch)[0]) for batch in test) / len(test))


def coarse(model, count: int, to: float = 1.0) -> list[int]:
    table = [step.bytes for step in size_table(model)]
    return [table[round(i * to * (len(table) - 1) / (count - 1))] for i in range(count)]


def test_acceptance_8_all_blocks_are_the_original_and_fewer_are_less(tokens):
    calibration, test = tokens
    model, _ = load("pocket-2m")
    exact = perplexity(model, test)
    BitStack(n_iter=16, k="auto", sort="error").compress(model, calibration)
    curve = []
    for room in coarse(model, 10):
        set_size(model, room)
        curve.append(perplexity(model, test))
    assert curve[-1] == pytest.approx(exact, rel=0.01)
    assert all(after <= 1.02 * before for before, after in pairwise(curve))


def random_order(monkeypatch, seed: int) -> None:
    draw = random.Random(seed)
    shuffled = lambda scores: stack_order([[draw.random() for _ in row] for row in scores])  # noqa: E731
    monkeypatch.setattr("broadsheet.methods.weights.bitstack.stack_order", shuffled)


def test_acceptance_8_the_sorted_order_beats_random_ones_on_average(tokens, monkeypatch):
    """By what the model itself predicts: of the tokens it was trained to predict answers alone, which are few."""
    calibration, test = tokens

    def mean(model) -> float:
        values = []
        for room in coarse(model, 5)[1:-1]:
            set_size(model, room)
            values.append(math.log(perplexity(model, test)))
        return sum(values) / len(values)

    method = BitStack(n_iter=3, k="auto", sort="loss", sort_samples=8)
    ours = mean(method.compress(load("pocket-2m")[0], calibration))
    means = []
    for seed in range(3):
        random_order(monkeypatch, seed)
        means.append(mean(replace(method, sort="none").compress(load("pocket-2m")[0], calibration[:-8])))
    assert ours < sum(means) / len(means)


@needs_stories
@torch.no_grad()
def test_acceptance_8_on_a_model_of_text_the_papers_order_beats_random_ones(monkeypatch):
    model, tokenizer = load(str(SHARED / "models" / "stories260K"))
    text = json.loads((SHARED / "data" / "tinystories_wikitext_1000" / "tinystories_1000.json").read_text())
    pieces = [ids[:127] for ids in tokenizer(text[:200], add_special_tokens=False)["input_ids"] if len(ids) >= 127]
    ids = torch.tensor([[tokenizer.bos_token_id, *piece] for piece in pieces[:96]])
    calibration, test = ids[:48], ids[48:]

    def mean(model) -> float:
        values = []
        for room in coarse(model, 9):
            set_size(model, room)
            values.append(float(model(test, labels=test).loss))
        return sum(values) / len(values)

    method = BitStack(n_iter=3, k=1, sort_samples=16)
    ours = mean(method.compress(copy.deepcopy(model), calibration))
    for seed in range(3):
        random_order(monkeypatch, seed)
        other = replace(method, sort="none").compress(copy.deepcopy(model), calibration[:-16])
        assert ours < mean(other)


def test_plain_svd_loses_at_every_budget(tokens):
    calibration, test = tokens
    curves = []
    for avd in (True, False):
        model = BitStack(n_iter=4, k="auto", sort="none", avd=avd).compress(load("pocket-2m")[0], calibration)
        curves.append([])
        for bits in (1.3, 2.0, 3.0, 4.0):
            set_size(model, base_bytes(model) + int(bits * size(model).weights / 8))
            curves[-1].append(perplexity(model, test))
    assert all(signed < plain for signed, plain in zip(*curves))
