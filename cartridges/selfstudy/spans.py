"""What in a chunk can be asked about: statements, and the spans in them that could be answers."""

import re
from dataclasses import dataclass

from cartridges.selfstudy.verbs import may_be_noun

STOP_WORDS = frozenset("""
a about above after again all also although am an and any are as at be because been before being below
between both but by can could did do does during each either even every for from further had has have
having he her here hers him his how however i if in into is it its itself may me might more most must my
neither no nor not now of off often on once only or other our out over own same she should since so some
such than that the their them themselves then there these they this those through thus to too under until
up upon us very was we were what when where which while who whom whose why will with within without would
yet you your one two there's it's
""".split())  # noqa: SIM905

_NUMBER = re.compile(r"(?<![\w.,])\d[\d,.:/]*(?<![,.:/])(?:\s?%)?(?:\s[a-z]{3,})?")
_NAME = re.compile(r"[A-Z][\w'’\-]*(?:\s(?:of\s|the\s|de\s|and\s)?[A-Z][\w'’\-]*)*")
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = re.compile(rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?\s(?:of\s)?(?:{_MONTH})(?:,?\s\d{{4}})?"
                  rf"|(?:{_MONTH})(?:\s\d{{1,2}}(?:st|nd|rd|th)?,)?\s\d{{1,4}})\b")
_WORD = re.compile(r"[\w'’\-]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]”’]*\s+(?=[\"'(\[“‘]?[A-Z0-9])")
_TABLE_RULE = re.compile(r"^\|?[\s:|-]+\|?$")


@dataclass(frozen=True)
class Statement:
    """A sentence, list item or table row. `text` says it by itself; `verbatim` is how the chunk has it;
    `cells` are a row's (column, cell) pairs."""

    text: str
    verbatim: str
    cells: tuple[tuple[str, str], ...] = ()


def statements(text: str) -> list[Statement]:
    """The statements of `text`, in order. A table row is told with its column names."""
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
            elif header:  # rows whose header was cut off cannot be asked about by column
                pairs = tuple(zip(header, cells, strict=False))
                told = "; ".join(f"{name}: {cell}" for name, cell in pairs)
                found.append(Statement(f"{title} {told}".strip(), line, pairs))
            continue
        header = None
        if line.startswith("#"):
            title = line.lstrip("# ") + "."
        elif line:
            sentences = [part.strip() for part in _SENTENCE_END.split(line) if part.strip()]
            found += [Statement(sentence, sentence) for sentence in sentences if len(sentence.split()) > 3]
            title = sentences[-1] if sentences else title
    return found


def answer_spans(statement: Statement) -> list[str]:
    """Numbers, names and short phrases of `statement`; numbers and names come first."""
    if statement.cells:
        return [cell for _, cell in statement.cells if cell]
    dates = DATE.findall(statement.text)
    text = DATE.sub(" ; ", statement.text)
    strong = list(dates)
    for match in _NUMBER.finditer(text):
        number, _, unit = match.group().partition(" ")
        strong += [number] if not unit or unit in STOP_WORDS else [match.group(), number]
    strong += [m.group() for m in _NAME.finditer(text) if m.start() > 0 and m.group().lower() not in STOP_WORDS]
    spans = dict.fromkeys(strong)
    spans.update(dict.fromkeys(_phrases(text)))
    return [span for span in spans if 1 <= len(span) <= 60 and span.lower() not in STOP_WORDS]


def content_words(text: str) -> list[str]:
    """The words of `text` that are not function words, each once."""
    words = (match.group() for match in _WORD.finditer(text))
    return list(dict.fromkeys(word for word in words if word.lower() not in STOP_WORDS and len(word) > 2))


def _phrases(text: str) -> list[str]:
    """Runs of one to four words between function words and punctuation."""
    runs, current, end = [], [], 0
    for match in _WORD.finditer(text):
        if current and text[end:match.start()] != " ":
            runs.append(current)
            current = []
        if match.group().lower() in STOP_WORDS:
            runs.append(current)
            current = []
        else:
            current = [*current, match.group()]
        end = match.end()
    runs.append(current)
    # Capitalised and numeric runs are pieces of the names and numbers found already.
    return [" ".join(run[-4:]) for run in runs
            if run and len(" ".join(run)) > 4 and may_be_noun(run[-1])
            and not any(word[0].isupper() or word[0].isdigit() for word in run)]
