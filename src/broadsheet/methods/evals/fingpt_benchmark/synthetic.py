"""SYNTHETIC financial text with known labels, for all four families, so that everything runs without a download.

No sentence is real. The wording is varied and partly misleading ("the loss narrowed" is good news), but templates are
templates: scores here say whether a pipeline works, not how a model does in finance. NER and relation extraction share
their names, so that a model may carry from one to the other.
"""

from __future__ import annotations

import random

from .readers import Entities
from .rows import RELATIONS, Row, headline, ner, sentiment

_FIRST = (
    "Anna Bruno Carla Dario Edith Falk Greta Henrik Ilse Jaro Katja Lorenz Mira Nils Olga Pavel Rita Sven Tilda Urs".split()
)
_LAST = "Abel Brandt Cerny Dahl Egger Fink Gruber Holm Iversen Jansen Koch Lund Maro Novak Olsen Pohl Roth Weiss".split()
_STEM = "Nor Vesta Kalu Brim Orto Selva Pax Tarn Ember Quill Delph Arga Zent Lumo Hexa Cobal Rivo Stell Umbra Fjor".split()
_KIND = "Holdings Bank Energy Foods Systems Motors Pharma Media Capital Steel".split()
_PLACE = "Oslo Tallinn Porto Graz Lyon Turin Ghent Malmo Krakow Split Cork Leeds Basel Trier Aarhus Bergen".split()
_PRODUCT = "turbines|insulin|sensors|cement|tractors|batteries|cheese|paper|engines|lenses".split("|")
_SECTOR = "banking|shipping|mining|insurance|retail|logistics|biotechnology|telecommunications".split("|")

_GOOD = (
    "{c} profit rose to {n} million from {m} million a year before .",
    "{c} wins a {n} million order from {d} .",
    "{c} 's operating loss narrowed to {m} million from {n} million .",
    "{c} raises its outlook after strong demand for {p} .",
    "costs at {c} fell by {n} % and margins improved .",
    "{c} did not cut its dividend , as analysts had feared .",
)
_BAD = (
    "{c} profit fell to {m} million from {n} million a year before .", "{c} loses a {n} million order to {d} .",
    "{c} 's operating loss widened to {n} million from {m} million .", "{c} lowers its outlook on weak demand for {p} .",
    "costs at {c} rose by {n} % and margins shrank .", "{c} did not raise its dividend , as analysts had hoped .",
)  # fmt: skip
_PLAIN = (
    "{c} is based in {l} and makes {p} .",
    "{c} will publish its report on {n} May .",
    "{c} and {d} said they employ {n} people in {l} .",
    "the annual meeting of {c} is held in {l} .",
    "{c} sells {p} in {n} countries .",
    "sales of {c} were {n} million , as in the year before .",
)


def _company(draw: random.Random) -> str:
    return f"{draw.choice(_STEM)} {draw.choice(_KIND)}"


def _person(draw: random.Random) -> str:
    return f"{draw.choice(_FIRST)} {draw.choice(_LAST)}"


def _fill(template: str, draw: random.Random) -> str:
    low, high = sorted(draw.sample(range(2, 400), 2))
    return template.format(c=_company(draw), d=_company(draw), l=draw.choice(_PLACE), p=draw.choice(_PRODUCT), m=low, n=high)


def make_sentiment(count: int, seed: int = 0) -> list[Row]:
    """News and tweets, half of them neutral, as in the real sets."""
    draw, rows = random.Random(f"sentiment {seed}"), []
    for _ in range(count):
        label = draw.choices(("positive", "negative", "neutral"), (0.28, 0.22, 0.5))[0]
        text = _fill(draw.choice({"positive": _GOOD, "negative": _BAD, "neutral": _PLAIN}[label]), draw)
        kind = draw.choice(("news", "tweet"))
        if kind == "tweet":
            text = f"${draw.choice(_STEM).upper()} - {text.rstrip(' .')}"
        rows.append(sentiment(text, label, "synthetic", kind))
    return rows


def make_headline(count: int, seed: int = 0) -> list[Row]:
    """Headlines about gold, nine rows each."""
    draw, rows = random.Random(f"headline {seed}"), []
    for _ in range(count):
        direction, when = draw.choice(("up", "flat", "down", "none")), draw.choice(("past", "future"))
        price, compared, past = direction != "none", draw.random() < 0.2, when == "past"
        if price:
            past_verb, future_verb = {
                "up": ("gains", "seen gaining"),
                "flat": ("holds steady", "seen holding steady"),
                "down": ("slips", "seen slipping"),
            }[direction]
            where = draw.choice(("on dollar moves", "in thin trade", "before data"))
            text = f"Gold {past_verb if past else future_verb} {where}"
        else:
            text = draw.choice(
                ("Gold imports through {l} were counted again", "{c} closed a gold mine last year")
                if past
                else ("{c} to open a gold refinery in {l}", "Gold trade rules of {l} will be reviewed")
            ).format(l=draw.choice(_PLACE), c=_company(draw))
        if compared:
            text += draw.choice((", silver follows", " while platinum lags", ", copper differs"))
        text += f" ({draw.randint(1, 28)} {draw.choice(('May', 'June', 'July'))})"
        event = not price
        labels = (price, direction == "up", direction == "flat", direction == "down", price and past, price and not past,
                  event and past, event and not past, compared)  # fmt: skip
        rows += headline(text, labels, "synthetic")
    return rows


