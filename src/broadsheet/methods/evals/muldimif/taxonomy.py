"""The benchmark's categories: 4 main ones and 12 of a second level, and the stray names of the data."""

from __future__ import annotations

#: main category -> second level -> third level
TAXONOMY: dict[str, dict[str, tuple[str, ...]]] = {
    "Content": {
        "Keywords": ("Must include", "Repeated", "Avoid"),
        "Identifiers": ("Start identifier", "End identifier", "Delimiting identifier"),
        "Punctuation": ("Ending punctuation", "Exclude punctuation"),
    },
    "Format": {
        "Markdown": ("Heading levels", "Block quotes"),
        "Json": ("Object nesting levels",),
        "XML": ("Number of attributes",),
        "Table": ("Row limit", "Column limit"),
    },
    "Language": {
        "English": ("All Uppercase", "Capitalized", "Lowercase"),
        "Chinese": ("Simplified", "Traditional"),
    },
    "Length": {
        "Words": ("At most", "At least", "Range"),
        "Sentences": ("At most", "At least", "Range"),
        "Paragraphs": ("At most", "At least", "Range"),
    },
}
MAIN = {second: main for main, seconds in TAXONOMY.items() for second in seconds}
#: what else the data calls categories
_STRAY = {
    ("Format", "Text"): "Identifiers", ("Format", "Blurb"): "Words", ("Format", "Word Count"): "Words",
    ("Format", "Length"): "Words", ("Format", "Bullet Points"): "Identifiers", ("Citations", "In-text"): "Identifiers",
    ("References", "Format"): "Identifiers", ("Content", "Sources"): "Identifiers", ("Content", "Quotes"): "Punctuation",
    ("Content", "Mention"): "Keywords", ("Content", "Length"): "Words",
}  # fmt: skip


def category(main: str, sub: str) -> tuple[str, str]:
    """(main, second level) of a constraint's two names. Raises ValueError for an unknown one.

    ("Length", "Words: At most") is ("Length", "Words"), and so is ("Words", "At most").
    """
    for second in (sub.split(":")[0].strip(), main, _STRAY.get((main, sub), "")):
        if second in MAIN and (main == MAIN[second] or main == second or (main, sub) in _STRAY):
            return MAIN[second], second
    raise ValueError(f"no category '{main}' / '{sub}'; main ones are {', '.join(TAXONOMY)}, second level {', '.join(MAIN)}")
