"""HTML to TSV: all items of a page as rows (paper section 3)."""

from __future__ import annotations

import csv
import html
import random
from collections import Counter

from broadsheet.core.replies import answer_part, code_blocks

from .common import Item, Score, compare, plain

PROCEDURE = ""  # the page is to be copied from: there is none
_PROMPT = """\
Extract the items listed on this page into a TSV table.

```html
{page}
```

The properties of every item: {properties}.{rule}

Write one row an item, in the order of the page, properties separated by a tab, below the header, as a fenced block and \
nothing else:
```tsv
{header}
...
```
Copy the text of a property as it is, without tags. Write N/A where it is missing.
"""


# --- pages of our own: a shop's catalogue -------------------------------------------------------------------------------


def make_html(rows: int, seed: int = 0, filtered: bool | None = None) -> Item:
    """A page that lists items; ``rows`` of them are wanted. ``filtered`` (by chance when None): only those in stock are."""
    if rows < 1:
        raise ValueError(f"a page lists at least one row, got {rows}")
    draw = random.Random(f"html {seed} {rows}")
    chosen = draw.random() < 0.3 if filtered is None else filtered
    cards: list[str] = []
    wanted: list[str] = []
    while len(wanted) < rows:
        colour = draw.choice("red blue green black white grey".split())
        item = draw.choice(
            "desk lamp|office chair|tea kettle|wall clock|paper tray|book end|hand drill|rain coat".split("|")
        )
        brand = draw.choice("Nordal Vesper Calder Brio Tamsin Oku Pell Juno".split())
        name = f"{brand} {item} {draw.randint(100, 999)}, {colour}"
        price = f"${draw.randint(5, 480)}.{draw.choice(('00', '50', '95', '99'))}"
        maker = "" if draw.random() < 0.1 else draw.choice("Hale & Sons|Ostrava Works|Mill Lane Co.|Tarn".split("|"))
        stock = draw.random() < 0.6
        row = [name, price, maker or "N/A"]
        made = f'<span class="maker">by {html.escape(maker)}</span>' if maker else ""
        cards.append(
            f'<li class="card" id="p{draw.randint(1000, 9999)}"><a href="/p/{len(cards)}"><h3>{name}</h3></a>{made}\n'
            f'  <b class="price">{price}</b> <i>{"In stock" if stock else "Sold out"}</i><button>Add to basket</button></li>'
        )
        if stock or not chosen:
            wanted.append("\t".join(row))
    page = (
        "<html><head><title>Catalogue</title></head><body><nav><a>Home</a> <a>Help</a></nav>\n<ul>\n"
        + "\n".join(cards)
        + "\n</ul>\n<footer>Prices include tax.</footer></body></html>"
    )
    header = "name\tprice\tmaker"
    rule = " Take only items that are in stock." if chosen else ""
    prompt = _PROMPT.format(
        page=page, header=header, rule=rule, properties="(1) name; (2) price; (3) maker, without the word 'by'"
    )
    return Item(prompt, f"{header}\n" + "\n".join(wanted), {"steps": rows})


# --- scoring ------------------------------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """A cell as it is compared: lower case, without punctuation, articles and all spaces."""
    return plain(text).replace(" ", "")


def _cells(line: str, width: int) -> tuple[str, ...] | None:
    """The cells of one line. Quotes mean nothing, unless the row has its width only if they do."""
    cells = line.split("\t")
    if len(cells) != width and '"' in line:
        cells = next(csv.reader([line], delimiter="\t"), [])
    return tuple(cell(text) for text in cells) if len(cells) == width else None


def _table(text: str, header: str) -> list[tuple[str, ...] | None]:
    """The rows below the header (which may be missing); None for a row of the wrong width, which the last row may have: it
    is then no row, but something said after the table."""
    width = header.count("\t") + 1
    lines = [line for line in text.strip().splitlines() if line.strip()]
    rows = [_cells(line, width) for line in lines]
    if rows and rows[0] == _cells(header, width):
        rows = rows[1:]
    return rows[:-1] if rows and rows[-1] is None else rows


def _extracted(text: str) -> str:
    part = answer_part(text)
    blocks = code_blocks(part, "tsv") or code_blocks(part)
    if blocks:
        return blocks[-1]
    _, opened, rest = part.rpartition("```tsv")
    return rest if opened else part


def parts(item: Item) -> tuple[str, list[str], str]:
    header, *rows = item.reference.strip().splitlines()
    return f"```tsv\n{header}\n", rows, "\n```"


def score(item: Item, text: str) -> Score:
    """F1 of the rows as a multiset, whatever their order: a row that is written twice counts once. Partial: of the rows in
    order."""
    header = item.reference.strip().splitlines()[0]
    wanted, found = _table(item.reference, header), _table(_extracted(text), header)
    prefix, partial, _ = compare([repr(row) for row in found], [repr(row) for row in wanted])
    readable = Counter(row for row in found if row is not None)
    hits = (readable & Counter(row for row in wanted if row is not None)).total()
    precision, recall = (hits / len(some) if some else 0.0 for some in (found, wanted))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    evidence = f"{hits} of {len(found)} rows right, {len(wanted)} wanted"
    return Score(f1, partial, prefix, len(wanted), bool(readable), {"precision": precision, "recall": recall}, evidence)
