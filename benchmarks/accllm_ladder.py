"""AccLLM step by step: FP -> +2:4 -> +Lambda -> +A8 -> +KV4 -> +W4 -> +W2, and its rivals at equal bytes.

    python benchmarks/accllm_ladder.py [--model NAME_OR_FOLDER] [--text FILE] [--out FILE]

Writes `benchmarks/results/accllm_ladder.records.json`. Every rung is the model and cache of the rungs before it with one
step more; weights are pruned and quantised anew from the original. By rung: loss and KL to the original under its full cache
(on the first answers of microworld sessions, or on the second part of pieces of ``--text``), bits a weight, bytes of cache a
token, and without ``--text`` accuracy on instructions and on pairs recalled from a context of three windows, by how far back
they stand.

Beside the ladder:

- pruning scores; dense 2 bits against 2:4 with 2 bits, dense 3 bits against 2:4 with 4; rounding to nearest against learned
  ranges; pruning first against rounding first: loss, KL and bits, with the full cache and activations as they are;
- with ``--text``, the loss along eight times the trained length under the full cache, under sinks and a window, and under a
  window alone.
"""

from __future__ import annotations

import copy
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
from _study import Item, Study, play
from transformers import PreTrainedModel

from broadsheet.core.microworld.tasks import SHORT, make_sessions
from broadsheet.core.models import with_cache
from broadsheet.core.texts import pieces
from broadsheet.methods.caches.base import CacheMethod, Geometry
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.lambda_kv4 import LambdaKV4
from broadsheet.methods.caches.scbench import SessionRunner
from broadsheet.methods.weights.accllm import AccLLM
from broadsheet.methods.weights.base import WeightMethod, shapes, size
from broadsheet.methods.weights.bench import Workload
from broadsheet.methods.weights.bench import calibration as calibration_of
from broadsheet.methods.weights.gptq import GPTQ
from broadsheet.methods.weights.rtn import RTN

#: the weights' steps
PRUNED = AccLLM(bits=16, activation_bits=0)
A8 = AccLLM(bits=16)
W4 = AccLLM(bits=4)
W2 = AccLLM(bits=2)
RECOVERED = AccLLM(bits=2, weight_learning_rate=1e-3)

#: compared with the full cache and activations as they are
WEIGHTS: dict[str, WeightMethod] = {
    "2:4 magnitude": replace(PRUNED, score="magnitude"),
    "2:4 Wanda": replace(PRUNED, score="wanda"),
    "2:4 SparseGPT": PRUNED,
    "dense W2 nearest": RTN(bits=2),
    "dense W2 GPTQ": GPTQ(bits=2),
    "dense W2 learned": AccLLM(score="none", activation_bits=0),
    "dense W3 learned": AccLLM(score="none", bits=3, activation_bits=0),
    "2:4 W2 nearest": AccLLM(clip="none", activation_bits=0),
    "2:4 W2 learned": AccLLM(activation_bits=0),
    "2:4 W2 recovered": replace(RECOVERED, activation_bits=0),
    "dense W2 recovered": replace(RECOVERED, activation_bits=0, score="none"),
    "2:4 W4 learned": AccLLM(bits=4, activation_bits=0),
}
for _score in ("magnitude", "wanda"):
    for _order in ("prune first", "quantise first"):
        for _bits in (2, 4):
            WEIGHTS[f"{_order}: {_score} W{_bits}"] = AccLLM(
                score=_score, order=_order, bits=_bits, clip="none", activation_bits=0
            )


@dataclass
class Bench:
    """The study, the original model, and its compressed forms as they are made."""

    study: Study
    calibration: torch.Tensor
    items: list[Item]

    def small(self, method: WeightMethod | None) -> PreTrainedModel:
        model = copy.deepcopy(self.study.model)
        if method is None:
            return model
        if isinstance(method, AccLLM) and not self.study.arguments.text:  # a built-in model's blocks are ten times larger
            method = replace(method, epochs=8, learning_rate=0.1)
        return method.compress(model, self.calibration if method.calibrated else None)

    def quality(self, model: PreTrainedModel, method: Any, cache: CacheMethod, label: str, part: str) -> None:
        if isinstance(method, AccLLM):  # with what it was really made with
            method = replace(method, **model.config.quantization_config.parameters)
        outcome = play(model, self.items, cache)
        self.study.add(method, label, "loss", outcome.loss, "nats per token", part=part)
        self.study.add(method, label, "kl", outcome.kl, "nats per token", part=part)
        if not self.study.arguments.text:
            self.study.add(method, label, "first_answers", outcome.exact, "of items", part=part)
        self.study.exact(label, "perplexity", math.exp(statistics.fmean(outcome.loss)), "per token", part=part)
        bits = 16.0 if method is None else size(model).bits  # the original is computed in 32 bits and stored in 16
        self.study.exact(label, "bits", bits, "a weight of the decoder blocks", part=part)
        if isinstance(method, AccLLM) and method.score != "none":
            with_indices = replace(method, places="indices").stored_bits(shapes(model))
            self.study.exact(label, "bits_with_indices", with_indices, "a weight of the decoder blocks", part=part)


