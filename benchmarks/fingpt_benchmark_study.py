"""FinGPT-Benchmark: what models must beat, what the official scorers make of answers that nobody can read, how mixtures mix.

    python benchmarks/fingpt_benchmark_study.py [--shared FOLDER]

Writes `benchmarks/results/fingpt_benchmark_study.records.json`. ``--shared`` holds tfns_valid/sent_valid.csv and
financial_phrasebank (CC BY-NC-SA 3.0: evaluation only): TF-IDF with logistic regression by 5-fold cross-validation on the
tweets and on the official split of the phrase bank, beside the majority. The rest is SYNTHETIC or SIMULATED: baselines on
synthetic rows of all families, a simulated classifier under both scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from broadsheet.core.chat.simulated import Draw
from broadsheet.core.records import Record, now, provenance, write_results
from broadsheet.methods.evals.fingpt_benchmark import (
    MULTI,
    FinTask,
    Result,
    Row,
    baselines,
    build_mix,
    score_rows,
    score_sentiment,
)
from broadsheet.methods.evals.fingpt_benchmark.readers import random_split, read_fpb, read_tfns
from broadsheet.methods.evals.fingpt_benchmark.world import SimClassifier

SEEDS = 3
CONFUSION = {
    "negative": {"negative": 0.8, "neutral": 0.15, "positive": 0.05},
    "neutral": {"negative": 0.1, "neutral": 0.7, "positive": 0.2},
    "positive": {"negative": 0.05, "neutral": 0.05, "positive": 0.9},
}


def records(method: str, result: Result, seed: int, model: str = "", **setting) -> list[Record]:
    shared = {"paper": "fingpt-benchmark", "method": method, "bench": "fingpt-benchmark-study", "seed": seed, "model": model,
              "n": result.n, "setting": setting, "time": now(), **provenance()}  # fmt: skip
    found = [Record(metric=name, value=value, ci=result.ci95.get(name), **shared) for name, value in result.metrics.items()
             if not name.startswith("f1 ")]  # fmt: skip
    found.append(Record(metric="unparsed_share", value=result.unparsed / result.n, **shared))
    said = ", ".join(f"{r.metric} {r.value:.3f}" for r in found)
    print(f"{method:18} {setting}: {said}")
    return found


def public(shared: Path) -> list[Record]:
    found = []
    tweets = read_tfns(shared / "tfns_valid" / "sent_valid.csv")
    golds = [row.output for row in tweets]
    found += records("majority", score_sentiment(baselines.majority(tweets, tweets), golds), 0, data="tfns validation")
    for seed in range(SEEDS):
        answers = baselines.cross_validated(tweets, 5, seed)
        found += records("tfidf", score_sentiment(answers, golds), seed, data="tfns validation", folds=5)
    unreadable = score_sentiment([""] * len(tweets), golds, compat=True)
    found += records("says nothing", unreadable, 0, data="tfns validation", scores="official")
    found += records("says nothing", score_sentiment([""] * len(tweets), golds), 0, data="tfns validation", scores="strict")
    bank = read_fpb(shared / "financial_phrasebank" / "Sentences_50Agree.txt", accept_noncommercial=True)
    train, test = ([bank[i] for i in part] for part in random_split(len(bank), 0.25, 42))
    for method in (baselines.majority, baselines.tfidf):
        found += records(method.__name__, score_rows(test, method(train, test)), 42, data="fpb, official split")
    return found


def synthetic(seed: int) -> list[Record]:
    found = []
    for name in ("sentiment", "headline", "ner", "finred-re"):
        split, cell = FinTask(name, items=600, seed=seed).load(), {"data": "SYNTHETIC", "task": name}
        if name in ("sentiment", "headline"):
            rivals = {"majority": baselines.majority, "tfidf": baselines.tfidf}
        else:
            rivals = {"majority": baselines.majority}
        for method, predict in rivals.items():
            found += records(method, score_rows(split.test, predict(split.train, split.test)), seed, **cell)
        if name == "ner":
            said = baselines.Gazetteer().fit(split.train).predict(split.test)
            found += records("gazetteer", score_rows(split.test, said), seed, **cell)
    return found


def simulated(rows: list[Row], seed: int) -> list[Record]:
    found = []
    for broken in (0.0, 0.2, 0.5):
        world = SimClassifier(rows, CONFUSION, broken)
        draws = [Draw(f"study {seed} {broken} {number}") for number in range(len(rows))]
        answers = [world.answer(row.output, draw) for row, draw in zip(rows, draws, strict=True)]
        expected = world.expected_accuracy([row.output for row in rows])
        count = sum(world.broken(draw) for draw in draws) / len(rows)
        for scores in ("strict", "official"):
            result = score_rows(rows, answers, compat=scores == "official")
            cell = {
                "data": "SYNTHETIC",
                "format_error": broken,
                "expected": expected,
                "format_errors": count,
                "scores": scores,
            }
            found += records("simulated classifier", result, seed, "sim:classifier", **cell)
    return found


def mixture(seed: int) -> list[Record]:
    """The largest difference between a task's share of a stretch of the run and its share of the mixture."""
    mix = build_mix(MULTI, seed, items=200)
    names = [name for name, _ in mix.named()]
    worst = max(
        abs(names[: len(names) * tenth // 10].count(name) / (len(names) * tenth // 10) - share)
        for name, share in mix.proportions.items()
        for tenth in range(1, 11)
    )
    shares = {name: round(share, 4) for name, share in mix.proportions.items()}
    return [
        Record("fingpt-benchmark", "mixture", "fingpt-benchmark-study", "largest_deviation", worst, n=len(names), seed=seed,
               setting={"mix": MULTI, "shares": shares, "data": "SYNTHETIC"}, time=now(), **provenance())
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, help="a folder with tfns_valid and financial_phrasebank")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "fingpt_benchmark_study.records.json"))
    arguments = parser.parse_args()
    found = public(arguments.shared) if arguments.shared else []
    for seed in range(SEEDS):
        rows = list(FinTask("sentiment", items=2400, seed=seed).load().train)
        found += synthetic(seed) + simulated(rows, seed) + mixture(seed)
    write_results(found, arguments.out)


if __name__ == "__main__":
    main()
