"""The baselines against the packages that people use. ``make peers`` installs them and runs this."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tiny import random_ids, tiny
from transformers import AutoModelForCausalLM

from broadsheet.core.numerics.groups import quantise_groups
from broadsheet.core.numerics.packing import unpack
from broadsheet.methods.weights import hqq
from broadsheet.methods.weights.base import Unreachable, shapes, size
from broadsheet.methods.weights.hqq import HQQ
from broadsheet.methods.weights.peers import TorchAO
from broadsheet.methods.weights.quantiser import save

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


@pytest.mark.parametrize(("bits", "group_size"), [(8, 128), (4, 32), (4, 64)])
def test_torchao_computes_and_what_it_stores_is_saved_and_counted(bits, group_size, tmp_path):
    """Layers multiply as torchao's own modules do, in both dtypes; the folder gives the same model."""
    pytest.importorskip("torchao")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    tiny("gqa", intermediate_size=128).save_pretrained(tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    linear = copy.deepcopy(model.model.layers[1].mlp.down_proj)
    method = TorchAO(bits, group_size)
    small = method.compress(model)
    layer = small.model.layers[1].mlp.down_proj
    quantize_(linear, Int8WeightOnlyConfig() if bits == 8 else PrototypeInt4WeightOnlyConfig(group_size=group_size))
    x = torch.randn(3, linear.in_features)
    assert torch.equal(layer(x.bfloat16()), linear(x.bfloat16()))
    assert torch.allclose(layer(x), x @ layer.weight().T, rtol=1e-4, atol=1e-5)
    assert size(small).bits == pytest.approx(method.stored_bits(shapes(small)))
    save(small, tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    assert torch.equal(again(random_ids(2, 9)).logits, small(random_ids(2, 9)).logits)


def test_torchao_says_what_it_cannot_do():
    layers = [(64, 96)]
    with pytest.raises(ValueError, match="torchao's 4 bits take layers"):
        TorchAO(4, 64).check(layers)
    assert TorchAO().at_budget(5.0, layers) == TorchAO(4, 32)
    assert TorchAO().at_budget(8.75, layers).bits == 8
    with pytest.raises(Unreachable, match=r"the least this method can do here is 5\.00"):
        TorchAO().at_budget(4.25, layers)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 3"):
        TorchAO(3)
    with pytest.raises(ValueError, match="group_size must be one of 32, 64, 128, 256, got 96"):
        TorchAO(4, 96)
