"""What SPaR learns from: preference pairs for the actor, judgements and refinements for the refiner."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from broadsheet.core.loops import Judgement, Node

from .prompts import judge_messages, refine_messages

if TYPE_CHECKING:
    from . import SearchResult

Row = dict[str, Any]


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for equal texts. Time grows with the product of the
    lengths."""
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    x, y = (np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32) for text in (a, b))
    if len(x) > len(y):
        x, y = y, x  # the loop is over the shorter one
    steps = np.arange(len(y) + 1)
    row = steps.copy()
    for number, character in enumerate(x):
        above = np.minimum(row[1:] + 1, row[:-1] + (y != character))
        row = np.concatenate(([number + 1], above))
        row = np.minimum.accumulate(row - steps) + steps  # insertions, all at once
    return float(1 - row[-1] / len(y))


@dataclass(frozen=True)
class Judged:
    """An answer of the actor and the votes on it."""

    prompt: str
    text: str
    judgement: Judgement


@dataclass(frozen=True)
class Pairs:
    """``rows``: ``prompt``, ``chosen``, ``rejected`` as chats (what TRL's trainers take), and the ``similarity`` of the two
    answers. ``trees`` and ``judged`` are what they came from; ``dissimilar`` counts the pairs that were dropped."""

    rows: tuple[Row, ...]
    trees: tuple[SearchResult, ...]
    judged: tuple[Judged, ...]
    dissimilar: int = 0

    @classmethod
    def of(cls, found: Sequence[tuple[list[Judged], SearchResult | None, str]], min_similarity: float) -> Pairs:
        rows, dropped = [], 0
        for _, tree, chosen in found:
            if tree is None or tree.root is None or not chosen or chosen == tree.root.text:
                continue
            similarity = edit_similarity(chosen, tree.root.text)
            if similarity < min_similarity:
                dropped += 1
                continue
            rows.append(
                {
                    "prompt": [{"role": "user", "content": tree.prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": tree.root.text}],
                    "similarity": similarity,
                }
            )
        trees = tuple(tree for _, tree, _ in found if tree)
        return cls(tuple(rows), trees, tuple(one for judged, _, _ in found for one in judged), dropped)

    @property
    def similarity(self) -> float:
        """The meter of pair quality: mean normalised edit similarity of chosen and rejected (nan without pairs)."""
        return statistics.fmean(row["similarity"] for row in self.rows) if self.rows else float("nan")

    def dataset(self) -> Any:
        """A `datasets.Dataset` where that is installed, else the rows."""
        try:
            from datasets import Dataset
        except ImportError:
            return list(self.rows)
        return Dataset.from_list(list(self.rows))


@dataclass(frozen=True)
class Caps:
    """How many rows of each kind the refiner learns from at most, as in the official code."""

    refine: int = 4000
    tree_yes: int = 1500
    tree_no: int = 1000
    root_no: int = 500
    root_yes: int = 2500


def build_refiner_sft(
    trees: Sequence[SearchResult], judged: Sequence[Judged], caps: Caps | None = None, seed: int = 0
) -> list[Row]:
    """Rows ``messages``, ``kind`` for tuning the refiner, shuffled.

    ``refine``: the step to an accepted answer (its parent's judgement, then the refinement); ``tree_yes`` and
    ``tree_no``: one judgement a tree on which the votes were divided, in favour and against; ``root_no`` and
    ``root_yes``: judgements of the actor's answers on which they were divided. Unanimous judgements teach nothing and
    are left out. No two rows begin with the same judgement prompt; the first kind that has it keeps it, before the
    caps (after them in the official code).
    """
    rng = random.Random(seed)
    kinds: dict[str, list[Row]] = {name: [] for name in Caps.__dataclass_fields__}
    for tree in trees:
        best, root = tree.best, tree.root
        if best and best.accepted and best.parent and best.parent.judgement:
            told = refine_messages(tree.prompt, best.parent.text, best.parent.judgement.feedback)
            kinds["refine"].append({"messages": [*told, {"role": "assistant", "content": best.raw}]})
        below = list(root.walk())[1:] if root else []
        for kind, fits in (("tree_yes", _divided_yes), ("tree_no", _divided_no)):
            if divided := [node for node in below if fits(node)]:
                node = rng.choice(divided)
                assert node.judgement
                kinds[kind].append(_judging(tree.prompt, node.text, node.judgement))
    for one in judged:
        votes = one.judgement.detail["votes"]
        if True in votes and False in votes and one.judgement.decided:
            kind = "root_yes" if one.judgement.value > 0.5 else "root_no"
            kinds[kind].append(_judging(one.prompt, one.text, one.judgement))
    seen: set[str] = set()
    rows: list[Row] = []
    for kind, some in kinds.items():
        rng.shuffle(some)
        new: list[Row] = []
        for row in some:
            if row["messages"][0]["content"] not in seen and len(new) < getattr(caps or Caps(), kind):
                seen.add(row["messages"][0]["content"])
                new.append({**row, "kind": kind})
        rows += new
    rng.shuffle(rows)
    return rows


def _judging(prompt: str, text: str, judgement: Judgement) -> Row:
    return {"messages": [*judge_messages(prompt, text), {"role": "assistant", "content": judgement.feedback}]}


def _divided_yes(node: Node) -> bool:
    return 0.5 < node.value < 1


def _divided_no(node: Node) -> bool:
    return 0 < node.value < 0.5
