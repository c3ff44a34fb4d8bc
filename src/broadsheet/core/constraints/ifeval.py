"""IFEval's 25 instructions (Zhou et al. 2023, arXiv 2311.07911): strict checks and the loose ones.

`constraint(instruction_id, kwargs)` gives the checker. It decides as the official one does (google-research,
instruction_following_eval), but where that one errs:

- Missing kwargs are an error; the original draws a random threshold. A letter that is none ("#", "!" in two prompts of the
  official set) is counted as what it is; the original draws a random letter.
- Keywords, section names and postscript markers are text; the original takes them as regular expressions.
- A text whose language cannot be told is not in the language asked for; the original lets it pass. The detector is seeded.
- A bullet that is a bare "*" at the end of its line is one line; the original takes the next line along.
- Sentences and words in capitals are told by our own rules (`texts`); the original needs NLTK's data. The two differ on
  unusual abbreviations.

Instructions that need a language detector are `Unverifiable` where langdetect is not installed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from . import Constraint, Range, Unverifiable, Verdict, counted
from .texts import WORDS, filler, paragraphs_of, sentences, sentences_of, tokens

Checker = Constraint | Unverifiable
_RELATIONS = ("less than", "at least")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_SENTENCE = sentences_of(1)

# --- kwargs -------------------------------------------------------------------------------------------------------------


class _Kwargs:
    """The arguments of one instruction; None counts as missing, as in the Hub's copy of the data."""

    def __init__(self, instruction_id: str, given: Mapping[str, Any] | None):
        self.id, self.given = instruction_id, {k: v for k, v in (given or {}).items() if v is not None}

    def _get(self, name: str) -> Any:
        if name not in self.given:
            raise ValueError(f"{self.id} needs the argument '{name}'; add it to kwargs")
        return self.given[name]

    def number(self, name: str) -> int:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            raise ValueError(f"{self.id}: '{name}' is a whole number of at least 0, got {value!r}")
        return int(value)

    def string(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.id}: '{name}' is a text that is not blank, got {value!r}")
        return value.strip()

    def strings(self, name: str) -> tuple[str, ...]:
        value = self._get(name)
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ValueError(f"{self.id}: '{name}' is a list of texts, got {value!r}")
        if not all(isinstance(one, str) and one.strip() for one in value):
            raise ValueError(f"{self.id}: '{name}' holds a blank or something that is no text")
        return tuple(value)

    def range(self, number: str, relation: str = "relation") -> Range:
        """The numbers allowed by a threshold and "at least" or "less than"."""
        threshold, word = self.number(number), self._get(relation)
        if word not in _RELATIONS:
            raise ValueError(f"{self.id}: '{relation}' is 'less than' or 'at least', got {word!r}")
        if word == "at least":
            return Range(threshold)
        if threshold == 0:
            raise ValueError(f"{self.id}: nothing is less than 0")
        return Range(0, threshold - 1)


def _test(ok: Callable[[str], bool], seen: str, unseen: str) -> Callable[[str], Verdict]:
    return lambda text: Verdict(True, seen) if ok(text) else Verdict(False, unseen)


def _always(text: str) -> Callable[[], str]:
    return lambda: text


# --- keywords -----------------------------------------------------------------------------------------------------------


def _existence(kind: str, kwargs: _Kwargs) -> Checker:
    keywords = kwargs.strings("keywords")

    def test(text: str) -> Verdict:
        lacking = [word for word in keywords if word.lower() not in text.lower()]
        return Verdict(not lacking, f"lacks {', '.join(lacking)}" if lacking else "has all keywords")

    bad = next((text for text in (_SENTENCE, "Zzz.", "123.") if not test(text)), " ")
    return Constraint(
        kind, f"include the words {', '.join(keywords)}", test, _always(f"{' '.join(keywords)}."), _always(bad)
    )


def _frequency(kind: str, kwargs: _Kwargs) -> Checker:
    keyword, allowed = kwargs.string("keyword"), kwargs.range("frequency")
    pattern = re.compile(re.escape(keyword), re.I)

    def make(count: int) -> str:
        return " ".join([keyword] * count) if count else _without(keyword)

    return counted(kind, f"times '{keyword}'", allowed, lambda text: len(pattern.findall(text)), make)


