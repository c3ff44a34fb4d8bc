"""Scores of answers: strict by default, ``compat=True`` for the official ones (paper section 4).

Strict scoring reads whole words, takes negation for what it is, and counts what cannot be read as *unparsed*: wrong, and
shown. The official scorers differ in this (each measured, see ``tests/golden/README.md``):

- sentiment: "positive" anywhere wins, so "not positive" is positive, and so is "negative, not positive"; whatever names no
  class is *neutral*, the most frequent class, an empty answer too.
- headline: "yes" anywhere, so "yesterday" and "eyes" are yes; everything else is no.
- ner: answers are cut at every comma, so that "Acme, Inc." is never found; entities that the sentence does not have cost
  nothing; a type that does not exist becomes a type of its own.
- re: a triple whose relation or words do not exist costs nothing; a right triple may be said twice and counts twice;
  without any prediction it divides by zero (nan here).

For single-label classes micro-F1 is accuracy; it is given with the official scores alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from broadsheet.core.replies import answer_part

from .rows import ENTITY_TYPES, LABELS, QUESTIONS, RELATIONS, SEVEN, check_relation


@dataclass(frozen=True)
class Result:
    """``metrics`` with their 95 % intervals ``ci95`` (bootstrap over answers), and how many of ``n`` answers could not be
    read."""

    metrics: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    unparsed: int
    n: int


Counts = np.ndarray  # [answers, what is counted]


def _result(counts: Counts, of: Callable[[Counts], dict[str, np.ndarray]], unparsed: int, draws: int = 2000) -> Result:
    """Metrics of summed counts, and of sums of counts drawn with replacement. ``of``: [draws, counted] -> [draws] by
    name."""
    n = len(counts)
    kinds, times = np.unique(counts, axis=0, return_counts=True)  # equal answers are drawn together: few kinds, many answers
    weights = np.random.default_rng(0).multinomial(n, times / n, draws)
    drawn = of(weights @ kinds)
    ci = {
        name: tuple(np.nanquantile(values, (0.025, 0.975)).tolist())
        for name, values in drawn.items()
        if not np.isnan(values).all()
    }
    metrics = {name: float(value[0]) for name, value in of(counts.sum(0, keepdims=True)).items()}
    return Result(metrics, ci, unparsed, n)


def _checked(*lists: Sequence[str]) -> None:
    sizes = {len(some) for some in lists}
    if len(sizes) > 1:
        raise ValueError(f"predictions, golds and inputs differ in number: {', '.join(str(len(some)) for some in lists)}")
    if sizes == {0}:
        raise ValueError("the test split is empty: there is nothing to score")


def _ratio(top: np.ndarray, bottom: np.ndarray, nothing: float = 0.0) -> np.ndarray:
    top, bottom = top.astype(float), bottom.astype(float)
    return np.divide(top, bottom, out=np.full_like(top, nothing), where=bottom > 0)


# --- classes ------------------------------------------------------------------------------------------------------------


def _classes(golds: Sequence[str], answers: Sequence[str | None], labels: Sequence[str], official: bool) -> Result:
    """Accuracy and F1 over classes. The macro mean is over ``labels`` that are a gold or (official) a prediction."""
    names = [*labels, None]
    cells = [names.index(gold) * len(names) + names.index(said) for gold, said in zip(golds, answers, strict=True)]
    counts = np.eye(len(names) ** 2, dtype=int)[cells]
    total = counts.sum(0).reshape(len(names), len(names))
    shown = [i for i in range(len(labels)) if total[i].sum() or (official and total[:, i].sum())]

    def of(sums: Counts) -> dict[str, np.ndarray]:
        table = sums.reshape(-1, len(names), len(names))
        hits = np.stack([table[:, i, i] for i in shown], -1)
        gold, said = table.sum(2)[:, shown], table.sum(1)[:, shown]
        f1 = _ratio(2 * hits, gold + said)
        found = {
            "accuracy": _ratio(hits.sum(-1), table.sum((1, 2))),
            "f1_macro": f1.mean(-1),
            "f1_weighted": (f1 * gold).sum(-1) / gold.sum(-1),
        }
        return {**found, "f1_micro": found["accuracy"]} if official else found

    return _result(counts, of, sum(said is None for said in answers))


#: a negation, with up to three words behind it that do not end its reach
_NOT = re.compile(
    r"(?:\b(?:not|never|neither|nor|no|without|hardly)|n't)\s+"
    r"(?:(?!(?:but|so|hence|rather|yet|negative|neutral|positive)\b)\w+\s+){0,3}$",
    re.I,
)
_SENTIMENT = re.compile(r"\b(?:(strong|moderate|mild)(?:ly)?\s+)?(negative|neutral|positive)\b", re.I)


def read_sentiment(text: str) -> str | None:
    """The one class that is affirmed, or None where there is none or several. A mild one is neutral, as in NWGI's test."""
    part, said = answer_part(text), set()
    for word in _SENTIMENT.finditer(part):
        if not _NOT.search(part[max(0, word.start() - 60) : word.start()]):
            mild = word[1] and word[1].lower() == "mild"
            said.add("neutral" if mild else word[2].lower())
    return said.pop() if len(said) == 1 else None


