"""Cost models of StableHLO programs on XLA's CPU compiler: a corpus, the models on two splits, and what they are good for.

    python benchmarks/mlir_cost_study.py corpus --rows 4500     # about four programs a second; stopped and resumed at will
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from broadsheet.methods.estimates.mlir_cost_model import corpus as corpora


def corpus(arguments: argparse.Namespace) -> None:
    began, first = time.time(), list[int]()

    def tick(done: int, of: int) -> None:
        first.append(done)
        if done % 50 == 0:
            rate = len(first) / (time.time() - began)
            print(f"{done} of {of}, {rate:.1f} a second", file=sys.stderr, flush=True)

    rows = corpora.build(arguments.corpus, arguments.rows, arguments.seed, tick)
    print(f"{len(rows)} programs of {arguments.rows}; the rest occur twice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("corpus",))
    parser.add_argument("--corpus", type=Path, default=Path("mlir_corpus.jsonl"))
    parser.add_argument("--rows", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    {"corpus": corpus}[arguments.step](arguments)


if __name__ == "__main__":
    main()
