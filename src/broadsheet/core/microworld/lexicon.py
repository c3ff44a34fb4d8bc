"""The words of the microworld.

Invented words have four letters, two open syllables (``bako``); every one is a single token of the pocket tokenizer, so
that the length of a context in tokens is known when it is generated.
"""

from __future__ import annotations

import random

_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


def _invent(count: int, seed: int) -> tuple[str, ...]:
    syllables = [c + v for c in _CONSONANTS for v in _VOWELS]
    rng = random.Random(seed)
    words: list[str] = []
    seen: set[str] = set()
    while len(words) < count:
        word = rng.choice(syllables) + rng.choice(syllables)
        if word[:2] != word[2:] and word not in seen:
            seen.add(word)
            words.append(word)
    return tuple(words)


#: 512 invented words: keys, values, variables, labels.
WORDS = _invent(512, seed=20)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": tuple("horse tiger rabbit eagle salmon donkey spider goose badger lizard camel otter".split()),
    "fruit": tuple("apple banana cherry melon peach lemon grape mango plum orange papaya apricot".split()),
    "tool": tuple("hammer saw drill wrench chisel shovel ladder pliers axe rake anvil trowel".split()),
    "colour": tuple("red blue green yellow purple black white brown pink grey violet teal".split()),
    "vehicle": tuple("car bus train boat tram lorry bicycle ferry sledge rocket wagon scooter".split()),
    "garment": tuple("coat scarf glove shirt sock hat boot belt jacket apron cloak sandal".split()),
}

ADJECTIVES = tuple("old quiet broken narrow distant heavy gentle frozen hidden crooked famous dusty".split())
NOUNS = tuple("river mill tower garden bridge market forest harbour castle window valley cellar".split())
VERBS = tuple("guards follows crosses faces hides feeds warms shades passes leaves meets holds".split())
TIMES = tuple("today often again slowly early late sometimes never always soon".split())

#: People of the closed-book facts: three syllables, capitalised.
PEOPLE = tuple(
    word.capitalize() + tail for word, tail in zip(_invent(160, seed=21), ("na", "ro", "li", "mu") * 40, strict=True)
)
CITIES = tuple(word.capitalize() for word in _invent(24, seed=22))
