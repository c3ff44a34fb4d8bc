"""The conversations: a list of conversations, each a list of the user's prompts (section 3.3).

The model's replies are generated, so that the context grows turn by turn. The authors' file has 50 conversations of 6 to 10
first prompts of OpenAssistant, and a second one has a single long conversation for sustained runs; both are read as they
are. Where there is no file, prompts of the microworld stand in, drawn by the same rule.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

Conversation = tuple[str, ...]

#: prompts longer than this are left out
LONGEST = 1500
#: prompts that every conversation has, to which 1 to 5 are added
LEAST = 5


def read_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a JSON file. Raises ValueError, naming the conversation, for anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no conversations at {path}; give a JSON list of lists of prompts")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} holds no list of conversations; each is a list of prompts")
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not row or not all(isinstance(prompt, str) and prompt.strip() for prompt in row):
            raise ValueError(f"{path}: conversation {number} is not a list of prompts (strings that are not empty)")
    return [tuple(row) for row in rows]


def write_conversations(conversations: Sequence[Conversation], path: str | Path) -> None:
    """In the same format."""
    Path(path).write_text(json.dumps([list(one) for one in conversations], indent=4, ensure_ascii=False), encoding="utf-8")


def draw_conversations(starters: Sequence[str], count: int = 50, seed: int = 42) -> list[Conversation]:
    """The authors' rule: every conversation is 5 + randint(1, 5) different starters of fewer than 1500 characters.

    The same starters, count and seed give the same conversations. Raises ValueError for fewer than 10 starters.
    """
    usable = [text for text in dict.fromkeys(starters) if text.strip() and len(text) < LONGEST]
    if len(usable) < LEAST + 5:
        raise ValueError(f"{len(usable)} usable starters; a conversation may need {LEAST + 5} different ones")
    if count < 1:
        raise ValueError(f"at least one conversation is drawn, got {count}")
    rng = random.Random(seed)
    return [tuple(rng.sample(usable, LEAST + rng.randint(1, 5))) for _ in range(count)]


def sustained(starters: Sequence[str], turns: int = 48, seed: int = 42) -> list[Conversation]:
    """One long conversation, for runs until the battery is empty or the device is hot."""
    rng = random.Random(seed)
    usable = [text for text in dict.fromkeys(starters) if text.strip() and len(text) < LONGEST]
    if not usable or turns < 1:
        raise ValueError("a sustained run needs at least one starter and one turn")
    prompts: list[str] = []
    while len(prompts) < turns:
        prompts += rng.sample(usable, len(usable))
    return [tuple(prompts[:turns])]


def microworld_starters(count: int = 200, seed: int = 0) -> list[str]:
    """Opening prompts that the built-in models understand: a few facts and a question about them."""
    from broadsheet.core.microworld.tasks import make_sessions

    tasks = ("kv", "needle", "lists", "arithmetic", "facts")
    texts = []
    for number in range(-(-count // len(tasks))):
        for task in tasks:
            session = make_sessions(task, 1, 64, 1, seed=f"melt/{seed}/{number}")[0]
            texts.append(f"{session.context} {session.turns[0].input}".strip())
    return list(dict.fromkeys(texts))[:count]
