"""AccLLM's weights and cache as one; what lies outside the window is gone."""

import pytest
import torch
from tiny import random_ids, tiny

from broadsheet.core.microworld.tasks import make_sessions
from broadsheet.core.models import load
from broadsheet.lab.recipes import AccLLMConfig, accllm
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.lambda_kv4 import LambdaKV4
from broadsheet.methods.caches.scbench import SessionRunner
from broadsheet.methods.weights.accllm import AccLLM
from broadsheet.methods.weights.base import size


@torch.no_grad()
def test_accllm_is_one_call():
    model, ids = tiny("gqa"), random_ids(6, 20)
    seen = []
    config = AccLLMConfig(AccLLM(epochs=1), LambdaKV4(4, 24, group_size=8))
    small = accllm(model, ids, config, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert size(small.model).bits < 2.7  # rows of 64 and 96 weights, with a scale and a zero each
    cache = small.cache()
    out = small.model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert out.shape == (6, 60)
    assert cache.layers[0].stored <= 4 + 23 + 7


def test_nothing_is_changed_when_the_cache_does_not_fit():
    model = tiny("gqa")
    with pytest.raises(ValueError, match="more than the 1024 positions"):
        accllm(model, random_ids(2, 8), AccLLMConfig(cache=LambdaKV4(4, 2044)))
    assert getattr(model.config, "quantization_config", None) is None


def test_acceptance_9_what_lies_outside_the_window_cannot_be_retrieved():
    """The built-in model recalls pairs anywhere with a full cache; with a window only those in it."""
    model, tokenizer = load("pocket-2m")
    sessions = make_sessions("kv", 2, 500, 12, "window")
    window = 250

    def distance(session, turn):
        context = session.context
        return len(tokenizer(context[context.index(session.turns[turn].extra["reference"]) :])["input_ids"])

    for bits in (16, 4):
        scores = {}
        for name, method in (("full", Full()), ("lambda", LambdaKV4(4, window, bits, bits))):
            results = SessionRunner(model, tokenizer, method).run(sessions, "multi-request")
            by_id = {session.id: session for session in sessions}
            for result in results:
                far = distance(by_id[result.session], result.turn - 1)
                # The question takes some of the window.
                place = "outside" if far > window + 10 else "inside" if far < window - 30 else "edge"
                scores.setdefault((name, place), []).append(result.score)
        means = {key: sum(values) / len(values) for key, values in scores.items()}
        assert means["full", "outside"] > 0.9
        assert means["full", "inside"] > 0.9
        assert means["lambda", "inside"] > 0.8
        assert means["lambda", "outside"] < 0.1
