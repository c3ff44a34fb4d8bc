"""What an estimate says of a method's bytes is what the method then holds, to the byte."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from broadsheet.core.models import with_cache
from broadsheet.core.perf.hardware import device
from broadsheet.methods.caches.base import Geometry
from broadsheet.methods.caches.block_quant_outliers import KSortBFP
from broadsheet.methods.caches.elastic_cache import ElasticCache
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.gear import GEAR
from broadsheet.methods.caches.h2o import H2O
from broadsheet.methods.caches.kivi import KIVI
from broadsheet.methods.caches.lambda_kv4 import LambdaKV4
from broadsheet.methods.caches.mpcache import MPCache
from broadsheet.methods.caches.snapkv import SnapKV
from broadsheet.methods.caches.streaming_llm import StreamingLLM
from broadsheet.methods.estimates.llm_viewer import LLMViewer
from broadsheet.methods.estimates.long_context_peak import SessionModel
from broadsheet.methods.weights.accllm import AccLLM
from broadsheet.methods.weights.base import size
from broadsheet.methods.weights.hqq import HQQ
from broadsheet.methods.weights.olive import Olive
from broadsheet.methods.weights.rtn import RTN
from broadsheet.methods.weights.uncompressed import Uncompressed


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


CACHES = [
    (Full(), 16),
    (KIVI(bits=2, group_size=32, residual=128), "kivi:bits=2,group_size=32,residual=128"),
    (KIVI(bits=3, group_size=16, residual=0, value_bits=4), "kivi:bits=3,group_size=16,residual=0,value_bits=4"),
    (GEAR(bits=2, group_size=32, rank_prefill=3), "gear:bits=2,group_size=32,rank=3"),
    (GEAR("kcvt", bits=4, sparsity=0.0), "gear:bits=4,group_size=null,sparsity=0"),
    (LambdaKV4(window=100, group_size=16), "lambda-kv4:window=100,group_size=16"),
    (KSortBFP(key_bits=5, block=16, value_bits=3), "bfp:key_bits=5,block=16,value_bits=3"),
    (H2O(budget=0.3), "h2o:share=0.3"),
    (StreamingLLM(budget=0.3), "streaming-llm:share=0.3"),
    (SnapKV(budget=0.4), "snapkv:share=0.4"),
    (MPCache(static_keep=0.6, similarity="max"), None),
    (ElasticCache(discard="frequency", mass_bias=True), None),
    (ElasticCache(discard="frequency", granularity="head"), None),
]


@pytest.mark.parametrize(("method", "text"), CACHES, ids=[f"{type(m).__name__}-{i}" for i, (m, _) in enumerate(CACHES)])
@pytest.mark.parametrize("tokens", [128, 301])
def test_a_cache_holds_what_is_estimated(method, text: float | str | None, tokens: int) -> None:
    """Formats by name, or where there is none the method's own."""
    net = model()
    cache = method.cache(net, dtype=torch.bfloat16)
    with torch.no_grad():
        net(torch.randint(1, 160, (1, tokens)), **with_cache(cache), use_cache=True, logits_to_keep=1)
    cache.end_prefill()
    geometry = Geometry.of(net.config)
    stored = method.format(geometry) if text is None else text
    report = LLMViewer("a100", cache=stored).estimate(net, 1, tokens)
    assert report.memory.cache == cache.nbytes
    assert method.expected_bytes(tokens, geometry) == cache.nbytes
    assert SessionModel(net, "a100", cache=stored).cache_bytes(tokens) == cache.nbytes
    if cache.report()["stored"][0] == tokens:  # a step reads what is held
        read = sum(row["load_kv"] for row in report.ops if row["stage"] == "decode")
        assert read == pytest.approx(cache.nbytes)


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (Uncompressed(), 16),
        (RTN(bits=3, group_size=32), "rtn:bits=3,group_size=32"),
        (HQQ(bits=4, group_size=64), "hqq:bits=4,group_size=64"),
        (AccLLM(bits=4, group_size=32, score="magnitude", clip="none", smooth=0.0, activation_bits=0), "accllm:bits=4"),
        (Olive(w_bits=4, a_bits=None, layer_8bit_n=0), "olive:activations=false"),
    ],
    ids=lambda value: str(value).partition(":")[0] if isinstance(value, str | int) else "",
)
def test_a_compressed_model_holds_what_is_estimated(method, text: float | str) -> None:
    small = method.compress(model().bfloat16())
    held = size(small).bytes - sum(buffer.nbytes for name, buffer in small.named_buffers() if "inv_freq" in name)
    assert LLMViewer("a100", weights=text).estimate(model(), 1, 16).memory.weights == held


def test_a_what_if_of_a_large_model() -> None:
    """On H100, Llama-3.1-70B's cache in KIVI's 2 bits: a bit less than a sixth, and what eight of them would take."""
    full, small = (
        LLMViewer("h100", cache=cache, tensor_parallel=4).estimate("llama-3.1-70b", 8, 32_768).memory.cache
        for cache in (None, "kivi:bits=2,group_size=32,residual=128")
    )
    assert full == 8 * 32_768 * 2 * 80 * 2 * 128 * 2
    assert 5.2 < full / small < 5.4
    assert device("h100").memory > small
