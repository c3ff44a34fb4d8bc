"""transformers' own quantised caches, run through the family's verbs."""

import importlib.util

import pytest
import torch
from tiny import tiny
from transformers import QuantizedCache

from broadsheet.methods.caches.base import Geometry, Unreachable
from broadsheet.methods.caches.peers import TransformersQuantized


def needs(backend: str, package: str):
    missing = importlib.util.find_spec(package.split(".")[0]) is None or importlib.util.find_spec(package) is None
    skip = pytest.mark.skipif(missing, reason=f"{package} is not installed; pip install 'broadsheet[peers]'")
    return pytest.param(backend, marks=[pytest.mark.peers, skip])


BACKENDS = ["fp8", needs("quanto", "optimum.quanto"), needs("hqq", "hqq")]


def of(backend: str) -> TransformersQuantized:
    return TransformersQuantized(backend, bits=8) if backend == "fp8" else TransformersQuantized(backend, residual=16)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_librarys_class_runs_and_its_bytes_are_counted(backend):
    model, method = tiny(head_dim=64), of(backend)
    geometry = Geometry.of(model.config)
    ids = torch.randint(3, 97, (2, 90), generator=torch.Generator().manual_seed(0))
    cache = method.cache(model, dtype=torch.bfloat16)
    assert isinstance(cache, QuantizedCache)
    model(ids[:, :80], past_key_values=cache)
    cache.end_prefill()
    assert cache.seen == 80
    if backend == "fp8":  # one scale for all rows
        assert cache.nbytes == 2 * (method.expected_bytes(80, geometry) - 8 * geometry.layers) + 8 * geometry.layers
    else:
        assert cache.nbytes == 2 * method.expected_bytes(80, geometry)
    # In the model's own dtype it is the stock class, bit for bit.
    own, stock = method.cache(model), QuantizedCache(config=model.config, **method.options)
    model(ids[:, :80], past_key_values=own)
    model(ids[:, :80], past_key_values=stock)
    ours = model(ids[:, 80:], past_key_values=own).logits
    assert torch.equal(ours, model(ids[:, 80:], past_key_values=stock).logits)
    assert not torch.allclose(ours, model(ids).logits[:, 80:], atol=1e-4)
    report = cache.report()
    assert report["nbytes"] == sum(report["parts"].values())


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_fork_leaves_the_cache_alone_and_exact_tokens_are_counted(backend):
    model = tiny(head_dim=64)
    ids = torch.randint(3, 97, (1, 70), generator=torch.Generator().manual_seed(1))
    cache = of(backend).cache(model)
    model(ids[:, :60], past_key_values=cache)
    before = cache.nbytes
    one = model(ids[:, 60:], past_key_values=cache.fork()).logits
    other = cache.fork()
    two = model(ids[:, 60:], past_key_values=other).logits
    assert torch.equal(one, two)
    assert (cache.seen, other.seen, cache.nbytes) == (60, 70, before)
    if backend == "fp8":
        assert other.nbytes > before
    else:  # ten exact tokens in float32
        geometry = Geometry.of(model.config)
        assert other.report()["parts"]["buffer"] == 10 * 4 * 2 * geometry.layers * geometry.kv_heads * 64


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_budget_is_kept(backend):
    model = tiny(head_dim=64)
    geometry = Geometry.of(model.config)
    method = of(backend)
    for fraction in (0.3, 0.6):
        if backend == "fp8" and fraction < 0.5:
            with pytest.raises(Unreachable):
                method.at_budget(fraction, 200, geometry)
            continue
        cache = method.at_budget(fraction, 200, geometry).cache(model, dtype=torch.bfloat16)
        model(torch.full((1, 200), 5), past_key_values=cache)
        assert 0.8 * fraction < cache.nbytes / geometry.full_bytes(200) <= fraction or backend == "quanto"
        assert cache.nbytes <= fraction * geometry.full_bytes(200)


def test_bad_parameters_are_named():
    for wrong, word in (
        ({"backend": "other"}, "backend"),
        ({"bits": 3}, "bits"),
        ({"backend": "fp8", "bits": 4}, "bits"),
        ({"group_size": 0}, "group_size"),
    ):
        with pytest.raises(ValueError, match=f"^{word}"):
            TransformersQuantized(**wrong)
    with pytest.raises(ValueError, match="group_size 48 does not divide head_dim 64"):
        TransformersQuantized(group_size=48).cache(tiny(head_dim=64))
