"""The baselines against the packages that people use. ``make peers`` installs them and runs this."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.numerics.packing import unpack
from broadsheet.methods.weights import hqq
from broadsheet.methods.weights.hqq import HQQ

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_quantises_as_its_package_does(bits, monkeypatch):
    """The same codes with scales in float32, but for zeros in float16; with scales in float16 as stored, no more error."""
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 3] *= 8
    codes, meta = quantizer.quantize(
        weight.clone(), nbits=bits, group_size=64, axis=1, bitpack=False, compute_dtype=torch.float32, device="cpu"
    )
    theirs = quantizer.dequantize(codes, meta).float()
    stored = HQQ(bits, 64).quantise(weight).dequantise()
    assert (stored - weight).norm() <= 1.005 * (theirs - weight).norm()

    monkeypatch.setattr(hqq, "quantise_groups", partial(quantise_groups, scale_dtype=torch.float32))
    wide = HQQ(bits, 64).quantise(weight)
    same = unpack(wide.codes, bits, 64).reshape(-1, 64) == codes.reshape(-1, 64)
    assert same.float().mean() > 1 - 2.0 ** (bits - 12)  # float16 zeros move one code in so many across a border
