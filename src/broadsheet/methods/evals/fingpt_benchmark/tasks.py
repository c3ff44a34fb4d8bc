"""Tasks as train and test rows, and their mixtures: what the three phases are trained and tested on (paper section 3)."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import readers, synthetic
from .readers import Entities
from .rows import (
    FAMILIES,
    Family,
    Row,
    check_apart,
    headline_cls,
    ner_cls,
    relations,
    relations_cls,
    sentiment_cls,
    shared_inputs,
)

#: names of tasks; those ending in -cls are the reformulations with options for the zero-shot phase
NAMES = ("sentiment", "headline", "ner", "finred", "finred-re", "sentiment-cls", "headline-cls", "ner-cls", "finred-cls")
#: how often every source of sentiment is repeated, so that they are of like size
REPEATS = {"fpb": 6, "fiqa": 21, "tfns": 2, "nwgi": 1}
MULTI = "sentiment,headline,finred*3,ner*15"
ZERO = {"headline-cls": 1, "finred-cls": 2, "ner-cls": 7, "sentiment-cls": 1}
#: the files that are looked for in a folder of the user
FILES = {
    "fpb": "Sentences_50Agree.txt",
    "tfns": "sent_train.csv, sent_valid.csv",
    "fiqa": "fiqa.jsonl",
    "nwgi": "nwgi_train.jsonl, nwgi_test.jsonl",
    "headline": "gold-dataset-sinha-khandait.csv",
    "ner": "FIN5.txt, FIN3.txt",
    "finred": "train.sent, train.tup, test.sent, test.tup",
}


@dataclass(frozen=True)
class Split:
    """Train and test rows of a task. ``split_hash`` changes with any of them."""

    train: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def split_hash(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.test):
            for row in part:
                digest.update(f"{row.prompt}\0{row.output}\0".encode("utf-8", "replace"))
            digest.update(b"\1")
        return digest.hexdigest()[:16]

    @property
    def leaked(self) -> list[Row]:
        """Test rows whose input (or a near-copy) is trained on."""
        return shared_inputs(self.train, self.test)

    def to_datasets(self) -> Any:
        """A ``datasets.DatasetDict`` with instruction, input, output, source and split_hash. Raises ValueError without
        datasets."""
        try:
            from datasets import Dataset, DatasetDict
        except ImportError:
            raise ValueError("DatasetDict needs the package datasets: pip install 'broadsheet[data]'") from None
        names = ("instruction", "input", "output", "source")
        made = {
            part: Dataset.from_list([{**{n: getattr(r, n) for n in names}, "split_hash": self.split_hash} for r in rows])
            for part, rows in (("train", self.train), ("test", self.test))
        }
        return DatasetDict(made)


@dataclass(frozen=True)
class FinTask:
    """One task. ``path``: a folder with the public files (`FILES`), else SYNTHETIC rows: ``items`` texts for training and a
    quarter as many for testing, drawn by ``seed``. ``official`` repeats the preparation's known mistakes (see `readers`,
    and: in ner-cls every entity has the type of the last one in its sentence). ``accept_noncommercial``: the Financial
    PhraseBank may be used. Raises ValueError for unknown names, missing files and a test split that is empty.
    """

    name: str
    path: str | Path | None = None
    items: int = 400
    seed: int = 0
    official: bool = False
    accept_noncommercial: bool = False

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"there is no task '{self.name}': choose from {', '.join(NAMES)}")
        if self.items < 4:
            raise ValueError(f"items must be at least 4, got {self.items}")

    @property
    def family(self) -> Family:
        stem = self.name.partition("-")[0]
        return "re" if stem == "finred" else stem  # type: ignore[return-value]  # the names are checked

    @property
    def cls(self) -> bool:
        return self.name.endswith("-cls")

    def load(self) -> Split:
        draw = random.Random(f"wordings {self.seed}")
        made = {
            "sentiment": self._sentiment, "headline": self._headline, "ner": self._ner, "re": self._relations,
        }[self.family](draw)  # fmt: skip
        if self.path is None:  # templates meet: what is trained on is no test
            seen = {row.digest for row in made.train}
            made = Split(made.train, tuple(row for row in made.test if row.digest not in seen))
        if not made.test:
            raise ValueError(
                f"the test split of {self.name} is empty: put {FILES.get(self.family, 'its files')} into {self.path}"
            )
        return made

    def _counts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(texts, seed) of synthetic train and test sets: never the same seed."""
        return (self.items, 2 * self.seed), (max(self.items // 4, 1), 2 * self.seed + 1)

    def _files(self, *names: str) -> list[Path]:
        folder = Path(str(self.path))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {', '.join(missing)}: {self.name} is read from them (or leave path out for synthetic rows)"
            )
        return [folder / name for name in names]

    def _sentiment(self, draw: random.Random) -> Split:
        train, test = self._sentiment_rows()
        if not self.cls:
            return Split(tuple(train), tuple(test))
        return Split(
            tuple(row for one in train for row in sentiment_cls(one, draw)),
            tuple(row for one in test for row in sentiment_cls(one, draw, every=True)),
        )

    def _sentiment_rows(self) -> tuple[list[Row], list[Row]]:
        if self.path is None:
            (count, seed), (tests, test_seed) = self._counts()
            return synthetic.make_sentiment(count, seed), synthetic.make_sentiment(tests, test_seed)
        folder, train, test = Path(self.path), [], []
        here = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
        for source, share in (("fpb", 0.25), ("fiqa", 0.226)):
            if FILES[source] in here:
                file = folder / FILES[source]
                rows = readers.read_fpb(file, self.accept_noncommercial) if source == "fpb" else readers.read_fiqa(file)
                kept, held = readers.random_split(len(rows), share, 42)
                train += [rows[i] for i in kept] * REPEATS[source]
                test += [rows[i] for i in held]
        for source, read in (("tfns", readers.read_tfns), ("nwgi", readers.read_nwgi)):
            for name, rows in zip(FILES[source].split(", "), (train, test), strict=True):
                if name in here:
                    rows += read(folder / name) * (REPEATS[source] if rows is train else 1)
        if not train and not test:
            wanted = "; ".join(FILES[source] for source in REPEATS)
            raise ValueError(f"{folder} has none of the files of sentiment: {wanted} (or leave path out for synthetic rows)")
        return train, test

    def _headline(self, draw: random.Random) -> Split:
        if self.path is None:
            train, test = (synthetic.make_headline(max(count // 9, 1), seed) for count, seed in self._counts())
        else:
            train, test = readers.headline_split(readers.read_headline(self._files(FILES["headline"])[0], self.official))
        parts = (train, test)
        return Split(*(tuple(headline_cls(row, draw) if self.cls else row for row in part) for part in parts))

    def _ner(self, draw: random.Random) -> Split:
        if self.path is None:
            parts = [synthetic.make_ner(count, seed) for count, seed in self._counts()]
        else:
            parts = [readers.read_conll(file, self.official) for file in self._files(*FILES["ner"].split(", "))]
        made = []
        for part in parts:
            if self.cls:
                made.append(tuple(row for one, entities in part for row in self._typed(one, entities, draw)))
            else:
                made.append(tuple(row for row, _ in part))
        return Split(*made)

    def _typed(self, row: Row, entities: Entities, draw: random.Random) -> list[Row]:
        if self.official and entities:
            entities = [(text, entities[-1][1]) for text, _ in entities]
        return ner_cls(row, entities, draw)

    def _relations(self, draw: random.Random) -> Split:
        source = "synthetic" if self.path is None else "finred"
        if self.path is None:
            parts = [synthetic.make_relations(count, seed) for count, seed in self._counts()]
        else:
            files = self._files(*FILES["finred"].split(", "))
            parts = [readers.read_finred(*files[:2]), readers.read_finred(*files[2:])]
        made = []
        for part in parts:
            if self.cls:
                rows = [row for text, triples in part for row in relations_cls(text, triples, source, draw)]
            else:
                rows = [row for text, triples in part for row in relations(text, triples, source, self.name == "finred")]
            made.append(tuple(rows))
        return Split(*made)


# --- mixtures -----------------------------------------------------------------------------------------------------------


def parse_mix(names: str) -> dict[str, int]:
    """{"ner": 15, ...} of "sentiment,finred*3,ner*15". Raises ValueError for a factor below 1 and unknown names."""
    found: dict[str, int] = {}
    for part in names.split(","):
        read = re.fullmatch(r"\s*([\w-]+)\s*(?:\*\s*(-?\d{1,6}))?\s*", part)
        if read is None:
            raise ValueError(f"cannot read '{part.strip()}': a mixture is written sentiment,headline,finred*3,ner*15")
        factor = int(read[2] or 1)
        if factor < 1:
            raise ValueError(f"{read[1]} is repeated {factor} times: a replication factor is at least 1")
        if read[1] not in NAMES:
            raise ValueError(f"there is no task '{read[1]}': choose from {', '.join(NAMES)}")
        found[read[1]] = found.get(read[1], 0) + factor
    return found


@dataclass(frozen=True)
class Mix:
    """Training rows of several tasks, each repeated. Iterating gives them in an order in which any stretch has every task in
    its proportion, and the repetitions of a row lie far apart (the official shuffle lets both happen by chance)."""

    parts: Mapping[str, tuple[Row, ...]]
    factors: Mapping[str, int]
    seed: int = 0

    @property
    def proportions(self) -> dict[str, float]:
        sizes = {name: len(rows) * self.factors[name] for name, rows in self.parts.items()}
        return {name: size / sum(sizes.values()) for name, size in sizes.items()}

    def __len__(self) -> int:
        return sum(len(rows) * self.factors[name] for name, rows in self.parts.items())

    def named(self) -> Iterator[tuple[str, Row]]:
        """(task, row) in training order."""
        places: list[tuple[float, str, Row]] = []
        for name, rows in self.parts.items():
            draw = random.Random(f"mix {self.seed} {name}")
            passes = [row for _ in range(self.factors[name]) for row in draw.sample(rows, len(rows))]
            shift = draw.random()
            places += [((number + shift) / len(passes), name, row) for number, row in enumerate(passes)]
        places.sort(key=lambda place: place[:2])
        return ((name, row) for _, name, row in places)

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.named())


def build_mix(names: str, seed: int = 0, **setting: Any) -> Mix:
    """The mixture of tasks, see `parse_mix`; ``setting`` goes to every `FinTask`."""
    factors = parse_mix(names)
    parts = {name: FinTask(name, seed=seed, **setting).load().train for name in factors}
    if empty := [name for name, rows in parts.items() if not rows]:
        raise ValueError(f"{empty[0]} has no training rows")
    return Mix(parts, factors, seed)


@dataclass(frozen=True)
class Phase:
    """What one phase trains on and tests on; ``epochs`` and ``warmup`` are the paper's."""

    name: str
    train: Mix
    test: Mapping[str, tuple[Row, ...]]
    epochs: int
    warmup: float


def phase_data(
    phase: Literal["single", "multi", "zero"],
    tasks: str | Sequence[str] = (),
    held_out: Family = "sentiment",
    seed: int = 0,
    **setting: Any,
) -> Phase:
    """What a phase is made of.

    ``single``: one task, 8 epochs. ``multi``: ``tasks`` mixed (the paper's `MULTI`), 4 epochs. ``zero``: the reformulations
    of the three families that are not ``held_out``, 1 epoch without warm-up, tested on the fourth; that none of its rows is
    trained on is checked by hash. Raises ValueError where that, or a name, is wrong.
    """
    names = tasks if isinstance(tasks, str) else ",".join(tasks)
    if phase == "zero":
        if held_out not in FAMILIES:
            raise ValueError(f"the family held out is one of {', '.join(FAMILIES)}, got '{held_out}'")
        target = "finred-cls" if held_out == "re" else f"{held_out}-cls"
        names = names or ",".join(f"{name}*{factor}" for name, factor in ZERO.items() if name != target)
        if not all(name.endswith("-cls") for name in parse_mix(names)):
            raise ValueError("the zero-shot phase trains on reformulations: tasks whose names end in -cls")
        mix, test = build_mix(names, seed, **setting), FinTask(target, seed=seed, **setting).load().test
        check_apart(mix, test, held_out)
        return Phase(phase, mix, {target: test}, 1, 0.0)
    if phase not in ("single", "multi"):
        raise ValueError(f"a phase is single, multi or zero, got '{phase}'")
    names = names or (MULTI if phase == "multi" else "sentiment")
    mix = build_mix(names, seed, **setting)
    if phase == "single" and len(mix.parts) != 1:
        raise ValueError(f"the single phase trains on one task, got {names}")
    tests = {name: FinTask(name, seed=seed, **setting).load().test for name in mix.parts}
    return Phase(phase, mix, tests, 8 if phase == "single" else 4, 0.05)
