"""IFEval: instructions that code can check, strictly and loosely (Zhou et al. 2023, arXiv 2311.07911). A baseline benchmark.

The checkers are `core.constraints.ifeval`; the official 541 prompts are read from a path, and prompts of our own are made
from the same instructions, so that it runs after install.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from broadsheet.core.constraints import Constraint
from broadsheet.core.constraints.ifeval import Item, check_loose, constraint, joint_witness, load_ifeval
from broadsheet.core.stats import bootstrap_ci

from .base import Benchmark, Mark, Metric, Outcome, Sample, Scored, means

Drawn = tuple[str, dict[str, Any], str]  #: instruction id, kwargs, wording

TOPICS = (
    "a walk along a river", "how bread is made", "a small town library", "the first day of spring", "a lighthouse keeper",
    "how to mend a bicycle", "a market on a rainy morning", "what a compass is for", "a letter to a friend abroad",
    "how bees find flowers", "a garden behind a school", "the history of glass", "a train journey in winter",
    "how to plan a picnic", "an old clock", "what tides do to a beach",
)  # fmt: skip
_ASKS = ("Write about {}.", "Write a short text about {}.", "Describe {} to a visitor.", "Explain {} to a child.")
_KEYWORDS = ("lantern", "harvest", "copper", "silence", "window", "compass", "morning", "bridge")
_AVOIDED = ("banana", "obviously", "machine", "purple", "mountain")
_ENDS = ("That is all there is to say.", "Any other questions?", "Good night.")

#: instruction id -> what draws its kwargs, and its wording. Those that need a language detector are left out.
_MAKERS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], str]] = {
    "keywords:existence": (lambda r: {"keywords": r.sample(_KEYWORDS, 2)}, "Include the keywords {keywords}."),
    "keywords:frequency": (
        lambda r: {"keyword": r.choice(_KEYWORDS), "frequency": r.randint(2, 4), "relation": "at least"},
        "The word {keyword} should appear {relation} {frequency} times.",
    ),
    "keywords:forbidden_words": (
        lambda r: {"forbidden_words": r.sample(_AVOIDED, 2)},
        "Do not use the words {forbidden_words}.",
    ),
    "keywords:letter_frequency": (
        lambda r: {"letter": r.choice("qzjx"), "let_frequency": r.randint(2, 4), "let_relation": "at least"},
        "The letter {letter} should appear {let_relation} {let_frequency} times.",
    ),
    "length_constraints:number_sentences": (
        lambda r: {"num_sentences": r.randint(3, 8), "relation": r.choice(("at least", "less than"))},
        "Your response should contain {relation} {num_sentences} sentences.",
    ),
    "length_constraints:number_paragraphs": (
        lambda r: {"num_paragraphs": r.randint(2, 4)},
        "Write {num_paragraphs} paragraphs, divided by three asterisks: ***",
    ),
    "length_constraints:number_words": (
        lambda r: {"num_words": r.randrange(60, 160, 20), "relation": r.choice(("at least", "less than"))},
        "Answer with {relation} {num_words} words.",
    ),
    "length_constraints:nth_paragraph_first_word": (
        lambda r: {"num_paragraphs": 3, "nth_paragraph": r.randint(1, 3), "first_word": r.choice(_KEYWORDS)},
        "Write {num_paragraphs} paragraphs with blank lines between them; paragraph {nth_paragraph} must begin with "
        "the word {first_word}.",
    ),
    "detectable_content:number_placeholders": (
        lambda r: {"num_placeholders": r.randint(1, 3)},
        "Include at least {num_placeholders} placeholders in square brackets, such as [name].",
    ),
    "detectable_content:postscript": (
        lambda r: {"postscript_marker": r.choice(("P.S.", "P.P.S"))},
        "Add a postscript at the end that starts with {postscript_marker}",
    ),
    "detectable_format:number_bullet_lists": (
        lambda r: {"num_bullets": r.randint(2, 4)},
        "Include exactly {num_bullets} bullet points in Markdown, such as: * This is a point.",
    ),
    "detectable_format:constrained_response": (
        lambda r: {},
        "Somewhere answer with one of: My answer is yes. My answer is no. My answer is maybe.",
    ),
    "detectable_format:number_highlighted_sections": (
        lambda r: {"num_highlights": r.randint(1, 3)},
        "Highlight at least {num_highlights} parts with Markdown, i.e. *highlighted part*.",
    ),
    "detectable_format:multiple_sections": (
        lambda r: {"section_spliter": r.choice(("SECTION", "Part")), "num_sections": r.randint(2, 3)},
        "Write {num_sections} sections, each beginning with {section_spliter} X.",
    ),
    "detectable_format:json_format": (lambda r: {}, "Put the entire output into JSON."),
    "detectable_format:title": (lambda r: {}, "Give it a title in double angular brackets, such as <<a day out>>."),
    "combination:two_responses": (lambda r: {}, "Give two different responses, divided by six asterisks: ******"),
    "startend:end_checker": (lambda r: {"end_phrase": r.choice(_ENDS)}, "End with exactly this phrase: {end_phrase}"),
    "startend:quotation": (lambda r: {}, "Wrap the entire response in double quotation marks."),
    "change_case:capital_word_frequency": (
        lambda r: {"capital_frequency": r.randint(2, 5), "capital_relation": "at least"},
        "Words in all capital letters should appear {capital_relation} {capital_frequency} times.",
    ),
    "punctuation:no_comma": (lambda r: {}, "Do not use any commas."),
}


def draw_instructions(roll: random.Random, count: int) -> list[Drawn]:
    """``count`` different instructions that some text obeys all at once."""
    for _ in range(200):
        found: list[Drawn] = []
        for name in roll.sample(list(_MAKERS), count):
            make, wording = _MAKERS[name]
            kwargs = make(roll)
            shown = {key: ", ".join(value) if isinstance(value, list) else value for key, value in kwargs.items()}
            found.append((name, kwargs, wording.format(**shown)))
        if joint_witness([(name, kwargs) for name, kwargs, _ in found]) is not None:
            return found
    raise ValueError(f"no {count} instructions that agree were found")


@dataclass(frozen=True)
class IFEval(Benchmark):
    """IFEval. ``path``: the official ``input_data.jsonl``; None asks ``count`` prompts of our own, drawn with ``seed``,
    of one to three instructions that some text obeys at once.

    Metrics: ``prompt_strict`` (primary), ``prompt_loose``, ``inst_strict``, ``inst_loose``, the latter two also by ``kind``
    of instruction. Instructions that cannot be verified here (a language without langdetect) are left out, their prompts
    count for no prompt accuracy, and ``verifiable`` is the share of the rest.
    """

    path: str | None = None
    count: int = 100
    seed: int = 0

    slug: ClassVar[str] = "ifeval"
    primary: ClassVar[str] = "prompt_strict"
    request: ClassVar[Mapping[str, Any]] = {"max_tokens": 1280}

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is at least 1, got {self.count}")

    def items(self) -> list[Item]:
        if self.path:
            return load_ifeval(self.path)
        found = []
        for number in range(self.count):
            roll = random.Random(f"ifeval/{self.seed}/{number}")
            drawn = draw_instructions(roll, 1 + number % 3)
            prompt = " ".join([roll.choice(_ASKS).format(roll.choice(TOPICS)), *(text for *_, text in drawn)])
            found.append(
                Item(f"own-{self.seed}-{number}", prompt, tuple(name for name, *_ in drawn), tuple(kw for _, kw, _ in drawn))
            )
        return found

    def samples(self) -> Sequence[Sample]:
        return [
            Sample(
                item.key,
                ({"role": "user", "content": item.prompt},),
                {"instructions": tuple(zip(item.instruction_ids, item.kwargs, strict=True))},
                {"instructions": str(len(item.instruction_ids))},
            )
            for item in self.items()
        ]

    def mark(self, sample: Sample, text: str) -> Mark:
        checks = verdicts(sample.data["instructions"], text)
        said = "; ".join(f"{name}: {'unverifiable' if strict is None else why}" for name, strict, _, why in checks)
        return Mark(_prompt_values(checks), said)

    def missing(self, sample: Sample, outcome: Outcome) -> Mark:
        return Mark(_prompt_values(verdicts(sample.data["instructions"], "")), outcome, outcome)

    def metrics(self, scored: Sequence[Scored]) -> list[Metric]:
        return [*means(scored, ["prompt_strict", "prompt_loose"]), *instruction_metrics(scored)]


Checked = tuple[str, bool | None, bool | None, str]  #: id, strict, loose, evidence; None is unverifiable


def verdicts(instructions: Sequence[tuple[str, Mapping[str, Any]]], text: str) -> list[Checked]:
    """Strict and loose verdicts of every instruction."""
    found: list[Checked] = []
    for name, kwargs in instructions:
        checker = constraint(name, kwargs)
        if isinstance(checker, Constraint):
            strict = checker.check(text)
            found.append((name, strict.ok, check_loose(checker, text).ok, strict.evidence))
        else:
            found.append((name, None, None, checker.reason))
    return found


def _prompt_values(checks: Sequence[Checked]) -> dict[str, float]:
    if any(strict is None for _, strict, *_ in checks):
        return {}
    return {
        "prompt_strict": float(all(strict for _, strict, *_ in checks)),
        "prompt_loose": float(all(loose for _, _, loose, _ in checks)),
    }


def instruction_metrics(scored: Sequence[Scored], axis: str = "") -> list[Metric]:
    """``inst_strict`` and ``inst_loose``, means over instructions with intervals over samples: the whole, by kind of
    instruction, and by the samples' ``axis``; and ``verifiable``, the share of instructions that they are means of."""
    rows: list[tuple[int, str, str, bool, bool]] = []
    seen = 0
    for number, one in enumerate(scored):
        for choice in one.answers:
            for name, strict, loose, _ in verdicts(one.sample.data["instructions"], choice.text if choice.ok else ""):
                seen += 1
                if strict is not None and loose is not None:
                    rows.append((number, name, one.sample.axes.get(axis, ""), strict, loose))
    cuts: list[tuple[str, str, Callable[[tuple[int, str, str, bool, bool]], bool]]] = [("", "", lambda row: True)]
    cuts += [("kind", name, lambda row, n=name: row[1] == n) for name in sorted({row[1] for row in rows})]  # type: ignore[misc]
    if axis:
        cuts += [(axis, cut, lambda row, c=cut: row[2] == c) for cut in sorted({row[2] for row in rows})]  # type: ignore[misc]
    found = []
    for place, metric in ((3, "inst_strict"), (4, "inst_loose")):
        for cut_axis, cut, chosen in cuts:
            some = [row for row in rows if chosen(row)]
            if some:
                values, groups = [float(row[place]) for row in some], [row[0] for row in some]
                found.append(
                    Metric(metric, sum(values) / len(values), bootstrap_ci(values, groups), len(values), cut_axis, cut)
                )
    return [*found, Metric("verifiable", len(rows) / seen, None, seen)] if seen else found