def _without(*words: str) -> str:
    """Some plain text in which none of ``words`` occurs."""
    for text in (_SENTENCE, "Zzz.", "123.", "..."):
        if not any(word.lower() in text.lower() for word in words):
            return text
    raise ValueError("no text without the words is known")


def _forbidden(kind: str, kwargs: _Kwargs) -> Checker:
    words = kwargs.strings("forbidden_words")
    pattern = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in words), re.I)

    def test(text: str) -> Verdict:
        found = pattern.search(text)
        return Verdict(not found, f"has '{found[0]}'" if found else "has none of the words")

    return Constraint(kind, f"without the words {', '.join(words)}", test, lambda: _without(*words), _always(words[0]))


def _letters(kind: str, kwargs: _Kwargs) -> Checker:
    letter, allowed = kwargs.string("letter").lower(), kwargs.range("let_frequency", "let_relation")
    if len(letter) != 1:
        raise ValueError(f"{kind}: 'letter' is one character, got {letter!r}")
    other = "z" if letter != "z" else "y"
    return counted(
        kind, f"times the letter '{letter}'", allowed, lambda text: text.lower().count(letter), lambda n: letter * n or other
    )


# --- language and case --------------------------------------------------------------------------------------------------

#: a sentence in each language that the official set may ask for: "The children play in the garden, and their mother reads a
#: book", or something as plain
SAMPLES = {
    "en": "The children are playing in the garden while their mother reads an old book.",
    "es": "Los niños juegan en el jardín mientras su madre lee un libro muy antiguo.",
    "pt": "As crianças brincam no jardim enquanto a mãe delas lê um livro muito antigo.",
    "ar": "يلعب الأطفال في الحديقة بينما تقرأ أمهم كتابا قديما عن التاريخ.",
    "hi": "बच्चे बगीचे में खेल रहे हैं और उनकी माँ एक पुरानी किताब पढ़ रही है।",
    "fr": "Les enfants jouent dans le jardin pendant que leur mère lit un vieux livre.",
    "ru": "Дети играют в саду, а их мать читает очень старую книгу об истории.",
    "de": "Die Kinder spielen im Garten, während ihre Mutter ein altes Buch liest.",
    "ja": "子供たちは庭で遊んでいて、お母さんは古い本を読んでいます。",
    "it": "I bambini giocano nel giardino mentre la loro madre legge un vecchio libro.",
    "bn": "শিশুরা বাগানে খেলছে এবং তাদের মা একটি পুরানো বই পড়ছেন।",
    "uk": "Діти граються в саду, а їхня мати читає дуже стару книжку про історію.",
    "th": "เด็ก ๆ กำลังเล่นอยู่ในสวน และแม่ของพวกเขากำลังอ่านหนังสือเก่า",
    "ur": "بچے باغ میں کھیل رہے ہیں اور ان کی ماں ایک پرانی کتاب پڑھ رہی ہے۔",
    "ta": "குழந்தைகள் தோட்டத்தில் விளையாடுகிறார்கள், அவர்களின் தாய் ஒரு பழைய புத்தகம் படிக்கிறார்.",
    "te": "పిల్లలు తోటలో ఆడుకుంటున్నారు, వారి తల్లి ఒక పాత పుస్తకం చదువుతోంది.",
    "bg": "Децата играят в градината, докато майка им чете една много стара книга.",
    "ko": "아이들은 정원에서 놀고 있고 어머니는 오래된 책을 읽고 있습니다.",
    "pl": "Dzieci bawią się w ogrodzie, a ich matka czyta bardzo starą książkę.",
    "he": "הילדים משחקים בגינה ואמא שלהם קוראת ספר ישן על היסטוריה.",
    "fa": "بچه‌ها در باغ بازی می‌کنند و مادرشان یک کتاب قدیمی می‌خواند.",
    "vi": "Bọn trẻ đang chơi trong vườn còn mẹ của chúng đang đọc một cuốn sách cũ.",
    "ne": "केटाकेटीहरू बगैंचामा खेलिरहेका छन् र उनीहरूकी आमा पुरानो किताब पढ्दै हुनुहुन्छ।",
    "sw": "Watoto wanacheza bustanini na mama yao anasoma kitabu cha zamani kuhusu historia.",
    "kn": "ಮಕ್ಕಳು ತೋಟದಲ್ಲಿ ಆಡುತ್ತಿದ್ದಾರೆ ಮತ್ತು ಅವರ ತಾಯಿ ಹಳೆಯ ಪುಸ್ತಕ ಓದುತ್ತಿದ್ದಾರೆ.",
    "mr": "मुले बागेत खेळत आहेत आणि त्यांची आई एक जुने पुस्तक वाचत आहे.",
    "gu": "બાળકો બગીચામાં રમી રહ્યા છે અને તેમની માતા એક જૂનું પુસ્તક વાંચી રહી છે.",
    "pa": "ਬੱਚੇ ਬਾਗ ਵਿੱਚ ਖੇਡ ਰਹੇ ਹਨ ਅਤੇ ਉਨ੍ਹਾਂ ਦੀ ਮਾਂ ਇੱਕ ਪੁਰਾਣੀ ਕਿਤਾਬ ਪੜ੍ਹ ਰਹੀ ਹੈ।",
    "ml": "കുട്ടികൾ പൂന്തോട്ടത്തിൽ കളിക്കുന്നു, അവരുടെ അമ്മ ഒരു പഴയ പുസ്തകം വായിക്കുന്നു.",
    "fi": "Lapset leikkivät puutarhassa, ja heidän äitinsä lukee hyvin vanhaa kirjaa.",
}


