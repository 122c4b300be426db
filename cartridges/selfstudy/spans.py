"""Finds the statements in a chunk, and the spans in them that can be answers."""

import re
from collections import Counter
from dataclasses import dataclass, replace

from cartridges.selfstudy.languages import is_english, is_unspaced, unspaced_phrases, word_count
from cartridges.selfstudy.phrases import STOP_WORDS, noun_phrases
from cartridges.selfstudy.verbs import is_plural, is_unit

YEAR = re.compile(r"1\d{3}|20\d\d")
SCALES = "hundred|thousand|million|billion|trillion"
_SCALE = rf"\s?%|\s(?:percent|per cent|{SCALES})\b"
_NUMBER = re.compile(rf"(?<![\w.,$€£¥])(?P<number>(?:[A-Z]{{0,3}}[$€£¥])?\d[\d,.:/]*(?<![,.:/])(?:{_SCALE})?)"
                     r"(?:\s(?P<unit>[a-z]{3,}))?")
_NAME = re.compile(r"(?:[A-Z]\.){2,}(?:\s[A-Z][\w'’\-]+)*"
                   r"|[A-Z][\w'’\-]*(?:\s(?:of\s|the\s|de\s|and\s)?[A-Z][\w'’\-]*)*")
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = re.compile(rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?\s(?:of\s)?(?:{_MONTH})(?:,?\s\d{{4}})?"
                  rf"|(?:{_MONTH})(?:\s\d{{1,2}}(?:st|nd|rd|th)?,)?\s\d{{1,4}})\b")
_WORD = re.compile(r"[\w'’\-]+")
_BEGINS = "A-Z0-9À-ÖØ-ÞĀĂĄĆČĎĐĒĘĚĞĢĪĮİŁŃŇŌŐŘŚŞŠŤŪŮŰŲŹŻŽΑ-ΩА-ЯЁІЇЄ¿¡\u0590-\u06ff\u0900-\u0dff\uac00-\ud7af"
_SENTENCE_END = re.compile(rf"(?<=[.!?؟।])(?<!\b[A-Z]\.)[\"')\]”’»]*\s+(?=[\"'(\[“‘«„]?[{_BEGINS}])"
                           r"|(?<=[。！？])[」』”’）]*\s*(?=[^\s」』”’）])")
MAX_SPAN = 60
"""Longest answer span in characters."""
_TABLE_RULE = re.compile(r"^\|?[\s:|-]+\|?$")
_ATTRIBUTED = re.compile(r"^The (.+) (?:is|was|are|were) (.+?)[.;]?$")
_OWNED = re.compile(r"^(.+?)['’]s? ([a-z][^,;]*) (?:is|was|are|were) (.+?)[.;]?$")
MAX_SUBJECT_WORDS = 12
FEWEST_ALIKE = 3
"""Fewest sentences of the same form about different subjects that are treated as the rows of a table."""


@dataclass(frozen=True)
class Statement:
    """A sentence, list item or table row.

    `text` can be understood alone; `verbatim` is the form in the chunk. `cells` are a row's (column, cell) pairs,
    starting with its subject. Sentences of the same form ("The port number of echo is 7.") are rows too; the column
    of their subject has no name.
    """

    text: str
    verbatim: str
    cells: tuple[tuple[str, str], ...] = ()


