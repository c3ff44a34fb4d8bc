"""What everything is made of: rows of instruction, input and answer, and how tasks are worded (paper section 3)."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal["sentiment", "headline", "ner", "re"]
FAMILIES: tuple[Family, ...] = ("sentiment", "headline", "ner", "re")

LABELS = ("negative", "neutral", "positive")
#: the seven classes of NWGI and the three that they are tested as
SEVEN = {
    "strong negative": "negative", "moderately negative": "negative", "mildly negative": "neutral", "neutral": "neutral",
    "mildly positive": "neutral", "moderately positive": "positive", "strong positive": "positive",
}  # fmt: skip
ENTITY_TYPES = {"PER": "person", "ORG": "organization", "LOC": "location"}
RELATIONS = (
    "product_or_material_produced manufacturer distributed_by industry position_held original_broadcaster owned_by "
    "founded_by distribution_format headquarters_location stock_exchange currency parent_organization "
    "chief_executive_officer director_/_manager owner_of operator member_of employer chairperson platform subsidiary "
    "legal_form publisher developer brand business_division location_of_formation creator"
).split()
#: the nine questions to a headline, in their order
QUESTIONS = (
    "price or not",
    "price up",
    "price stable",
    "price down",
    "price past",
    "price future",
    "event past",
    "event future",
    "asset comp",
)
_SUBJECTS = (
    "price", "price going up", "price staying constant", "price going down", "price in the past", "price in the future",
    "a general event (apart from prices) in the past", "a general event (apart from prices) in the future",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row. ``family``: the kind of task; ``source``: the data it is from; ``kind``: the question to a headline;
    ``group``: what it asks about, the same for all wordings of one question; ``options``: what may be answered, where they
    are listed."""

    instruction: str
    input: str
    output: str
    family: Family
    source: str
    kind: str = ""
    group: str = ""
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model reads; its answer follows."""
        return f"Instruction: {self.instruction}\nInput: {self.input}\nAnswer: " if self.instruction else self.input

    @property
    def digest(self) -> str:
        """A hash of the input that capitals, punctuation and spaces do not change: near-copies have it too."""
        return hashlib.sha256(re.sub(r"[\W_]+", "", self.input.lower()).encode("utf-8", "replace")).hexdigest()[:16]


def check_apart(train: Iterable[Row], held_out: Iterable[Row], family: Family) -> None:
    """Raises ValueError when a training row is of the held-out family or has the input of one of its rows."""
    seen = {row.digest for row in held_out}
    for row in train:
        if row.family == family or row.digest in seen:
            raise ValueError(f"a training row is of the held-out family {family}: '{row.input[:60]}' ({row.source})")


def shared_inputs(train: Iterable[Row], test: Sequence[Row]) -> list[Row]:
    """Test rows whose input, or a near-copy of it, is trained on: FPB and TFNS have some, and their scores are flattered."""
    seen = {row.digest for row in train}
    return [row for row in test if row.digest in seen]


# --- wordings. Those of the three tuned phases are the benchmark's; of the reformulations (CLS) only the number is.
# ---------


def sentiment(text: str, label: str, source: str, kind: str = "news", classes: Sequence[str] = LABELS) -> Row:
    question = f"What is the sentiment of this {kind}? Please choose an answer from {{{'/'.join(classes)}}}."
    return Row(question, text, label, "sentiment", source, kind)


def headline(text: str, labels: Sequence[bool], source: str) -> list[Row]:
    """Nine rows; ``labels`` in the order of `QUESTIONS`."""
    asked = [f"Does the news headline talk about {subject}?" for subject in _SUBJECTS]
    asked.append("Does the news headline compare gold with any other asset?")
    return [
        Row(f"{question} Please choose an answer from {{Yes/No}}.", text, "Yes" if label else "No", "headline", source, kind)
        for question, label, kind in zip(asked, labels, QUESTIONS, strict=True)
    ]


def ner(tokens: Sequence[str], entities: Sequence[tuple[str, str]], source: str) -> Row:
    """``entities``: (text, "person" | "organization" | "location")."""
    answer = ", ".join(f"{text} is {'an' if kind == 'organization' else 'a'} {kind}" for text, kind in entities) + "."
    asked = (
        "Please extract entities and their types from the input sentence, entity types should be chosen from "
        "{person/organization/location}."
    )
    return Row(asked, " ".join(tokens), answer, "ner", source)


def check_relation(name: str) -> str:
    """The relation's name with underscores. Raises ValueError for one that is not of the 29."""
    known = re.sub(r"\s+", "_", name.strip())
    if known not in RELATIONS:
        raise ValueError(f"'{name}' is none of the 29 relations of FinRED")
    return known