def official_sentiment(text: str) -> str:
    return "positive" if re.search("[pP]ositive", text) else "negative" if re.search("[nN]egative", text) else "neutral"


def score_sentiment(preds: Sequence[str], golds: Sequence[str], compat: bool = False) -> Result:
    """Accuracy, macro and weighted F1 over the three classes; golds of seven classes count as three."""
    _checked(preds, golds)
    mapped = [SEVEN.get(gold, gold) for gold in golds]
    if unknown := set(mapped) - set(LABELS):
        raise ValueError(f"'{unknown.pop()}' is no gold label of sentiment")
    read = official_sentiment if compat else read_sentiment
    return _classes(mapped, [read(text) for text in preds], LABELS, compat)


_YES_NO = re.compile(r"\b(yes|no)\b", re.I)


def read_yes_no(text: str) -> str | None:
    """Yes or no as whole words, when only one of them is said, and not "not yes"."""
    part = answer_part(text)
    said = {word[1].lower() for word in _YES_NO.finditer(part) if not re.search(r"\bnot\s+$", part[: word.start()], re.I)}
    return said.pop() if len(said) == 1 else None


def official_yes_no(text: str) -> str:
    return "yes" if "yes" in text.lower() else "no"


def score_headline(preds: Sequence[str], golds: Sequence[str], kinds: Sequence[str] = (), compat: bool = False) -> Result:
    """Accuracy and the F1 of yes; with ``kinds`` (which of the nine questions) also by question, and their mean."""
    _checked(preds, golds, *([kinds] if kinds else []))
    wanted = ["yes" if gold.lower() == "yes" else "no" for gold in golds]
    answers = [(official_yes_no if compat else read_yes_no)(text) for text in preds]
    asked = [kind for kind in QUESTIONS if kind in kinds]
    counts = np.zeros((len(preds), 4 + 3 * len(asked)), dtype=int)  # right, yes that is yes, said yes, is yes; by question
    for row, (gold, said) in enumerate(zip(wanted, answers, strict=True)):
        both = (gold == said == "yes", said == "yes", gold == "yes")
        counts[row, 0], counts[row, 1:4] = gold == said, both
        if kinds and kinds[row] in asked:
            place = 4 + 3 * asked.index(kinds[row])
            counts[row, place : place + 3] = both
    n = len(preds)

    def of(sums: Counts) -> dict[str, np.ndarray]:
        found = {"accuracy": sums[:, 0] / n, "f1": _ratio(2 * sums[:, 1], sums[:, 2] + sums[:, 3])}
        for number, kind in enumerate(asked):
            hits, said, gold = sums[:, 4 + 3 * number : 7 + 3 * number].T
            found[f"f1 {kind}"] = _ratio(2 * hits, said + gold)
        if asked:
            found["f1_questions"] = np.mean([found[f"f1 {kind}"] for kind in asked], axis=0)
        return found

    return _result(counts, of, sum(said is None for said in answers))


# --- extraction ---------------------------------------------------------------------------------------------------------


def _overlap(pairs: Sequence[tuple[Counter, Counter]]) -> Counts:
    """(hits, said, wanted) of multisets."""
    return np.array([((said & gold).total(), said.total(), gold.total()) for said, gold in pairs])