def pair_distances(bench: Bench, model: PreTrainedModel, cache: CacheMethod, label: str, window: int) -> None:
    """Recall of pairs by how many tokens before the question they stand, in windows."""
    tokenizer, context = bench.study.tokenizer, 3 * window
    sessions = {session.id: session for session in make_sessions("kv", 4, context, 20, "ladder")}
    results = SessionRunner(model, tokenizer, cache).run(list(sessions.values()), "multi-request")
    found: dict[str, list[float]] = {}
    for result in results:
        session = sessions[result.session]
        line = session.turns[result.turn - 1].extra["reference"]
        far = len(tokenizer(session.context[session.context.index(line) :])["input_ids"]) / window
        place = "0 to 0.9" if far < 0.9 else "0.9 to 1.1" if far < 1.1 else "1.1 to 2" if far < 2 else "2 to 3"
        found.setdefault(place, []).append(result.score)
    for place, scores in sorted(found.items()):
        bench.study.add(cache, label, "recall", scores, "of answers", windows_back=place, part="ladder")
    held = statistics.fmean(result.cache_bytes / result.prompt_tokens for result in results)
    full = Geometry.of(model.config).full_bytes(1)
    bench.study.exact(label, "kv_bytes", held, "a token of context", full=full, tokens=context, part="ladder")


def instructions(bench: Bench, model: PreTrainedModel, cache: CacheMethod, label: str) -> None:
    runner = SessionRunner(model, bench.study.tokenizer, cache)
    scores = []
    for task in SHORT:
        sessions = make_sessions(task, 24, 0, 1, "ladder")
        scores += [result.score for result in runner.run(sessions, "multi-request")]
    bench.study.add(cache, label, "instructions", scores, "of answers", part="ladder")


def ladder(bench: Bench, window: int) -> None:
    exact, coded = LambdaKV4(4, window, 16, 16), LambdaKV4(4, window)
    rungs: list[tuple[str, WeightMethod | None, CacheMethod]] = [
        ("FP", None, Full()),
        ("+2:4", PRUNED, Full()),
        ("+Lambda", PRUNED, exact),
        ("+A8", A8, exact),
        ("+KV4", A8, coded),
        ("+W4", W4, coded),
        ("+W2", W2, coded),
        ("+recovery", RECOVERED, coded),
    ]
    model, made = bench.small(None), None
    for label, method, cache in rungs:
        if method != made:
            model, made = bench.small(method), method
        bench.quality(model, method, cache, label, "ladder")
        if not bench.study.arguments.text:
            instructions(bench, model, cache, label)
            pair_distances(bench, model, cache, label, window)
        else:
            held = play(model, bench.items[:1], cache).nbytes[0] / bench.items[0].prefix.shape[1]
            full = Geometry.of(model.config).full_bytes(1)
            bench.study.exact(label, "kv_bytes", held, "a token of context", full=full, part="ladder")


def rivals(bench: Bench) -> None:
    for label, method in WEIGHTS.items():
        bench.quality(bench.small(method), method, Full(), label, "weights")


@torch.inference_mode()
def long_text(bench: Bench, window: int, length: int) -> None:
    """Loss by position of one text of ``length`` tokens, fed in chunks, with one opening token at its start."""
    study = bench.study
    found = pieces(study.arguments.text, study.tokenizer, 128)[study.arguments.items :]
    stream = torch.cat([found[0, :1], found[:, 1:].flatten()])[:length]
    methods = {"full": Full(), "sinks and window": LambdaKV4(4, window), "window alone": LambdaKV4(0, window)}
    trained = study.model.config.get_text_config().max_position_embeddings
    for label, method in methods.items():
        cache, losses = method.cache(study.model, dtype=torch.bfloat16), []
        for chunk, following in zip(stream[:-1].split(32), stream[1:].split(32), strict=True):
            logits = study.model(chunk[None], **with_cache(cache)).logits[0].float()
            losses += torch.nn.functional.cross_entropy(logits, following, reduction="none").tolist()
        for first in range(0, length - 1, trained):
            some = losses[first : first + trained]
            study.add(method, label, "loss", some, "nats per token", tokens_from=first, part="long")
            study.exact(label, "perplexity", math.exp(statistics.fmean(some)), "per token", tokens_from=first, part="long")
        study.exact(label, "cache_bytes", cache.nbytes, "at the end", tokens=length, part="long")


def text_items(study: Study, samples: int) -> tuple[list[Item], torch.Tensor]:
    """Pieces of the text to be scored, and others to calibrate on."""
    found = pieces(study.arguments.text, study.tokenizer, study.arguments.tokens + 64)
    scored, others = found[: study.arguments.items], found[study.arguments.items :][:samples]
    tokens = study.arguments.tokens
    return [Item(row[None, :tokens], row[None, tokens:], 63) for row in scored], others


def main() -> None:
    study = Study.start("accllm_ladder", "accllm", __doc__ or "", tokens=400, items=96)
    trained = study.model.config.get_text_config().max_position_embeddings
    if study.arguments.text:
        items, calibration = text_items(study, 64)
    else:
        items, calibration = study.items(0), calibration_of(Workload(model=study.arguments.model), study.tokenizer)
    bench = Bench(study, calibration, items)
    play(study.model, items, Full())  # what the original predicts under its full cache is the reference
    ladder(bench, min(508, trained // 2 - 4))
    rivals(bench)
    if study.arguments.text:
        long_text(bench, trained - 4, 8 * trained)
    study.finish()


if __name__ == "__main__":
    main()