def relations(text: str, triples: Sequence[tuple[str, str, str]], source: str, classify: bool = True) -> list[Row]:
    """Two rows that ask for all triples (head, tail, relation), and two for every triple that ask for its relation."""
    named = [(head, tail, check_relation(relation)) for head, tail, relation in triples]
    answer, form = "; ".join(f"{r}: {h}, {t}" for h, t, r in named), '"relation1: word1, word2; relation2: word3, word4"'
    asked = (
        "Given phrases that describe the relationship between two words/phrases as options, extract the word/phrase pair "
        f"and the corresponding lexical relationship between them from the input text. The output format should be {form}. "
        f"Options: {', '.join(RELATIONS)}.",
        "Given the input sentence, please extract the subject and object containing a certain relation in the sentence "
        f"according to the following relation types, in the format of {form}. Relations include: {'; '.join(RELATIONS)}.",
    )
    rows = [Row(question, text, answer, "re", source, "extract") for question in asked]
    for head, tail, relation in named if classify else ():
        for question in (
            "Utilize the input text as a context reference, choose the right relationship between "
            f"{head} and {tail} from the options. Options: {', '.join(RELATIONS)}.",
            f"What is the relationship between {head} and {tail} in the context of the input sentence. "
            f"Choose an answer from: {'; '.join(RELATIONS)}.",
        ):
            rows.append(Row(question, text, relation, "re", source, "classify"))
    return rows


_SENTIMENT_CLS = (
    "What does the input {kind} express about the financial outlook?",
    "Give the sentiment of this {kind} as an investor would see it.",
    "Sort the input {kind} by its financial sentiment.",
    "Decide which sentiment the {kind} carries for the company concerned.",
    "Which of the options describes the sentiment of the {kind}?",
)
_HEADLINE_CLS = tuple(
    text + " {subject}?"
    for text in (
        "Does the headline mention",
        "Is the headline about",
        "Would you say that the headline concerns",
        "Does this headline deal with",
        "Can one read in the headline of",
        "Is there anything in the headline on",
        "Does the headline report on",
        "Does the text of the headline refer to",
        "Judging by the headline, is it about",
        "Does the news item speak of",
        "Is a subject of the headline",
    )
)
_NER_CLS = tuple(
    text.replace("*", "'{entity}'")
    for text in (
        "What type of entity is *?",
        "Which of the types fits * in the sentence?",
        "Name the entity type of *.",
        "Say what kind of entity * is.",
        "Read the sentence and give the type of *.",
        "In this sentence, * is an entity of which type?",
        "Choose the type of the entity *.",
        "Assign a type to *.",
        "What does * stand for in the input?",
        "Classify the entity *.",
        "To which type does * belong?",
        "Find * in the sentence and tell its type.",
        "How would you label *?",
        "Pick the right type for *.",
        "The entity * is a what?",
        "Determine what * denotes here.",
        "Give the category of *.",
    )
)
_RE_CLS = tuple(
    text.replace("*", "'{head}'").replace("+", "'{tail}'")
    for text in (
        "How is * related to +?", "Which relation holds between * and + in the sentence?", "Name the relation from * to +.",
        "According to the sentence, what connects * with +?", "Choose the relation between * and +.", "What is + to *?",
    )
)  # fmt: skip


def _listed(question: str, options: Sequence[str], draw: random.Random) -> str:
    return f"{question}\nOptions: {', '.join(draw.sample(list(options), len(options)))}"


def sentiment_cls(row: Row, draw: random.Random, every: bool = False) -> list[Row]:
    """Positive or negative, in one of five wordings (``every``: in all, for a vote). Neutral rows have none."""
    label = SEVEN.get(row.output, row.output)
    if label == "neutral":
        return []
    options = ("positive", "negative")
    wordings = _SENTIMENT_CLS if every else (draw.choice(_SENTIMENT_CLS),)
    return [
        replace(
            row, instruction=_listed(w.format(kind=row.kind), options, draw), output=label, group=row.digest, options=options
        )
        for w in wordings
    ]


def headline_cls(row: Row, draw: random.Random) -> Row:
    subject = dict(zip(QUESTIONS, (*_SUBJECTS, "a comparison of gold with another asset"), strict=True))[row.kind]
    question = draw.choice(_HEADLINE_CLS).format(subject=subject)
    return replace(row, instruction=_listed(question, ("Yes", "No"), draw), options=("Yes", "No"))


def ner_cls(row: Row, entities: Sequence[tuple[str, str]], draw: random.Random) -> list[Row]:
    """The type of every entity of a sentence, in seventeen wordings. An entity of two types in one sentence has no
    answer."""
    options = tuple(ENTITY_TYPES.values())
    kinds: dict[str, set[str]] = {}
    for text, kind in entities:
        kinds.setdefault(text, set()).add(kind)
    return [
        replace(row, instruction=_listed(w.format(entity=text), options, draw), output=next(iter(kind)), kind="type",
                group=f"{row.digest} {text}", options=options)
        for text, kind in kinds.items()
        if len(kind) == 1
        for w in _NER_CLS
    ]  # fmt: skip


def relations_cls(text: str, triples: Sequence[tuple[str, str, str]], source: str, draw: random.Random) -> list[Row]:
    """The relation of every triple, among three others, in six wordings."""
    rows = []
    for head, tail, name in triples:
        gold = check_relation(name)
        options = (*draw.sample([r for r in RELATIONS if r != gold], 3), gold)
        spoken = tuple(option.replace("_", " ") for option in options)
        for wording in _RE_CLS:
            question = _listed(wording.format(head=head, tail=tail), spoken, draw)
            rows.append(Row(question, text, spoken[-1], "re", source, "choose", f"{head}|{tail}|{text}", spoken))
    return rows
