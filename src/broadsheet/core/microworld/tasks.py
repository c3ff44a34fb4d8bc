"""Seeded generators of instruction data whose truth is known.

A generator is ``task(rng, context_tokens, turns) -> Session``. ``context_tokens`` is a target that the context does
not exceed (tasks without a context ignore it). The same seed gives the same bytes.

`SCBENCH_MINI` are the tasks of scbench-mini: the schema and task families of SCBench (arXiv 2412.10319, table 1) at a size
that a pocket model can learn. `SHORT` are instructions without a long context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .lexicon import ADJECTIVES, CATEGORIES, CITIES, NOUNS, PEOPLE, TIMES, VERBS, WORDS
from .sessions import Session, Turn

Task = Callable[[random.Random, int, int], Session]


def _filler(rng: random.Random) -> str:
    """One sentence of eight tokens that no question asks about."""
    pick = rng.choice
    return f"The {pick(ADJECTIVES)} {pick(NOUNS)} {pick(TIMES)} {pick(VERBS)} the {pick(NOUNS)}."


def _blend(rng: random.Random, groups: list[list[str]], noise: list[str]) -> str:
    """Shuffles noise and the sentences of all groups together; the order within a group is kept."""
    deck = [index for index, group in enumerate(groups) for _ in group] + [-1] * len(noise)
    rng.shuffle(deck)
    streams = [iter(group) for group in groups]
    rest = iter(noise)
    return " ".join(next(rest if index < 0 else streams[index]) for index in deck)


def _fill(rng: random.Random, lines: list[str], tokens: int) -> str:
    """The lines in their order, with ``tokens`` of filler blended in (none for less than a sentence)."""
    return _blend(rng, [lines], [_filler(rng) for _ in range(max(0, (tokens - 8) // 8))])


def kv(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Key-value recall: a sentence of five tokens a pair, all keys different, values of eight letters."""
    pairs = max(turns, min(256, (context_tokens - 8) // 5))
    keys, others = _divide(rng, pairs)
    codes = [f"{a} {b}" for a, b in _distinct(rng, pairs, 2, others)]
    lines = [f"Give {key} {code}." for key, code in zip(keys, codes, strict=True)]
    questions = [
        Turn(f"What do you give {keys[i]}?", codes[i], max_new_tokens=8, extra={"reference": lines[i]})
        for i in rng.sample(range(pairs), turns)
    ]
    return _session(rng, "kv", _fill(rng, lines, context_tokens - 5 * pairs), questions)


def prefix_suffix(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Given its first and last word, return a four-word string.

    The pair (first, last) is unique, either alone need not be: a tenth of the strings borrow another's first word.
    """
    count = max(turns, min(256, (context_tokens - 8) // 5))
    firsts, others = _divide(rng, count)
    strings: dict[tuple[str, str], str] = {}
    while len(strings) < count:
        first = rng.choice(firsts[: len(strings) + 1]) if rng.random() < 0.1 else firsts[len(strings)]
        last = rng.choice(others)
        strings.setdefault((first, last), f"{first} {rng.choice(others)} {rng.choice(others)} {last}")
    asked = rng.sample(list(strings.values()), turns)
    questions = [
        Turn(f"Which string starts with {text.split()[0]} and ends with {text.split()[-1]}?", text, max_new_tokens=8)
        for text in asked
    ]
    lines = [f"{text};" for text in strings.values()]
    return _session(rng, "prefix_suffix", _fill(rng, lines, context_tokens - 5 * count), questions)


def vt(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Variable tracing: a number is handed to a name, the name to a second, that to a third; noise between them."""
    chains = max(turns, min(40, context_tokens // 40))
    names = rng.sample(WORDS, 3 * chains)
    numbers = rng.sample(range(100), chains)
    groups, golds = [], []
    for index in range(chains):
        a, b, c = names[3 * index : 3 * index + 3]
        groups.append([f"Hand {numbers[index]} {a}.", f"Hand {a} {b}.", f"Hand {b} {c}."])
        golds.append((a, b, c))
    noise = [_filler(rng) for _ in range(max(0, (context_tokens - 12 * chains - 8) // 8))]
    asked = rng.sample(range(chains), turns)
    questions = [
        Turn(
            f"Where does {numbers[i]} go?",
            golds[i],
            "contains_all",
            max_new_tokens=8,
            extra={"reference": f"Hand {numbers[i]} {' '.join(golds[i])}."},
        )
        for i in asked
    ]
    return _session(rng, "vt", _blend(rng, groups, noise), questions)


def find(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Math.Find: the largest, the smallest, or how often a number occurs among up to 500 two-digit numbers."""
    count = max(8, min(500, (context_tokens - 8) // 2))
    low = rng.randrange(10, 70)
    high = rng.randrange(low + 9, min(100, low + 60))
    rare = rng.sample(range(low, high + 1), min(6, high - low))
    common = [n for n in range(low, high + 1) if n not in rare] or [low]
    numbers = [rng.choice(common) for _ in range(count)]
    for number in rare:  # a few numbers with a count that is small enough to be counted
        for place in rng.sample(range(count), rng.randrange(0, 6)):
            numbers[place] = number
    kinds = [rng.choice(("max", "min", "count")) for _ in range(turns)]
    if turns >= 3:
        kinds[:3] = ["max", "min", "count"]
        rng.shuffle(kinds)
    questions = []
    for kind in kinds:
        if kind == "max":
            text, gold = "What is the largest number?", max(numbers)
        elif kind == "min":
            text, gold = "What is the smallest number?", min(numbers)
        else:
            number = rng.choice(rare)
            text, gold = f"How many times does {number} appear?", numbers.count(number)
        questions.append(Turn(text, str(gold), "first_number", max_new_tokens=5, extra={"kind": kind}))
    return _session(rng, "mf", "Numbers: " + ", ".join(map(str, numbers)) + ".", questions)


def many_shot(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Label rules from examples: each category of things gets an invented label; asked about things not shown."""
    shots = max(8, min(250, (context_tokens - 8) // 4))
    kinds = rng.sample(sorted(CATEGORIES), rng.randrange(2, 5))
    labels = dict(zip(kinds, rng.sample(WORDS, len(kinds)), strict=True))
    held = {kind: set(rng.sample(CATEGORIES[kind], 6)) for kind in kinds}
    shown = [(word, labels[kind]) for kind in kinds for word in CATEGORIES[kind] if word not in held[kind]]
    deck = (shown * (shots // len(shown) + 1))[: max(shots, len(kinds))]
    rng.shuffle(deck)
    questions = []
    for _ in range(turns):
        kind = rng.choice(kinds)
        thing = rng.choice(sorted(held[kind]))
        extra = {"reference": f"Call {thing} {labels[kind]}.", "options": [labels[k] for k in kinds]}
        questions.append(Turn(f"What do you call {thing}?", labels[kind], max_new_tokens=5, extra=extra))
    lines = [f"Call {word} {label}." for word, label in deck]
    return _session(rng, "many_shot", _fill(rng, lines, context_tokens - 4 * len(lines)), questions)


def copy_section(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Copy a section: messages of eight words, each to somebody else, with filler between."""
    messages = max(turns, min(64, (context_tokens - 8) // 32))
    names, others = _divide(rng, messages)
    texts = [" ".join(rng.sample(others, 8)) for _ in names]
    lines = [f"Tell {name} {text}." for name, text in zip(names, texts, strict=True)]
    questions = [
        Turn(
            f"What do you tell {names[i]}?",
            texts[i],
            "contains",
            max_new_tokens=14,
            extra={"reference": f"Tell {names[i]} {texts[i]}."},
        )
        for i in rng.sample(range(messages), turns)
    ]
    return _session(rng, "copy", _fill(rng, lines, context_tokens - 11 * messages), questions)


def needle(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Needles: a few sums hidden in filler; the first integer of the answer counts."""
    needles = max(turns, 4)
    keys = rng.sample(WORDS, needles)
    numbers = rng.sample(range(10, 100), needles)
    lines = [f"Pay {key} {number}." for key, number in zip(keys, numbers, strict=True)]
    noise = [_filler(rng) for _ in range(max(0, (context_tokens - 4 * needles - 8) // 8))]
    groups = [[line] for line in lines]
    questions = [
        Turn(
            f"How much do you pay {keys[i]}?",
            str(numbers[i]),
            "first_number",
            max_new_tokens=6,
            extra={"reference": lines[i]},
        )
        for i in rng.sample(range(needles), turns)
    ]
    return _session(rng, "needle", _blend(rng, groups, noise), questions)


_OPERATIONS = {
    "add": ("adds", lambda x, n: (x + n) % 100),
    "take": ("takes", lambda x, n: (x - n) % 100),
}


def repo(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Mini-RepoQA: functions of a toy language; from the description of its steps, return body and name."""
    count = max(turns, min(128, (context_tokens - 8) // 13))
    names = rng.sample(WORDS, count)
    bodies: dict[tuple[tuple[str, int], ...], str] = {}
    while len(bodies) < count:
        body = tuple((rng.choice(sorted(_OPERATIONS)), rng.randrange(1, 100)) for _ in range(3))
        bodies.setdefault(body, names[len(bodies)])
    listing = list(bodies.items())
    rng.shuffle(listing)

    def source(body: tuple[tuple[str, int], ...]) -> str:
        return " then ".join(f"{verb} {number}" for verb, number in body)

    lines = [f"To {source(body)} use {name}." for body, name in listing]
    context = _fill(rng, lines, context_tokens - 13 * count)
    questions = []
    for body, name in rng.sample(listing, turns):
        told = " then ".join(f"{_OPERATIONS[verb][0]} {number}" for verb, number in body)
        questions.append(Turn(f"Find what {told}.", f"{source(body)} use {name}", "strict", max_new_tokens=14))
    return _session(rng, "repoqa", context, questions)


def mixed(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Multi-task: key-value pairs and label examples in one context; the questions alternate."""
    half = max(64, context_tokens // 2)
    first, second = kv(rng, half, (turns + 1) // 2), many_shot(rng, half, max(1, turns // 2))
    parts = [first.context, second.context]
    rng.shuffle(parts)
    questions = [(first if index % 2 == 0 else second).turns[index // 2] for index in range(turns)]
    return _session(rng, "kv_and_rules", " ".join(parts), questions)


def arithmetic(rng: random.Random, context_tokens: int, turns: int, steps: int | None = None) -> Session:
    """Additions and subtractions modulo 100, every step written out; the last number counts."""
    questions = []
    for _ in range(turns):
        length = steps or rng.randrange(2, 26)
        value = rng.randrange(100)
        told, written = [f"Start with {value}."], []
        for step in range(1, length + 1):
            verb, amount = rng.choice(sorted(_OPERATIONS)), rng.randrange(1, 10)
            result = _OPERATIONS[verb][1](value, amount)
            told.append(f"#{step} {verb} {amount}.")
            written.append(f"#{step} {verb} {amount} gives {result}.")
            value = result
        extra = {"steps": length}
        questions.append(Turn(" ".join(told), " ".join(written), "last_number", max_new_tokens=7 * length + 1, extra=extra))
    return _session(rng, "arithmetic", "", questions)


def lists(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """List operations: sort, reverse, first, last, without duplicates."""
    questions = []
    for _ in range(turns):
        numbers = [rng.randrange(100) for _ in range(rng.randrange(3, 9))]
        kind = rng.choice(("Sort", "Reverse", "Deduplicate", "First of", "Last of"))
        if kind == "Deduplicate":
            numbers += rng.sample(numbers, 2)
            rng.shuffle(numbers)
        gold = {
            "Sort": sorted(numbers),
            "Reverse": numbers[::-1],
            "Deduplicate": list(dict.fromkeys(numbers)),
            "First of": numbers[:1],
            "Last of": numbers[-1:],
        }[kind]
        told = ", ".join(map(str, numbers))
        questions.append(
            Turn(f"{kind} {told}.", ", ".join(map(str, gold)), "strict", max_new_tokens=24, extra={"kind": kind})
        )
    return _session(rng, "lists", "", questions)


def formats(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Output-format constraints: so many things of a kind, joined so, ended so."""
    questions = []
    for _ in range(turns):
        kind, count = rng.choice(sorted(CATEGORIES)), rng.randrange(2, 6)
        name, separator = rng.choice((("commas", ","), ("semicolons", ";"), ("slashes", "/"), ("the word and", " and")))
        end = rng.choice((None, "done", "stop", "over"))
        allowed = list(CATEGORIES[kind])
        text = f"Name {count} of kind {kind} joined by {name}" + (f" and finish with {end}." if end else ".")
        joint = " and " if separator == " and " else f"{separator} "
        gold = joint.join(rng.sample(allowed, count)) + (f" {end}" if end else "")
        rules = {"count": count, "separator": separator, "allowed": allowed} | ({"end": end} if end else {})
        questions.append(Turn(text, gold, "format_rule", max_new_tokens=20, extra={"rules": rules}))
    return _session(rng, "formats", "", questions)


def facts_table(seed: int = 23) -> dict[str, str | None]:
    """The closed book: person -> home city, or None for the fifth of the people whose home is withheld."""
    rng = random.Random(seed)
    return {person: (None if rng.random() < 0.2 else rng.choice(CITIES)) for person in PEOPLE}


_FACTS = facts_table()


def facts(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Facts about invented people, learned in training; the right answer for a withheld one is that it is not known."""
    questions = []
    for person in rng.sample(PEOPLE, turns):
        home = _FACTS[person]
        questions.append(
            Turn(
                f"Where does {person} live?",
                f"In {home}." if home else "I do not know.",
                "contains",
                max_new_tokens=8,
                extra={"known": home is not None},
            )
        )
    return _session(rng, "facts", "", questions)


def functions(rng: random.Random, context_tokens: int, turns: int) -> Session:
    """Toy-language functions: run a short program on a number, writing every step."""
    questions = []
    for _ in range(turns):
        body = [(rng.choice(sorted(_OPERATIONS)), rng.randrange(1, 10)) for _ in range(rng.randrange(1, 5))]
        name, value = rng.choice(WORDS), rng.randrange(100)
        source = " then ".join(f"{verb} {number}" for verb, number in body)
        steps, result = [], value
        for verb, number in body:
            result = _OPERATIONS[verb][1](result, number)
            steps.append(f"{verb} {number} gives {result}.")
        questions.append(
            Turn(f"Let {name} be {source}. What is {name} of {value}?", " ".join(steps), "last_number", max_new_tokens=28)
        )
    return _session(rng, "functions", "", questions)


def _divide(rng: random.Random, count: int) -> tuple[list[str], list[str]]:
    """``count`` words and the rest, so that what is asked for by name never turns up as somebody's content."""
    deck = rng.sample(WORDS, len(WORDS))
    return deck[:count], deck[count:]


def _distinct(rng: random.Random, count: int, length: int, words: Sequence[str]) -> list[tuple[str, ...]]:
    """``count`` different tuples of ``length`` of the words."""
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found.setdefault(tuple(rng.choice(words) for _ in range(length)))
    return list(found)


def _session(rng: random.Random, task: str, context: str, turns: list[Turn]) -> Session:
    return Session(id=f"{task}-{rng.getrandbits(40):010x}", task=task, context=context, turns=tuple(turns))


SCBENCH_MINI: dict[str, Task] = {
    "kv": kv,
    "prefix_suffix": prefix_suffix,
    "vt": vt,
    "mf": find,
    "many_shot": many_shot,
    "copy": copy_section,
    "needle": needle,
    "repoqa": repo,
    "kv_and_rules": mixed,
}
SHORT: dict[str, Task] = {
    "arithmetic": arithmetic,
    "lists": lists,
    "formats": formats,
    "facts": facts,
    "functions": functions,
}
TASKS: dict[str, Task] = {**SCBENCH_MINI, **SHORT}


def make_sessions(task: str, sessions: int, context_tokens: int, turns: int = 5, seed: int | str = 0) -> list[Session]:
    """``sessions`` sessions of one task. Session i of seed s never changes, however many are asked for."""
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}'; known: {', '.join(TASKS)}")
    return [TASKS[task](random.Random(f"{task}/{seed}/{index}"), context_tokens, turns) for index in range(sessions)]