def make_ner(count: int, seed: int = 0) -> list[tuple[Row, Entities]]:
    """Sentences of agreements, with one to three entities."""
    draw, rows = random.Random(f"ner {seed}"), []
    for _ in range(count):
        person, bank, firm, place = _person(draw), _company(draw), _company(draw), draw.choice(_PLACE)
        text, used = draw.choice(
            (
                ("This Agreement is made between {b} ( the Lender ) and {f} ( the Borrower ) .", "bf"),
                ("{p} shall sign on behalf of {b} in {l} .", "pbl"),
                ("Notices to the Borrower are sent to {p} , {l} .", "pl"),
                ("The Loan is repaid by {f} at the office of the Lender in {l} .", "fl"),
                ("The Guarantor {p} resides in {l}", "pl"),  # an entity at the very end
            )
        )
        values = {
            "p": (person, "person"),
            "b": (bank, "organization"),
            "f": (firm, "organization"),
            "l": (place, "location"),
        }
        made = text.format(**{name: value[0] for name, value in values.items()})
        entities = [values[name] for name in used]
        rows.append((ner(made.split(), entities, "synthetic"), entities))
    return rows


_SAID = {
    "product_or_material_produced": "{a} produces {p}",
    "manufacturer": "the {p} are made by {b}",
    "distributed_by": "the {p} are distributed by {b}",
    "industry": "{a} is active in {s}",
    "position_held": "{q} serves as treasurer",
    "original_broadcaster": "the show Ledger first ran on {b}",
    "owned_by": "{a} is owned by {b}",
    "founded_by": "{a} was founded by {q}",
    "distribution_format": "the show Ledger is sold as download",
    "headquarters_location": "{a} has its headquarters in {l}",
    "stock_exchange": "{a} is listed in {l}",
    "currency": "{l} pays in crowns",
    "parent_organization": "{a} belongs to its parent {b}",
    "chief_executive_officer": "{a} is led by its chief executive {q}",
    "director_/_manager": "{a} has {q} as its manager",
    "owner_of": "{a} owns {b}",
    "operator": "the port of {l} is operated by {b}",
    "member_of": "{a} is a member of the Guild",
    "employer": "{q} works for {b}",
    "chairperson": "{a} is chaired by {q}",
    "platform": "the game Bourse runs on consoles",
    "subsidiary": "{a} has the subsidiary {b}",
    "legal_form": "{a} is a cooperative",
    "publisher": "the Gazette is published by {b}",
    "developer": "the game Bourse is developed by {b}",
    "brand": "{a} sells the brand Luminol",
    "business_division": "{a} runs the division Retail",
    "location_of_formation": "{a} was formed in {l}",
    "creator": "the index was created by {q}",
}
#: what of the sentence is the head and the tail
_ENDS = {
    "product_or_material_produced": "ap",
    "manufacturer": "pb",
    "distributed_by": "pb",
    "industry": "as",
    "position_held": ("q", "treasurer"),
    "original_broadcaster": ("Ledger", "b"),
    "owned_by": "ab",
    "founded_by": "aq",
    "distribution_format": ("Ledger", "download"),
    "headquarters_location": "al",
    "stock_exchange": "al",
    "currency": ("l", "crowns"),
    "parent_organization": "ab",
    "chief_executive_officer": "aq",
    "director_/_manager": "aq",
    "owner_of": "ab",
    "operator": ("port of {l}", "b"),
    "member_of": ("a", "Guild"),
    "employer": "qb",
    "chairperson": "aq",
    "platform": ("Bourse", "consoles"),
    "subsidiary": "ab",
    "legal_form": ("a", "cooperative"),
    "publisher": ("Gazette", "b"),
    "developer": ("Bourse", "b"),
    "brand": ("a", "Luminol"),
    "business_division": ("a", "Retail"),
    "location_of_formation": "al",
    "creator": ("index", "q"),
}


def make_relations(count: int, seed: int = 0) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Sentences with one to three triples (head, tail, relation) of the 29 relations."""
    draw, found = random.Random(f"relations {seed}"), []
    for _ in range(count):
        said, triples = [], []
        for relation in draw.sample(RELATIONS, draw.choice((1, 1, 2, 3))):
            values = {"a": _company(draw), "b": _company(draw), "q": _person(draw), "l": draw.choice(_PLACE),
                      "p": draw.choice(_PRODUCT), "s": draw.choice(_SECTOR)}  # fmt: skip
            head, tail = (values.get(end, end.format(**values)) for end in _ENDS[relation])
            said.append(_SAID[relation].format(**values))
            triples.append((head, tail, relation))
        found.append((" , and ".join(said) + " .", triples))
    return found