@cache
def _detector() -> Callable[[str], str] | None:
    """Tells a text's language, or "" where it cannot; None where langdetect is not installed."""
    try:
        import langdetect
    except ImportError:
        return None
    langdetect.DetectorFactory.seed = 0

    def detect(text: str) -> str:
        try:
            return str(langdetect.detect(text))
        except langdetect.LangDetectException:
            return ""

    return detect


def _no_detector(kind: str) -> Unverifiable:
    return Unverifiable("telling a language needs langdetect: pip install langdetect", kind)


def _language(kind: str, kwargs: _Kwargs) -> Checker:
    language, detect = kwargs.string("language"), _detector()
    if language not in SAMPLES:
        raise ValueError(f"{kind}: 'language' is one of {', '.join(SAMPLES)}, got '{language}'")
    if detect is None:
        return _no_detector(kind)

    def test(text: str) -> Verdict:
        found = detect(text)
        return Verdict(found == language, f"language {found or 'unknown'}, asked for {language}")

    other = SAMPLES["fr" if language == "en" else "en"]
    return Constraint(kind, f"entirely in {language}", test, _always(SAMPLES[language]), _always(other))


def _english_case(upper: bool) -> Callable[[str, _Kwargs], Checker]:
    def build(kind: str, kwargs: _Kwargs) -> Checker:
        detect, name = _detector(), "capital" if upper else "small"
        if detect is None:
            return _no_detector(kind)

        def test(text: str) -> Verdict:
            if not (text.isupper() if upper else text.islower()):
                return Verdict(False, f"not all letters are {name}")
            found = detect(text)
            return Verdict(found == "en", f"all letters are {name}, language {found or 'unknown'}")

        good = SAMPLES["en"].upper() if upper else SAMPLES["en"].lower()
        return Constraint(kind, f"in English and in {name} letters", test, _always(good), _always(SAMPLES["en"]))

    return build


def _capital_words(kind: str, kwargs: _Kwargs) -> Checker:
    allowed = kwargs.range("capital_frequency", "capital_relation")
    return counted(
        kind, "words in capitals", allowed, lambda text: sum(word.isupper() for word in tokens(text)),
        lambda n: filler(n).upper() or _SENTENCE,
    )  # fmt: skip


# --- length -------------------------------------------------------------------------------------------------------------


def _words(kind: str, kwargs: _Kwargs) -> Checker:
    allowed = kwargs.range("num_words")
    return counted(kind, "words", allowed, lambda text: len(re.findall(r"\w+", text)), lambda n: filler(n) or "...")


def _sentences(kind: str, kwargs: _Kwargs) -> Checker:
    allowed = kwargs.range("num_sentences")
    return counted(kind, "sentences", allowed, lambda text: len(sentences(text)), sentences_of)