def _prf(prefix: str, hits: np.ndarray, said: np.ndarray, gold: np.ndarray) -> dict[str, np.ndarray]:
    return {
        f"{prefix}precision": _ratio(hits, said),
        f"{prefix}recall": _ratio(hits, gold),
        f"{prefix}f1": _ratio(2 * hits, said + gold),
    }


_ENTITY = re.compile(r"\s*(.+?)\s+is\s+an?\s+(person|organization|organisation|location)\s*(?:[,;.\n]|\band\b|$)", re.I)
_TYPES = {**{name: tag for tag, name in ENTITY_TYPES.items()}, "organisation": "ORG"}


def read_entities(text: str) -> list[tuple[str, str]] | None:
    """(entity, type) of every "E is a T", in order, or None where there is none."""
    part = answer_part(text)
    found = [(read[1].strip(" ,;"), _TYPES[read[2].lower()]) for read in _ENTITY.finditer(part)]
    return found or None


def _spans(tokens: Sequence[str], entities: Sequence[tuple[str, str]]) -> Counter:
    """Entities at the first place that is still free. One that is nowhere has no place, and is wrong."""
    taken = [False] * len(tokens)
    found: Counter = Counter()
    for text, kind in entities:
        words = text.lower().split()
        size = len(words)
        for start in range(len(tokens) - size + 1):
            if words and list(tokens[start : start + size]) == words and not any(taken[start : start + size]):
                taken[start : start + size] = [True] * size
                found[kind, start, start + size] += 1
                break
        else:
            found[kind, -1, -1] += 1
    return found


def _official_entities(text: str) -> list[tuple[str, str]]:
    read = [re.match(r"^(.*) is an? (.*)$", part) for part in text.lower().strip(".").split(",")]
    names = {name: tag for tag, name in ENTITY_TYPES.items()}
    return [(found[1].strip(), names.get(found[2].strip(), "O")) for found in read if found]


def score_ner(preds: Sequence[str], golds: Sequence[str], inputs: Sequence[str], compat: bool = False) -> Result:
    """Micro precision, recall and F1 of entities (type and place), over all and by type."""
    _checked(preds, golds, inputs)
    kinds = [*ENTITY_TYPES, "O"] if compat else list(ENTITY_TYPES)
    counts, unparsed = [], 0
    for said, gold, text in zip(preds, golds, inputs, strict=True):
        tokens = text.lower().split()
        if compat:
            found, meant = (_placed(_spans(tokens, _official_entities(one))) for one in (said, gold))
        else:
            read, wanted = read_entities(said), read_entities(gold)
            if wanted is None:
                raise ValueError(f"a gold answer names no entity: '{gold[:80]}'")
            unparsed += read is None
            found, meant = _spans(tokens, read or ()), _spans(tokens, wanted)
        counts.append(_overlap([(_of(found, kind), _of(meant, kind)) for kind in kinds]).ravel())

    def of(sums: Counts) -> dict[str, np.ndarray]:
        table = sums.reshape(len(sums), len(kinds), 3)
        found = _prf("", *table.sum(1).T)
        for number, kind in enumerate(kinds):
            found |= {name: value for name, value in _prf(f"{kind} ", *table[:, number].T).items() if name.endswith("f1")}
        return found

    return _result(np.array(counts), of, unparsed)


def _placed(spans: Counter) -> Counter:
    return Counter({span: count for span, count in spans.items() if span[1] >= 0})


def _of(spans: Counter, kind: str) -> Counter:
    return Counter({span: count for span, count in spans.items() if span[0] == kind})


def read_triples(text: str, source: str) -> list[tuple[str, str, str]] | None:
    """(relation, head, tail) of every "relation: head, tail" between semicolons, or None where there is none. Of several
    commas the one counts that leaves two parts which ``source`` has."""
    found = []
    for part in re.split(r"[;\n]", answer_part(text).rstrip(". ")):
        name, colon, rest = part.partition(":")
        cuts = [place for place, letter in enumerate(rest) if letter == ","]
        if colon and cuts:
            pairs = [(rest[:cut].strip(), rest[cut + 1 :].strip()) for cut in cuts[:20]]
            head, tail = next((pair for pair in pairs if all(end and end in source for end in pair)), pairs[0])
            found.append((re.sub(r"\s+", "_", name.strip(" -*\"'").lower()), head, tail))
    return found or None