def statements(text: str) -> list[Statement]:
    """The statements of `text`, in order. The text of a table row includes the column names."""
    found: list[Statement] = []
    header: list[str] | None = None
    title = ""
    lines = [line.strip() for line in text.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if _TABLE_RULE.match(line):
                continue
            if _TABLE_RULE.match(following) and following:
                header = cells
            elif header:  # without a header, nothing can be asked by column
                pairs = tuple(zip(header, cells, strict=False))
                row = "; ".join(f"{name}: {cell}" for name, cell in pairs)
                found.append(Statement(f"{title} {row}".strip(), line, pairs))
            continue
        header = None
        if line.startswith("#"):
            title = line.lstrip("# ") + "."
        elif line:
            sentences = [part.strip() for part in _SENTENCE_END.split(line) if part.strip()]
            found += [Statement(sentence, sentence) for sentence in sentences if word_count(sentence) > 3]
            title = sentences[-1] if sentences else title
    return _with_rows(found)


def _with_rows(found: list[Statement]) -> list[Statement]:
    """`found`, with cells for sentences of a form that is frequent enough."""
    readings = {index: _readings(one.text) for index, one in enumerate(found) if not one.cells}
    columns = Counter(column for ways in readings.values() for column, _, _ in ways)
    rows = list(found)
    for index, ways in readings.items():
        alike = [way for way in ways if columns[way[0]] >= FEWEST_ALIKE]
        if alike:
            column, subject, value = max(alike, key=lambda way: len(way[0]))  # "number of beds", not "number"
            rows[index] = replace(found[index], cells=(("", subject), (column, value)))
    return rows


def _readings(text: str) -> list[tuple[str, str, str]]:
    """`(column, subject, value)` of "The port number of echo is 7." or "Echo's port number is 7.", at each "of" and
    "for". Names such as University of Chicago are no columns."""
    attributed, owned = _ATTRIBUTED.match(text), _OWNED.match(text)
    ways = []
    if attributed:
        named, value = attributed.groups()
        ways = [(named[:cut.start()], named[cut.end():], value) for cut in re.finditer(r" (?:of|for) ", named)]
    if owned:
        subject, column, value = owned.groups()
        ways.append((column, subject, value))
    return [(column, subject, _without_remark(value)) for column, subject, value in ways
            if column[0].islower() and "," not in subject and len(subject.split()) <= MAX_SUBJECT_WORDS
            and len(_without_remark(value)) <= MAX_SPAN]


def _without_remark(value: str) -> str:
    """"95 dabs, however short the stay" -> "95 dabs"; a list is not cut."""
    first, _, rest = value.partition(", ")
    return value if re.search(r"\b(and|or)\b", rest) else first


def answer_spans(statement: Statement) -> list[str]:
    """Numbers, names and short phrases in `statement`; numbers and names come first."""
    if statement.cells:
        return [cell for _, cell in statement.cells if cell]
    if is_unspaced(statement.text):
        return [span for span in dict.fromkeys(unspaced_phrases(statement.text)) if len(span) <= MAX_SPAN]
    dates = DATE.findall(statement.text)
    text = DATE.sub(" ; ", statement.text)
    strong = list(dates)
    for match in _NUMBER.finditer(text):
        number, unit = match.group("number", "unit")
        strong += [match.group(), number] if _counts(number, unit) else [number]
    strong += [m.group() for m in _NAME.finditer(text) if m.start() > 0 and m.group().lower() not in STOP_WORDS]
    spans = dict.fromkeys(strong)
    spans.update(dict.fromkeys(noun_phrases(text) if is_english(text) else _long_words(text)))
    return [span for span in spans if 1 <= len(span) <= MAX_SPAN and span.lower() not in STOP_WORDS
            and (span in dates or not _is_torn(span, text))]


def _long_words(text: str) -> list[str]:
    """In place of noun phrases, where it is not known what a noun is: of six letters, three of Hangul, or a capital."""
    return [word.group() for word in _WORD.finditer(text)
            if len(word.group()) + 2 * word_count(word.group()) > 7 or (word.start() > 0 and word.group()[0].isupper())]


def _counts(number: str, unit: str | None) -> bool:
    """Whether `number` counts `unit`: not for money, nor if the number is a year ("1977 merger")."""
    return (unit is not None and number[0].isdigit() and unit not in STOP_WORDS and is_unit(unit)
            and (is_plural(unit) or not YEAR.fullmatch(number)))


def _is_torn(span: str, text: str) -> bool:
    """Whether `span` ends within an abbreviation ("in the U" in "in the U.S.") or begins within a number
    ("2 billion" in "$2.2 billion")."""
    if span[0].isdigit():
        return not re.search(rf"(?<![\w.,$€£¥]){re.escape(span)}", text)
    return bool(re.search(r"\b[A-Z]$", span)) and bool(re.search(rf"\b{re.escape(span)}\.(\w|\s\S)", text))


def content_words(text: str) -> list[str]:
    """The distinct words of `text` that are not function words."""
    words = (match.group() for match in _WORD.finditer(text))
    return list(dict.fromkeys(word for word in words if word.lower() not in STOP_WORDS and len(word) > 2))