def _paragraphs(kind: str, kwargs: _Kwargs) -> Checker:
    """Divided by ``***``; a blank one in the middle fails."""
    wanted = kwargs.number("num_paragraphs")

    def test(text: str) -> Verdict:
        parts = [part.strip() for part in text.split("***")]
        inner = parts[bool(not parts[0]) : len(parts) - (len(parts) > 1 and not parts[-1])]
        if not all(inner):
            return Verdict(False, "a paragraph between dividers is blank")
        return Verdict(len(inner) == wanted, f"{len(inner)} paragraphs, asked for {wanted}")

    return Constraint(
        kind, f"{wanted} paragraphs divided by ***", test,
        lambda: paragraphs_of(wanted, "\n***\n"), lambda: paragraphs_of(wanted + 1, "\n***\n"),
    )  # fmt: skip


def _first_word(kind: str, kwargs: _Kwargs) -> Checker:
    wanted, place, word = (
        kwargs.number("num_paragraphs"),
        kwargs.number("nth_paragraph"),
        kwargs.string("first_word").lower(),
    )
    if not 1 <= place <= wanted:
        raise ValueError(f"{kind}: paragraph {place} of {wanted} is none")

    def test(text: str) -> Verdict:
        parts = text.split("\n\n")
        count = sum(bool(part.strip()) for part in parts)
        if place > count or not parts[place - 1].strip():
            return Verdict(False, f"no paragraph {place}; {count} in all")
        first = re.split(r"[.,?!'\"]", parts[place - 1].split()[0].lstrip("'").lstrip('"'))[0].lower()
        said = f"{count} paragraphs, asked for {wanted}; number {place} begins with '{first}', asked for '{word}'"
        return Verdict(count == wanted and first == word, said)

    def make(count: int) -> str:
        parts = [sentences_of(1) for _ in range(count)]
        parts[place - 1 : place] = [f"{word} {filler(5)}."]
        return "\n\n".join(parts)

    demand = f"{wanted} paragraphs, the one number {place} beginning with '{word}'"
    return Constraint(kind, demand, test, lambda: make(wanted), lambda: make(wanted + 1))


# --- contents and format ------------------------------------------------------------------------------------------------


def _count_placeholders(text: str) -> int:
    """Spans in square brackets, within a line."""
    count = 0
    for line in text.split("\n"):
        end = -1
        while (start := line.find("[", end + 1)) >= 0 and (end := line.find("]", start + 1)) >= 0:
            count += 1
    return count


def _placeholders(kind: str, kwargs: _Kwargs) -> Checker:
    allowed = Range(kwargs.number("num_placeholders"))
    return counted(kind, "placeholders", allowed, _count_placeholders, lambda n: "[name] " * n or _SENTENCE)


def _postscript(kind: str, kwargs: _Kwargs) -> Checker:
    marker = kwargs.string("postscript_marker")
    usual = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = re.compile(usual.get(marker, re.escape(marker.lower())))
    test = _test(lambda text: bool(pattern.search(text.lower())), "has a postscript", f"has no postscript {marker}")
    return Constraint(
        kind,
        f"a postscript starting with {marker}",
        test,
        _always(f"{_SENTENCE}\n\n{marker} Good luck."),
        _always(_SENTENCE),
    )


def _count_bullets(text: str) -> int:
    lines = [line.lstrip() for line in text.split("\n")]
    return sum(line[:1] == "-" or (line[:1] == "*" and line[:2] not in ("*", "**")) for line in lines)


def _bullets(kind: str, kwargs: _Kwargs) -> Checker:
    wanted = kwargs.number("num_bullets")
    return counted(
        kind, "bullet points", Range(wanted, wanted), _count_bullets, lambda n: "\n".join(["* A point."] * n) or _SENTENCE
    )


def _constrained(kind: str, kwargs: _Kwargs) -> Checker:
    test = _test(lambda text: any(one in text for one in _ANSWERS), "has an answer of the list", "has no answer of the list")
    return Constraint(kind, f"one of {', '.join(_ANSWERS)}", test, _always(_ANSWERS[0]), _always(_SENTENCE))


def _count_highlights(text: str) -> int:
    single = sum(bool(span.strip("*").strip()) for span in re.findall(r"\*[^\n*]*\*", text))
    return single + sum(bool(span[2:-2].strip()) for span in re.findall(r"\*\*[^\n*]*\*\*", text))


