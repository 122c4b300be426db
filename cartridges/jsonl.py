"""Reads JSONL files line by line."""

import json
from collections.abc import Iterator
from pathlib import Path

from cartridges.errors import UserError
from cartridges.readers import BOM, not_utf8

Row = tuple[str, dict]
"""The place of a row, counted from 1 (`line 3` of a JSONL, `row 3` of a table), and its content."""


def rows(where: Path) -> Iterator[Row]:
    """The objects in order; blank lines are skipped. Raises `UserError` for an empty file and for a line that is
    not UTF-8 or not an object."""
    empty = True
    for number, line in enumerate(_lines(where), start=1):
        if line.strip():
            empty = False
            yield f"line {number}", _parse(line, number, where)
    if empty:
        raise UserError(f"{where} is empty")


def _lines(where: Path) -> Iterator[str]:
    """The lines without their ends; any system's line ends are accepted."""
    at = 0
    try:
        with where.open("rb") as file:
            for raw in file:
                try:
                    text = raw.rstrip(b"\r\n").decode()
                except UnicodeDecodeError as error:
                    raise not_utf8(where, at + error.start) from None
                yield from (text if at else text.removeprefix(BOM)).split("\r")
                at += len(raw)
    except OSError as error:
        raise UserError(f"cannot read {where}: {error.strerror}") from None


def _parse(line: str, number: int, where: Path) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {number} is not JSON ({error.msg} at column {error.colno}); "
                        "one object a line is expected") from None
    except RecursionError:
        raise UserError(f"{where} line {number} is nested too deeply to be read") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} line {number} is not a JSON object")
    return row