def _official_triples(text: str, source: str) -> list[tuple[str, str, str]]:
    found = []
    for part in text.strip(".").split(";"):
        if read := re.match(r"^(.*):(.*),(.*)$", part):
            name, head, tail = (read[i].strip() for i in (1, 2, 3))
            if name in RELATIONS and head in source and tail in source:
                found.append((name, head, tail))
    return found


def score_re(preds: Sequence[str], golds: Sequence[str], inputs: Sequence[str], compat: bool = False) -> Result:
    """Micro precision, recall and F1 of triples, and of relations alone (``relation_*``)."""
    _checked(preds, golds, inputs)
    counts, unparsed = [], 0  # true positives, false positives, false negatives; of triples, of relations
    for said, gold, text in zip(preds, golds, inputs, strict=True):
        if compat:
            found, wanted = _official_triples(said, text), _official_triples(gold, text)
        else:
            read, known = read_triples(said, text), read_triples(gold, text)
            if known is None:
                raise ValueError(f"a gold answer has no triple: '{gold[:80]}'")
            for name, _, _ in known:
                check_relation(name)
            unparsed += read is None
            found, wanted = read or [], known
        row: list[int] = []
        for cut in (3, 1):
            some, all_of = [triple[:cut] for triple in found], [triple[:cut] for triple in wanted]
            if compat:  # membership, not matching: what is said twice counts twice
                hits, missed = sum(one in all_of for one in some), sum(one not in some for one in all_of)
            else:
                hits = (Counter(some) & Counter(all_of)).total()
                missed = len(all_of) - hits
            row += [hits, len(some) - hits, missed]
        counts.append(row)
    nothing = float("nan") if compat else 0.0

    def of(sums: Counts) -> dict[str, np.ndarray]:
        made: dict[str, np.ndarray] = {}
        for prefix, (hits, wrong, missed) in (("", sums[:, :3].T), ("relation_", sums[:, 3:].T)):
            precision, recall = _ratio(hits, hits + wrong, nothing), _ratio(hits, hits + missed, nothing)
            both = precision + recall
            f1 = np.divide(2 * (precision * recall), both, out=np.full_like(both, nothing), where=both > 0)
            made |= {f"{prefix}precision": precision, f"{prefix}recall": recall, f"{prefix}f1": f1}
        return made

    return _result(np.array(counts), of, unparsed)


def official_reading(family: str, text: str, source: str) -> Any:
    """What the official scorers make of one answer to an input, in a form that can be compared."""
    if family in ("sentiment", "headline"):
        return official_sentiment(text) if family == "sentiment" else official_yes_no(text)
    if family == "ner":
        return _placed(_spans(source.lower().split(), _official_entities(text)))
    return Counter(_official_triples(text, source))


def read_option(text: str, options: Sequence[str]) -> str | None:
    """The one of ``options`` that is named (as a whole, any case; of one that contains another the longer), or None."""
    part, said = " ".join(answer_part(text).lower().replace("_", " ").split()), set()
    for option in sorted(options, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(option.lower().replace('_', ' '))}(?!\w)"
        for word in re.finditer(pattern, part):
            if not _NOT.search(part[max(0, word.start() - 60) : word.start()]):
                said.add(option)
        part = re.sub(pattern, "#", part)
    return said.pop() if len(said) == 1 else None


def score_options(preds: Sequence[str], golds: Sequence[str], options: Sequence[Sequence[str]]) -> Result:
    """Accuracy of answers that choose one of the options listed in their question."""
    _checked(preds, golds)
    answers = [read_option(text, some) for text, some in zip(preds, options, strict=True)]
    right = np.array([[said == gold] for said, gold in zip(answers, golds, strict=True)], dtype=int)
    return _result(right, lambda sums: {"accuracy": sums[:, 0] / len(preds)}, sum(said is None for said in answers))


def vote(preds: Sequence[str], groups: Sequence[str]) -> dict[str, str]:
    """The class that most wordings of one question give: positive or negative, neutral when they tie (unread ones do not
    vote)."""
    votes: dict[str, Counter] = {}
    for text, group in zip(preds, groups, strict=True):
        votes.setdefault(group, Counter())[read_sentiment(text)] += 1
    balance = {group: count["positive"] - count["negative"] for group, count in votes.items()}
    return {group: "positive" if b > 0 else "negative" if b < 0 else "neutral" for group, b in balance.items()}