def _highlights(kind: str, kwargs: _Kwargs) -> Checker:
    allowed = Range(kwargs.number("num_highlights"))
    return counted(
        kind, "highlighted sections", allowed, _count_highlights, lambda n: "\n".join(["*a section*"] * n) or _SENTENCE
    )


def _sections(kind: str, kwargs: _Kwargs) -> Checker:
    splitter, allowed = kwargs.string("section_spliter"), Range(kwargs.number("num_sections"))
    pattern = re.compile(re.escape(splitter) + r"\s?\d+")

    def make(count: int) -> str:
        return "\n".join(f"{splitter} {place + 1}\n{_SENTENCE}" for place in range(count)) or _SENTENCE

    return counted(kind, f"sections marked {splitter}", allowed, lambda text: len(pattern.findall(text)), make)


def _json(kind: str, kwargs: _Kwargs) -> Checker:
    def test(text: str) -> Verdict:
        value = text.strip()
        for fence in ("```json", "```Json", "```JSON", "```"):
            value = value.removeprefix(fence)
        try:
            json.loads(value.removesuffix("```").strip())
        except (ValueError, RecursionError) as error:
            return Verdict(False, f"no JSON: {error}")
        return Verdict(True, "JSON")

    return Constraint(kind, "entirely JSON", test, _always('```json\n{"answer": 1}\n```'), _always(_SENTENCE))


def _has_title(text: str) -> bool:
    """Whether a line has something between << and >>."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start : end + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _title(kind: str, kwargs: _Kwargs) -> Checker:
    test = _test(_has_title, "has a title", "has no title in << >>")
    return Constraint(kind, "a title in << >>", test, _always(f"<<A day>>\n{_SENTENCE}"), _always(_SENTENCE))


def _two_responses(kind: str, kwargs: _Kwargs) -> Checker:
    def test(text: str) -> Verdict:
        parts = [part.strip() for part in text.split("******")]
        if not all(parts[1:-1]):
            return Verdict(False, "a response is blank")
        full = [part for part in parts if part]
        return Verdict(len(full) == 2 and full[0] != full[1], f"{len(full)} responses, {len(set(full))} different")

    good = f"{sentences_of(1)}\n******\n{sentences_of(2)}"
    return Constraint(kind, "two responses divided by ******", test, _always(good), _always(_SENTENCE))


def _repeat(kind: str, kwargs: _Kwargs) -> Checker:
    prompt = kwargs.string("prompt_to_repeat")
    test = _test(
        lambda text: text.strip().lower().startswith(prompt.lower()),
        "repeats the request",
        "does not begin with the request",
    )
    bad = f"1. {_SENTENCE}" if not prompt.startswith("1") else _SENTENCE
    return Constraint(kind, "the request first, word for word", test, _always(f"{prompt}\n\n{_SENTENCE}"), _always(bad))


def _end(kind: str, kwargs: _Kwargs) -> Checker:
    phrase = kwargs.string("end_phrase").lower()
    test = _test(
        lambda text: text.strip().strip('"').lower().endswith(phrase), "ends as asked", f"does not end with '{phrase}'"
    )
    return Constraint(
        kind,
        f"'{phrase}' at the end",
        test,
        _always(f"{_SENTENCE} {kwargs.string('end_phrase')}"),
        _always(f"{_SENTENCE} ~"),
    )


def _no_comma(kind: str, kwargs: _Kwargs) -> Checker:
    test = _test(lambda text: "," not in text, "no comma", "has a comma")
    return Constraint(kind, "no commas", test, _always(_SENTENCE), _always(f"{WORDS[1]}, {_SENTENCE}"))


def _quotation(kind: str, kwargs: _Kwargs) -> Checker:
    def ok(text: str) -> bool:
        value = text.strip()
        return len(value) > 1 and value[0] == value[-1] == '"'

    test = _test(ok, "in double quotation marks", "not wrapped in double quotation marks")
    return Constraint(kind, "all in double quotation marks", test, _always(f'"{_SENTENCE}"'), _always(_SENTENCE))


INSTRUCTIONS: Mapping[str, Callable[[str, _Kwargs], Checker]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _english_case(upper=True),
    "change_case:english_lowercase": _english_case(upper=False),
    "punctuation:no_comma": _no_comma,
}


def constraint(instruction_id: str, kwargs: Mapping[str, Any] | None = None) -> Constraint | Unverifiable:
    """The checker of one instruction. Raises ValueError for an unknown id and for kwargs that are missing or senseless."""
    build = INSTRUCTIONS.get(instruction_id)
    if build is None:
        raise ValueError(f"no IFEval instruction '{instruction_id}'; there are {', '.join(INSTRUCTIONS)}")
    return build(instruction_id, _Kwargs(instruction_id, kwargs))


# --- strict and loose ---------------------------------------------------------------------------------------------------


def loose_variants(text: str) -> list[str]:
    """The eight texts of the loose check: as is, without its first line, its last line, both; and each without asterisks."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(part.replace("*", "") for part in cut)]


