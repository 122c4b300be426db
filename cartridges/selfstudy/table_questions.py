"""Questions about the rows of tables, and the sentences that answer them."""

import random
import re

from cartridges.selfstudy.filters import says
from cartridges.selfstudy.spans import Statement
from cartridges.selfstudy.verbs import agent_verb, is_participle, third_person

_MONEY = re.compile(r"price|cost|toll|fare|fee|rent|wage|fine|tax", re.I)
_YEAR = re.compile(r"^(1\d{3}|20\d{2})$")
_MEASURE = re.compile(r"^\d[\d,.]*\s([a-z]+)$")
_TIME = re.compile(r"^\d{1,2}:\d{2}$")
_HOW = {"height": ("high", "tall"), "length": ("long",), "width": ("wide",), "depth": ("deep",), "age": ("old",),
        "weight": ("heavy",), "size": ("big", "large"), "distance": ("far",), "duration": ("long",)}
"""Adjectives that ask for a quantity ("how high") instead of its noun."""
_NO_PERSON = re.compile(r"\b(capital|city|town|village|country|county|state|region|place|location|island|river|sea|port"
                        r"|language|currency|name|title|kind|type)\b", re.I)
"""Columns whose capitalised cells are not persons."""
_PERSON = re.compile(r"^[A-Z][\w'’\-]+(\s[A-Z][\w'’\-]+)+$")


def ask_row(statement: Statement, span: str, rng: random.Random) -> str | None:
    """A question that the cell `span` answers. It names the row's subject, or another cell if the subject is asked."""
    asked = [(name, cell) for name, cell in statement.cells if cell == span]
    others = [(name, cell) for name, cell in statement.cells if cell != span and cell]
    subject_column, subject = statement.cells[0]
    if not asked or not others or not subject:
        return None
    if asked[0] == statement.cells[0]:
        column, cell = rng.choice(others)
        return rng.choice(_for_subject(subject_column.lower(), column, cell) if subject_column
                          else _for_unnamed(_lower(column), cell))
    named = rng.choice([subject, subject, f"the {subject_column.lower()} {subject}" if subject_column else subject])
    return rng.choice(_for_cell(_lower(asked[0][0]), span, named))


def row_sentence(statement: Statement, span: str, question: str) -> str | None:
    """A sentence with the cell `span`, or for the row's subject with the cell that `question` names.

    Rows that are sentences are returned as they are. None for a row without any other cell than its subject.
    """
    (subject_column, subject), *rest = statement.cells
    if not subject_column:
        return statement.text
    filled = [(name, cell) for name, cell in rest if cell]
    if not subject or not filled:
        return None
    columns = [pair for pair in filled if pair[1] == span]
    columns = columns or [pair for pair in filled if says(question, pair[1])] or filled
    column, cell = _lower(columns[0][0]), columns[0][1]
    head, _, tail = column.partition(" ")
    if tail and third_person(head):
        return f"{subject} {column} {cell}."
    if is_participle(head):
        return f"{subject} was {column} {'in ' if _YEAR.match(cell) and not tail else ''}{cell}."
    if _counts(column, cell):
        return f"{subject} has {cell} {column}."
    return f"The {column} of {subject} is {cell}."


def _for_cell(column: str, cell: str, subject: str) -> list[str]:
    head, _, tail = column.partition(" ")
    if tail and third_person(head):
        timed = tail == "at" and ":" in cell
        asks = ["When", "At what time", "What time"] if timed else ["What"]
        rest = f" {tail}" if tail and not timed else ""
        return [f"{ask} does {subject} {third_person(head)}{rest}?" for ask in asks]
    if is_participle(head):
        rest = f" {tail}" if tail else ""
        asks = ["When", "In which year", "In what year"] if _YEAR.match(cell) else ["What", "How"]
        return [f"{ask} was {subject} {head}{rest}?" for ask in asks]
    return _plainly(column, subject) + _by_kind(column, cell, subject)


def _plainly(column: str, subject: str) -> list[str]:
    """Questions that are possible for any column."""
    return [f"What is the {column} of {subject}?", f"What is the {column} for {subject}?",
            f"What {column} does {subject} have?", f"What is {subject}'s {column}?",
            f"Which {column} belongs to {subject}?", f"{subject}: what is the {column}?",
            f"Can you tell me the {column} of {subject}?"]


def _by_kind(column: str, cell: str, subject: str) -> list[str]:
    """Questions in the usual form for a price, a person, a quantity or a time."""
    forms = []
    if _MONEY.search(column):
        forms += [f"How much is the {column} of {subject}?", f"How much is the {column} for {subject}?",
                  f"How much is {subject}?", f"How much must be paid for {subject}?"]
    if _PERSON.match(cell) and not _NO_PERSON.search(column):
        forms += [f"Who is the {column} of {subject}?"] * 4 + [f"Who is {subject}'s {column}?"]
        doing = agent_verb(column)
        forms += [f"Who {doing} {subject}?"] * 2 if doing else []
    unit = _MEASURE.match(cell)
    if unit:
        forms += [f"How many {unit.group(1)} is the {column} of {subject}?",
                  f"What is the {column} of {subject} in {unit.group(1)}?"]
    forms += [f"How {word} is {subject}?" for word in _HOW.get(column, ())] * 2
    if _counts(column, cell):
        forms += [f"How many {column} does {subject} have?"] * 3
    if _TIME.match(cell):
        forms += [f"At what time is the {column} of {subject}?", f"When is the {column} of {subject}?"]
    return forms


def _counts(column: str, cell: str) -> bool:
    """Whether the column is a count: 12 beds."""
    return cell.replace(",", "").isdigit() and column.endswith("s") and not _MONEY.search(column)


def _for_subject(column: str, other: str, cell: str) -> list[str]:
    other = _lower(other)
    head, _, tail = other.partition(" ")
    if tail and third_person(head):
        return [f"Which {column} {other} {cell}?"]
    if is_participle(head):
        return [f"Which {column} was {other}{' in' if _YEAR.match(cell) else ''} {cell}?"]
    forms = [f"Which {column} has the {other} {cell}?", f"Which {column} has {cell} as its {other}?"]
    return forms + [f"{cell} is the {other} of which {column}?"] if _PERSON.match(cell) else forms


def _for_unnamed(other: str, cell: str) -> list[str]:
    """Questions for the subject if its column has no name."""
    return [f"What has the {other} {cell}?", f"Whose {other} is {cell}?", f"{cell} is the {other} of what?",
            f"What has {cell} as its {other}?"]


def _lower(column: str) -> str:
    """A column's name inside a sentence; abbreviations are unchanged."""
    return column if column.isupper() else column[:1].lower() + column[1:]
