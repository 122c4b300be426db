"""Questions from statements by rule: which question has this span of this sentence as its answer?

A 135M model asks badly and slowly; a rule asks in microseconds. English only: for other languages and
for sentences that no rule fits there is the gap (`Cloze`) and the model itself (`AnchoredAsked`).
The teacher's likelihood of the span decides afterwards whether question and answer belong together.
"""

import random
import re

from cartridges.selfstudy.spans import Statement

_AUXILIARY = re.compile(
    r"\b(is|was|are|were|has been|have been|had been|can|could|may|might|must|will|would|should|has|had)\b")
_HAVE = frozenset({"has", "had"})
_PREPOSITION = re.compile(r"\b(in|on|at|by|to|of|for|from|with|since|until|after|before|into|as|near)\s*$")
_YEAR = re.compile(r"^1\d{3}$|^20\d{2}$")
_NUMBER = re.compile(r"^\d[\d,.:]*$")
_MEASURE = re.compile(r"^(\d[\d,.]*)\s+([a-z]+)$")
_VAGUE_START = re.compile(r"^(It|He|She|They|This|That|These|Those|There|His|Her|Their|Its|We|You|I|And|But)\b")


def ask(statement: Statement, span: str, rng: random.Random) -> str | None:
    """A question about `statement` that `span` answers, or None if no rule fits."""
    if statement.cells:
        return _ask_row(statement, span, rng)
    text = statement.text.rstrip(" .!?;:")
    found = re.search(rf"(?<![\w,.]){re.escape(span)}(?!\w|[,.]\d)", text)
    if not found or _VAGUE_START.match(text):
        return None
    at = found.start()
    if at == 0:
        return _finish(_subject_word(span, rng) + text[len(span):])
    for rule in (_front, _in_place):
        question = rule(text, at, span, rng)
        if question:
            return _finish(question)
    return None


MAX_SENTENCE_WORDS = 26


def sentence(statement: Statement, span: str) -> str:
    """`span` in a full sentence: the statement itself where it is not too long."""
    if statement.cells:
        (_, subject), *rest = statement.cells
        columns = [name for name, cell in rest if cell == span] or [name for name, _ in rest[:1]]
        cell = span if span != subject else dict(rest).get(columns[0], "")
        return f"The {columns[0].lower()} of {subject} is {cell}."
    words = statement.text.split()
    if len(words) <= MAX_SENTENCE_WORDS:
        return statement.text
    clauses = re.split(r"(?<=[;,])\s+", statement.text)
    holding = [clause for clause in clauses if span in clause]
    return holding[0].rstrip(",;") + "." if holding and len(holding[0].split()) > 3 else span


def _ask_row(statement: Statement, span: str, rng: random.Random) -> str | None:
    """A table row: the cell of one column for the subject of another."""
    asked = [(name, cell) for name, cell in statement.cells if cell == span]
    others = [(name, cell) for name, cell in statement.cells if cell != span and cell]
    if not asked or not others:
        return None
    column, subject_column = asked[0][0].lower(), statement.cells[0][0].lower()
    if asked[0] == statement.cells[0]:
        name, cell = rng.choice(others)
        return rng.choice([f"Which {column} has the {name.lower()} {cell}?",
                           f"What is the {column} with {name.lower()} {cell}?"])
    subject = statement.cells[0][1]
    how = "How much is" if re.search(r"price|cost|toll|fare|fee|rent|wage|fine", column) else "What is"
    return rng.choice([f"What is the {column} of {subject}?", f"What is the {column} for {subject}?",
                       f"{how} the {column} of the {subject_column} {subject}?",
                       f"{how} the {column} for {subject}?"])


def _front(text: str, at: int, span: str, rng: random.Random) -> str | None:
    """The Light Service was founded in 1611 by X -> When was the Light Service founded?"""
    match = _AUXILIARY.search(text)
    if not match or match.end() > at or match.start() == 0 or len(text[:match.start()].split()) > 10:
        return None
    subject, auxiliary = _lower_start(text[:match.start()].strip()), match.group()
    if "," in subject or re.match(r"(?i)(by|in|on|at|since|after|while|when|if|so|although)\b", subject):
        return None
    before, after = text[match.end():at].strip(), text[at + len(span):]
    if "," in before or " and " in before or len(before.split()) > 10:
        return None
    word, before, after = _question_word(span, before, after, rng)
    tail = "" if after.startswith(",") or (before and rng.random() < 0.6) else _clause(after)
    if auxiliary in _HAVE and not re.match(r"^\w+(ed|en|wn|ne)\b", before):
        # A possession: "has 84 berths" -> "How many berths does the harbour have?"
        return f"{word} {'does' if auxiliary == 'has' else 'did'} {subject} have {before} {tail}"
    return f"{word} {auxiliary} {subject} {before} {tail}"


def _in_place(text: str, at: int, span: str, rng: random.Random) -> str:
    """The mill opened in 1702 -> The mill opened in which year?"""
    before, after = text[:at].strip(), text[at + len(span):]
    if _YEAR.match(span):
        word = "which year"
    else:
        word = _question_word(span, "", after, rng)[0].lower()
        after = _question_word(span, "", after, rng)[2]
    return f"{_lower_start(before) if rng.random() < 0.2 else before} {word} {_clause(after)}"


def _question_word(span: str, before: str, after: str, rng: random.Random) -> tuple[str, str, str]:
    """The question word for `span`, and what is left of the words before and after it."""
    preposition = _PREPOSITION.search(before)
    measure = _MEASURE.match(span)
    if measure:
        return f"How many {measure.group(2)}", before, after
    if _YEAR.match(span) and preposition and preposition.group(1) == "in":
        return rng.choice(["When", "In which year"]), before[:preposition.start()].strip(), after
    if _NUMBER.match(span):
        unit = re.match(r"^\s+([a-z]+)\b(.*)$", after, re.S)
        if unit:
            return f"How many {unit.group(1)}", before, unit.group(2)
        return "What", before, after
    if span[:1].isupper():
        if preposition and preposition.group(1) in ("in", "on", "at", "to", "from"):
            return rng.choice(["Where", "Which place"]), before, after
        return (rng.choice(["Who", "Who", "What"]) if " " in span else rng.choice(["What", "Who"])), before, after
    return "What", before, after


def _subject_word(span: str, rng: random.Random) -> str:
    if span[:1].isdigit():
        return "How many"
    return rng.choice(["Who", "What"]) if span[:1].isupper() else "What"


def _clause(text: str) -> str:
    """What follows the span, up to where the clause ends."""
    return re.split(r"[,;:]| and | but | which | who ", text, maxsplit=1)[0].strip()


def _lower_start(text: str) -> str:
    first, _, rest = text.partition(" ")
    return f"{first.lower()} {rest}" if first in ("The", "A", "An", "Every", "Each", "Some", "In", "All") else text


def _finish(question: str) -> str | None:
    question = " ".join(question.split())
    return question[:1].upper() + question[1:] + "?" if len(question.split()) >= 3 else None
