"""Prints results: tables, sizes and durations in words, JSON."""

import json
import math
import shutil
from typing import Any, TextIO

TABLE_WIDTH = 120
"""Columns of a table where stdout is not a terminal."""


def human_bytes(size: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """`75` -> `1m 15s`."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def to_json(value: Any) -> str:
    """One line of strict JSON: what is not finite becomes null, which every parser reads."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(rows: list[list[str]], stream: TextIO) -> None:
    """Aligned columns; the first row is the head, numbers stand to the right.

    Columns that do not fit the terminal follow in a further block, with the first column repeated.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    blocks: list[list[int]] = [[]]
    room = 0
    for column, width in enumerate(widths[1:], start=1):
        if blocks[-1] and room < width + 2:
            blocks.append([])
        if not blocks[-1]:
            room = shutil.get_terminal_size((TABLE_WIDTH, 24)).columns - widths[0]
        blocks[-1].append(column)
        room -= width + 2
    for number, block in enumerate(blocks):
        if number:
            print(file=stream)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in block)]
            print("  ".join(cells).rstrip(), file=stream)


def print_summary(result: dict[str, Any], stream: TextIO, indent: str = "") -> None:
    """A stage's result as indented `key: value` lines."""
    for key, value in result.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{key}:", file=stream)
            print_summary(value, stream, indent + "  ")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}{key}: {shown}", file=stream)
