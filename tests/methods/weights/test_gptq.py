"""GPTQ against the implementation that is maintained, and against rounding to nearest."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.methods.weights.gptq import compensate, gptq

GOLDEN = Path(__file__).parents[2] / "golden" / "gptq_official.safetensors"


@pytest.mark.parametrize("order", ["plain", "order"])
@pytest.mark.parametrize("bits", [2, 4])
def test_errors_are_made_good_as_in_the_original(bits, order):
    """With the original's grid of integers the same weights come out, bit for bit."""
    tensors = load_file(GOLDEN)
    scale, zero = tensors[f"b{bits}.scale"], tensors[f"b{bits}.zero"].float()
    found = torch.zeros_like(tensors["w"])

    def nearest(column, values, left):
        step, offset = scale[:, column // 32], zero[:, column // 32]
        code = (values / step + offset).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        found[:, column] = (code - offset) * step
        return found[:, column]

    compensate(tensors["w"], tensors["gram"], nearest, damping=0.01, act_order=order == "order")
    assert torch.equal(found, tensors[f"b{bits}.{order}"])


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layers_output_loses_less_than_to_the_nearest(bits, order):
    tensors = load_file(GOLDEN)
    weight, gram = tensors["w"], tensors["gram"]

    def error(read: torch.Tensor) -> float:
        return float(((read - weight) @ gram * (read - weight)).sum())

    ours = error(gptq(weight, gram, bits, 32, act_order=order).dequantise())
    assert ours < 0.7 * error(quantise_groups(weight, bits, 32).dequantise())
