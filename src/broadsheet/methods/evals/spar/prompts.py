"""What SPaR asks, and how the replies are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from broadsheet.core import replies
from broadsheet.core.chat import Message

JUDGE = """\
Judge whether an output follows its prompt exactly.

<prompt>
{prompt}
</prompt>

<output>
{output}
</output>

Find every constraint in the prompt, check the output against each, and name those that are not satisfied. The output \
follows the prompt only if all of them are satisfied completely. Answer in this form:
Step-by-step verification: ...
Final Judgement: one word, Yes if the output follows the prompt, else No"""

REFINE = """\
By your judgement, refine the output so that it satisfies every constraint of the prompt. Change what is wrong and keep \
the rest as it is. Answer in this form:
Reflection on what to change: ...
Refined output: [[start]] the whole refined output [[end]]"""

EVOLVE = """\
Rewrite a prompt into a harder test of following instructions, by adding constraints that belong to its topic.

<prompt>
{prompt}
</prompt>

The main constraint is about {group}: {kinds}. Add it, unless it contradicts the prompt, and one to three others of any \
kind ({groups}, or others). They must be possible together, make sense for this prompt and be checkable; prefer kinds \
other than length. Weave them into the wording, without a list, without an answer, and without anything visual. If the \
prompt is a mathematical or a programming problem, give None as the new prompt.
Answer in this form: [[start]] the new prompt [[end]]"""

#: the fourteen groups that a main constraint is drawn from, and what they are about (paper appendix; constraint taxonomy)
GROUPS: Mapping[str, str] = {
    "length": "how many characters, words, sentences, paragraphs or sections",
    "text format": "JSON, Markdown, a list, a table, bullet points or a postscript",
    "character format": "upper case, lower case, a mixture of both, or how often a letter occurs",
    "template": "the form of an example, of a multiple-choice question, or a given template",
    "punctuation": "a mark left out, how often one occurs, or which one begins or ends the text",
    "numeric format": "whole numbers, decimals, scientific notation or ordinal numbers",
    "keyword": "words that must occur, that must not, or how often they do",
    "symbol": "marks round a title, emoji, placeholders or a symbol of one's own",
    "sentence": "a sentence that begins, ends or stands in the text, or how sentences are built",
    "genre": "a poem, a novel, a script, a letter, a speech, a diary or a short post",
    "language": "the language of the answer, such as English, Chinese, Thai, German, Marathi or Spanish",
    "situation": "a role to play, a train of reasoning or a topic to keep to",
    "style": "formality, manner of writing, humour, an era or a profession",
    "sentiment": "positive, negative, hopeful or fascinated",
}

LABEL = re.compile(r"final judge?ment", re.I)
#: the choice repeated from the prompt, which is no answer
_CHOICE = re.compile(r"\(?\byes\s*(?:or|/|\|)\s*no\b\)?", re.I)
_PARENTHESIS = re.compile(r"^\s*\([^()\n]*\)")


def judge_messages(prompt: str, output: str) -> list[Message]:
    return [{"role": "user", "content": JUDGE.format(prompt=prompt, output=output)}]


def refine_messages(prompt: str, output: str, critique: str) -> list[Message]:
    """The judgement as a conversation, and the wish to refine by it."""
    said: list[Message] = [{"role": "assistant", "content": critique}, {"role": "user", "content": REFINE}]
    return [*judge_messages(prompt, output), *said]


def parse_judgement(reply: str, compat: bool = False) -> bool | None:
    """Yes or no after the last "Final Judgement", None where there is neither.

    The word right after the label counts; else the first "Yes" or "No" as a whole, capitalised word. ``compat`` reads as the
    official code does: after the *first* label, the first of "Yes" and "No" as parts of any word ("Note" is a no).
    """
    if compat:
        return _official(reply)
    part = replies.answer_part(reply)
    labels = list(LABEL.finditer(part))
    if not labels:
        return None
    part = _PARENTHESIS.sub("", part[labels[-1].end() :])
    part = _CHOICE.sub("", part).lstrip(" \t\n:*_\"'`#->=.([")
    first = re.match(r"(yes|no)\b(?![-'’])", part, re.I)
    word = first or re.search(r"\b(Yes|YES|No|NO)\b(?![-'’])", part)
    return None if word is None else word[1].lower() == "yes"


def _official(reply: str) -> bool | None:
    parts = reply.split("Final Judgement")
    if len(parts) < 2:
        return None
    places = {answer: parts[1].find(word) for word, answer in (("Yes", True), ("No", False)) if word in parts[1]}
    return min(places, key=lambda answer: places[answer]) if places else None


def parse_refined(reply: str) -> str:
    """The refined output; "" where the reply has none, or one that does not end."""
    return replies.between(reply, "[[start]]", "[[end]]") or ""


def vote(verdicts: Sequence[bool | None]) -> tuple[float, bool] | None:
    """Share of yes among the votes that could be read, and the majority; None for a tie or no vote."""
    yes, no = verdicts.count(True), verdicts.count(False)
    return None if yes == no else (yes / (yes + no), yes > no)
