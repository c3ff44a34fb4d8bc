"""Elastic Cache on pictures: the built-in vision-language model reads held-out mosaics of digits under every policy.

    python benchmarks/elastic_vision.py [--seeds 10] [--mosaics 50]

The prompt is a picture (144 patches) and an instruction; all policies hold equal real bytes of it. Three things are asked:
to describe the picture (perplexity of the right caption; ROUGE-L F1 of the caption that is generated against the full
cache's), and, each on a cache of its own, to look up three digits (exact match). Compression sees the prompt alone, never
an answer. Differences are paired by mosaic; intervals are 95 % bootstrap over mosaics.
Records go to benchmarks/results/elastic_vision.records.json, the model's card into its folder.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from broadsheet.core.microworld.mosaics import (
    IMAGE_TOKEN,
    PATCHES,
    SIDE,
    Mosaic,
    add_row,
    describe,
    draw_mosaic,
    look_up,
    read_row,
    with_picture,
)
from broadsheet.core.microworld.sessions import Turn
from broadsheet.core.models import POCKET_FOLDER, fingerprint, load
from broadsheet.core.models.taps import Tokens
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.core.stats import bootstrap_ci, paired_difference
from broadsheet.methods.caches.base import CacheMethod, Geometry, Unreachable
from broadsheet.methods.caches.elastic_cache import ElasticCache, ElasticLayer
from broadsheet.methods.caches.full import Full
from broadsheet.methods.caches.h2o import H2O
from broadsheet.methods.caches.kivi import KIVI
from broadsheet.methods.caches.snapkv import SnapKV
from broadsheet.methods.caches.streaming_llm import StreamingLLM

MODEL = "pocket-digits"
RESULTS = Path(__file__).parent / "results" / "elastic_vision.records.json"
BUDGETS = (0.7, 0.5, 0.3, 0.2)
LOOKUPS = 3


class RandomLayer(ElasticLayer):
    """Anchors drawn at random: what the choice by attention is worth."""

    def scores(self, prompt: Tokens) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.index)
        return torch.rand(prompt.keys.shape[0], 1, prompt.count, generator=draw)


@dataclass(frozen=True)
class RandomAnchors(ElasticCache):
    Layer: ClassVar[type[ElasticLayer]] = RandomLayer


RIVALS: dict[str, CacheMethod] = {
    "Elastic": ElasticCache(),
    "evict": ElasticCache(merge=False),
    "random anchors": RandomAnchors(),
    "H2O": H2O(),
    "local window": StreamingLLM(n_sink=1),
    "SnapKV": SnapKV(),
    "KIVI": KIVI(),
}
#: at half the bytes only
VARIANTS: dict[str, CacheMethod] = {
    "discard recent": ElasticCache(discard="recent"),
    "discard frequency": ElasticCache(discard="frequency"),
    "importance mean": ElasticCache(importance="mean"),
    "importance moving average": ElasticCache(importance="moving_average"),
    "anchors by head": ElasticCache(granularity="head"),
    "keys before rotation": ElasticCache(merge_keys="pre_rope"),
    "values only": ElasticCache(merge_keys="none"),
    "mass bias": ElasticCache(mass_bias=True),
}
#: places of the queue's exit, as shares of the compressed prompt
EXITS = (0.05, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Scores:
    """One value a mosaic: nats a caption token, ROUGE-L F1, share of lookups right, bytes over the full cache's."""

    loss: list[float] = field(default_factory=list)
    rouge: list[float] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)


def rouge_l(ours: Sequence[int], reference: Sequence[int]) -> float:
    """F1 of the longest common subsequence (Lin 2004, section 3), over tokens."""
    longest = [0] * (len(reference) + 1)
    for token in ours:
        before = 0
        for place, other in enumerate(reference, 1):
            here = longest[place]
            longest[place] = before + 1 if token == other else max(here, longest[place - 1])
            before = here
    return 2 * longest[-1] / (len(ours) + len(reference)) if ours or reference else 1.0