def check_loose(checker: Constraint, text: str) -> Verdict:
    """The first variant that passes, else the strict verdict."""
    strict = checker.check(text)
    if strict:
        return strict
    return next((verdict for one in loose_variants(text)[1:] if (verdict := checker.check(one))), strict)


# --- the official prompts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One prompt with its instructions."""

    key: str
    prompt: str
    instruction_ids: tuple[str, ...]
    kwargs: tuple[Mapping[str, Any], ...]

    @cached_property
    def checkers(self) -> tuple[Constraint | Unverifiable, ...]:
        return tuple(constraint(name, given) for name, given in zip(self.instruction_ids, self.kwargs, strict=True))


def load_ifeval(path: str | Path) -> list[Item]:
    """Prompts in the official form (``input_data.jsonl``, or a folder that holds it). Raises ValueError."""
    path = Path(path)
    path = path / "input_data.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read IFEval's prompts at {path}: {error.strerror}") from None
    return [_item(json.loads(line), f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _item(row: Mapping[str, Any], where: str) -> Item:
    try:
        ids, kwargs = tuple(row["instruction_id_list"]), tuple(row["kwargs"])
        item = Item(str(row["key"]), row["prompt"], ids, kwargs)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a prompt of IFEval's form ({error} is missing)") from None
    if not ids or len(ids) != len(kwargs):
        raise ValueError(f"{where}: {len(ids)} instructions with {len(kwargs)} kwargs")
    return item


def accuracies(checkers: Iterable[Sequence[Constraint | Unverifiable]], responses: Iterable[str]) -> dict[str, float]:
    """The paper's four numbers, ``prompt_strict``, ``prompt_loose``, ``inst_strict`` and ``inst_loose``, and
    ``unverifiable``, how many instructions were left out. Prompts that have one of these count for no prompt accuracy."""
    totals: Counter[str] = Counter()
    for some, text in zip(checkers, responses, strict=True):
        known = [one for one in some if isinstance(one, Constraint)]
        totals["unverifiable"] += len(some) - len(known)
        for mode, check in (("strict", Constraint.check), ("loose", check_loose)):
            verdicts = [check(one, text).ok for one in known]
            totals[f"inst_{mode}"] += sum(verdicts)
            totals[f"prompt_{mode}"] += len(known) == len(some) and all(verdicts)
        totals["instructions"] += len(known)
        totals["prompts"] += len(known) == len(some)
    found = {
        f"{level}_{mode}": totals[f"{level}_{mode}"] / max(1, totals[counted_as])
        for level, counted_as in (("prompt", "prompts"), ("inst", "instructions"))
        for mode in ("strict", "loose")
    }
    return {**found, "unverifiable": float(totals["unverifiable"])}


# --- texts that obey several at once ------------------------------------------------------------------------------------


def joint_witness(instructions: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
    """A text that passes all the instructions at once, or None where none was found: they may contradict each other."""
    checkers = [constraint(name, kwargs) for name, kwargs in instructions]
    known = [one for one in checkers if isinstance(one, Constraint)]
    if len(known) < len(checkers):
        return None
    # Of a pair of limits, the lower one says how much to write.
    ordered = sorted(instructions, key=lambda pair: "at least" in pair[1].values())
    drafts = [_joint(ordered, lines_first, short) for lines_first in (True, False) for short in (False, True)]
    texts = [*drafts, *(one.witness() for one in known)]
    return next((text for text in texts if all(one.check(text).ok for one in known)), None)


def _amount(kwargs: Mapping[str, Any], number: str, relation: str = "relation") -> int:
    """How many to write: the threshold where at least so many are asked for, else few."""
    if kwargs.get(relation, "at least") == "at least":
        return int(kwargs[number])
    return max(0, min(int(kwargs[number]) - 1, 1))


def _joint(instructions: Sequence[tuple[str, Mapping[str, Any]]], lines_first: bool, short: bool) -> str:
    """A draft: extra lines before or after the prose, the prose as one sentence where ``short``."""
    asked = dict(instructions)
    given = asked.get
    words: list[str] = []
    for name, kwargs in instructions:
        if name == "keywords:existence":
            words += kwargs["keywords"]
        elif name == "keywords:frequency":
            words += [kwargs["keyword"]] * max(0, _amount(kwargs, "frequency") - words.count(kwargs["keyword"]))
        elif name == "keywords:letter_frequency":
            words += [kwargs["letter"]] * _amount(kwargs, "let_frequency", "let_relation")
        elif name == "change_case:capital_word_frequency":
            words += ["RIVER"] * _amount(kwargs, "capital_frequency", "capital_relation")
    language = (given("language:response_language") or {}).get("language", "en")
    forbidden = [word.lower() for word in (given("keywords:forbidden_words") or {}).get("forbidden_words", ())]
    if language != "en":
        base = SAMPLES[language]
    else:
        base = filler(8) if not any(word in filler(8) for word in forbidden) else "zig zag"
    total, wanted = given("length_constraints:number_words"), given("length_constraints:number_sentences")
    count = 1 if wanted is None else max(1, _amount(wanted, "num_sentences"))
    sentence = base[:1].upper() + base[1:].rstrip(".") + "."
    if total is not None and short:
        sentence, count = "Yes.", min(count, max(1, _amount(total, "num_words")))
    if total is not None and total["relation"] == "at least":
        every = max(1, len(re.findall(r"\w+", sentence)))
        if wanted is None:
            count = -(-int(total["num_words"]) // every)
        else:
            sentence = " ".join([sentence.rstrip(".")] * -(-int(total["num_words"]) // (every * count))) + "."
    prose = " ".join([sentence] * count)
    lines = [" ".join(words)] if words else []
    if "detectable_format:title" in asked:
        lines.insert(0, "<<A day>>")
    if (some := given("detectable_content:number_placeholders")) is not None:
        lines.append("[name] " * int(some["num_placeholders"]))
    lines += ["* point"] * int((given("detectable_format:number_bullet_lists") or {}).get("num_bullets", 0))
    lines += ["*a part*"] * int((given("detectable_format:number_highlighted_sections") or {}).get("num_highlights", 0))
    if "detectable_format:constrained_response" in asked:
        lines.append(_ANSWERS[0])
    if (some := given("detectable_format:multiple_sections")) is not None:
        lines += [f"{some['section_spliter']} {place + 1}" for place in range(int(some["num_sections"]))]
    body = "\n".join([*lines, prose] if lines_first else [prose, *lines])
    if (some := given("length_constraints:number_paragraphs")) is not None:
        body = "\n***\n".join([body, *["Yes."] * (int(some["num_paragraphs"]) - 1)])
    if (some := given("length_constraints:nth_paragraph_first_word")) is not None:
        parts = [body, *["Yes."] * (int(some["num_paragraphs"]) - 1)]
        parts[int(some["nth_paragraph"]) - 1] = f"{some['first_word']} {parts[int(some['nth_paragraph']) - 1]}"
        body = "\n\n".join(parts)
    if "combination:two_responses" in asked:
        body = f"{body}\n******\n{body} Yes."
    if (some := given("detectable_content:postscript")) is not None:
        body += f"\n\n{some['postscript_marker']} {words[0] if words else 'yes'}"
    if (some := given("startend:end_checker")) is not None:
        body += f"\n{some['end_phrase']}"
    if "punctuation:no_comma" in asked:
        body = body.replace(",", "")
    if "detectable_format:json_format" in asked:
        body = json.dumps({"answer": body}, ensure_ascii=False)
    if (some := given("combination:repeat_prompt")) is not None:
        body = f"{some['prompt_to_repeat']}\n\n{body}"
    if "startend:quotation" in asked:
        body = f'"{body}"'
    if "change_case:english_capital" in asked:
        return body.upper()
    return body.lower() if "change_case:english_lowercase" in asked else body