class Reader:
    """The model with its mosaics: ``seeds`` batches of ``mosaics``."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeds: int, mosaics: int):
        self.model, self.tokenizer = model, tokenizer
        self.geometry = Geometry.of(model.config)
        self.image = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        self.user, self.assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        self.batches: list[list[Mosaic]] = []
        self.places: list[list[list[tuple[int, int]]]] = []  # of the lookups, [batch][lookup][mosaic]
        everywhere = [(row, column) for row in range(1, SIDE + 1) for column in range(1, SIDE + 1)]
        for seed in range(seeds):
            rng = random.Random(f"vision/{seed}")
            self.batches.append([draw_mosaic(rng, held_out=True) for _ in range(mosaics)])
            chosen = [rng.sample(everywhere, LOOKUPS) for _ in range(mosaics)]
            self.places.append([list(column) for column in zip(*chosen)])
        self.reference: list[torch.Tensor] = []  # the full cache's captions, once `run` has met `Full`

    def prompt(self, turns: list[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the pictured questions [batch, n], and of the answers [batch, m] with their end; all equally long."""
        prompts, answers = [], []
        for turn in turns:
            question = self.tokenizer(" " + turn.input, add_special_tokens=False)["input_ids"]
            ids = [self.tokenizer.bos_token_id, self.user, *question, self.assistant]
            prompts.append(with_picture(ids, self.image))
            answers.append(self.tokenizer(f" {turn.answer}")["input_ids"] + [self.tokenizer.eos_token_id])
        return torch.tensor(prompts), torch.tensor(answers)

    @property
    def prompt_tokens(self) -> int:
        """Of the request to describe."""
        return self.prompt([describe(self.batches[0][0])])[0].shape[1]

    @torch.inference_mode()
    def answer(
        self, method: CacheMethod, mosaics: list[Mosaic], turns: list[Turn]
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Mean loss on the answers [batch], what is generated instead [batch, m], and the bytes held for the prompts."""
        prompts, answers = self.prompt(turns)
        cache = method.cache(self.model, dtype=torch.bfloat16)
        pixels = torch.stack([mosaic.pixels for mosaic in mosaics])
        first = self.model(input_ids=prompts, pixel_values=pixels, past_key_values=cache, logits_to_keep=1).logits
        held = cache.nbytes
        free = cache.fork()
        logits = [first]
        for token in answers[:, :-1].unbind(1):
            logits.append(self.model(input_ids=token[:, None], past_key_values=cache).logits)
        losses = F.cross_entropy(torch.cat(logits, 1).transpose(1, 2), answers, reduction="none").mean(1)
        said = [first[:, -1].argmax(-1)]
        while len(said) < answers.shape[1]:
            said.append(self.model(input_ids=said[-1][:, None], past_key_values=free).logits[:, -1].argmax(-1))
        return losses, torch.stack(said, 1), held

    def run(self, method: CacheMethod, lookups: bool = True) -> Scores:
        scores = Scores()
        for number, mosaics in enumerate(self.batches):
            losses, said, held = self.answer(method, mosaics, [describe(mosaic) for mosaic in mosaics])
            if isinstance(method, Full):
                self.reference.append(said)
            scores.loss += losses.tolist()
            scores.rouge += [rouge_l(a, b) for a, b in zip(said.tolist(), self.reference[number].tolist(), strict=True)]
            full = self.geometry.full_bytes(self.prompt_tokens)
            scores.ratio += [held / len(mosaics) / full] * len(mosaics)
            if not lookups:
                continue
            right = torch.zeros(len(mosaics))
            for places in self.places[number]:
                turns = [look_up(mosaic, *place) for mosaic, place in zip(mosaics, places, strict=True)]
                _, said, _ = self.answer(method, mosaics, turns)
                right += (said == self.prompt(turns)[1]).all(1)
            scores.lookup += (right / LOOKUPS).tolist()
        return scores


@dataclass
class Report:
    """Records, and their print-out."""

    reader: Reader
    seeds: int
    records: list[Record] = field(default_factory=list)

    def add(self, method: CacheMethod, label: str, metric: str, value: float, **fields: Any) -> None:
        setting = {"seeds": self.seeds, "tokens": self.reader.prompt_tokens, **fields.pop("setting", {})}
        mark = fingerprint(self.reader.model)
        self.records.append(
            Record(
                paper="elastic-cache", method=label, bench="elastic_vision", metric=metric, value=value,
                model=f"{MODEL}@{mark}", parameters=method.parameters, setting=setting, time=now(), **provenance(), **fields,
            )
        )  # fmt: skip

    def scores(self, method: CacheMethod, label: str, scores: Scores, **setting: Any) -> None:
        low, high = bootstrap_ci(scores.loss)
        count, ratio = len(scores.loss), statistics.mean(scores.ratio)
        mean = math.exp(statistics.mean(scores.loss))
        self.add(method, label, "bytes_ratio", ratio, n=count, unit="of full 16-bit cache", setting=setting)
        interval = (math.exp(low), math.exp(high))
        self.add(method, label, "perplexity", mean, ci=interval, n=count, unit="per token", setting=setting)
        shown = f"{label:<26} {setting} bytes {ratio:.3f}  perplexity {mean:.4f}"
        for metric, values in (("rouge_l", scores.rouge), ("lookup", scores.lookup)):
            if values:
                value = statistics.mean(values)
                self.add(method, label, metric, value, ci=bootstrap_ci(values), n=len(values), setting=setting)
                shown += f"  {metric} {value:.3f}"
        print(shown, flush=True)

    def compare(self, method: CacheMethod, ours: Scores, theirs: Scores, against: str, **setting: Any) -> None:
        """How much Elastic Cache saves over ``against``, in nats a token, paired by mosaic; in how many seeds."""
        difference, interval = paired_difference(theirs.loss, ours.loss)
        share = len(ours.loss) // self.seeds
        parts = [slice(seed * share, (seed + 1) * share) for seed in range(self.seeds)]
        won = sum(sum(ours.loss[part]) < sum(theirs.loss[part]) for part in parts)
        setting |= {"against": against, "lower_in_seeds": won}
        count = len(ours.loss)
        self.add(method, "Elastic", "loss_saved", difference, ci=interval, n=count, unit="nats per token", setting=setting)
        print(f"  saved over {against}: {difference:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}], {won} seeds", flush=True)


def fitted(method: CacheMethod, budget: float, reader: Reader) -> CacheMethod | None:
    try:
        return method.at_budget(budget, reader.prompt_tokens, reader.geometry)
    except Unreachable as error:
        print(f"{type(method).__name__} cannot get down to {budget}: {error}")
        return None


def study(report: Report) -> None:
    reader = report.reader
    report.scores(Full(), "full", reader.run(Full()))
    for budget in BUDGETS:
        found: dict[str, Scores] = {}
        for label, method in (RIVALS | VARIANTS if budget == 0.5 else RIVALS).items():
            exact = fitted(method, budget, reader)
            if exact is None:
                continue
            found[label] = reader.run(exact, lookups=label in RIVALS)
            report.scores(exact, label, found[label], budget=budget)
            if label != "Elastic":
                report.compare(exact, found["Elastic"], found[label], label, budget=budget)
    half = fitted(ElasticCache(), 0.5, reader)
    assert isinstance(half, ElasticCache)
    slots = round(half.budget * reader.prompt_tokens)
    for place in EXITS:
        method = ElasticCache(budget=half.budget, exit_slot=max(1, round(place * slots)))
        report.scores(method, "Elastic", reader.run(method, lookups=False), budget=0.5, exit=place)


def card(report: Report) -> str:
    """The model's card: accuracy with the full cache on held-out mosaics."""
    reader = report.reader
    parameters = sum(p.numel() for p in reader.model.parameters())
    mosaics = [mosaic for batch in reader.batches for mosaic in batch]
    rows = []
    asks = (
        ("describe the picture (18 digits)", lambda m: describe(m)),
        ("look a digit up", lambda m: look_up(m, 2, 3)),
        ("read a row", lambda m: read_row(m, 2)),
        ("add a row up", lambda m: add_row(m, 2)),
    )
    for label, ask in asks:
        right: list[float] = []
        for batch in reader.batches:
            by_length: dict[int, list[Mosaic]] = {}  # sums have one or two digits, but always as many tokens; be sure
            for mosaic in batch:
                by_length.setdefault(reader.prompt([ask(mosaic)])[1].shape[1], []).append(mosaic)
            for some in by_length.values():
                turns = [ask(mosaic) for mosaic in some]
                _, said, _ = reader.answer(Full(), some, turns)
                right += (said == reader.prompt(turns)[1]).all(1).float().tolist()
        low, high = bootstrap_ci(right)
        report.add(Full(), "full", f"card: {label}", statistics.mean(right), ci=(low, high), n=len(right))
        rows.append(f"| {label} | {100 * statistics.mean(right):.1f} % [{100 * low:.1f}–{100 * high:.1f}] |")
    return "\n".join(
        [
            f"# {MODEL}",
            "",
            f"A LLaVA of {parameters:,} parameters: a CLIP vision tower of two layers on 2 x 2 patches, a projector, and a "
            f"Llama of {reader.geometry.layers} layers and width {reader.geometry.hidden_size}. Trained from scratch on "
            "mosaics of nine handwritten digits (scikit-learn's), "
            f"{PATCHES} patches each, by `broadsheet train-pocket FOLDER --recipe {MODEL}`.",
            "",
            f"Whole answers right with the full cache, on {len(mosaics)} mosaics of digits that training never saw, "
            f"measured by `benchmarks/elastic_vision.py` on {now()[:10]}:",
            "",
            "| instruction | right |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="another folder with such a model: print only")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--mosaics", type=int, default=50, help="of each seed")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    report = Report(Reader(model, tokenizer, arguments.seeds, arguments.mosaics), arguments.seeds)
    text = card(report)
    print(text)
    study(report)
    if arguments.model == MODEL:
        (POCKET_FOLDER / MODEL / "README.md").write_text(text, encoding="utf-8")
        write_results(report.records, RESULTS)


if __name__ == "__main__":
    main()
