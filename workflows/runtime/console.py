"""What a person sees: progress on stderr, tables on stdout, sizes and durations in words."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

LINE_EVERY_SECONDS = 10.0
"""Pace of progress lines where stderr is not a terminal (logs, CI)."""

TABLE_WIDTH = 120
"""Columns of a table where stdout is not a terminal."""
LABEL_WIDTH = 34
"""Longest settings of a variation that stand beside its figures."""
HIDDEN_METRICS = ("choice_accuracy_per_token",)
"""In the JSON, but not in the table."""


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


class Progress:
    """A stage's progress on stderr, with rate and remaining time.

    A bar on a terminal; elsewhere a line every ten seconds and one at the end. `total` may become
    known or change later. Use as a context manager, or call `close`.
    """

    def __init__(self, total: int | None, label: str, unit: str = "it", stream: TextIO | None = None):
        self.total, self.label, self.unit = total, label, unit
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._start = self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first were done: what went before is no rate
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", file=self._stream,
                             dynamic_ncols=True, smoothing=0.1)

    def update(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` (such as `loss 0.31`) stands at the end of the line."""
        self.set(self.done + count, note=note)

    def set(self, done: int, total: int | None = None, note: str = "") -> None:
        """`done` are done in all."""
        advance, self.done = done - self.done, done
        if done and self._first is None:
            self._first = time.monotonic(), done
        if total is not None:
            self.total = total
        if self._bar is not None:
            self._bar.total = self.total
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(advance)
        elif time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._print_line(note)

    def callback(self, done: int, total: int, label: str) -> None:
        """For library functions that report `(done, total, label)`."""
        self.set(done, total, note=label)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done:
            self._print_line("")

    def line(self, note: str = "") -> str:
        """`synthesize: 120/480 conversations, 3.2/s, 1m 52s left, loss 0.3`."""
        elapsed = max(time.monotonic() - self._start, 1e-6)
        rate = self._rate(elapsed)
        count = f"{self.done}/{self.total}" if self.total else str(self.done)
        parts = [f"{self.label}: {count} {self.unit}", f"{rate:.3g}/s"]
        if self.total and self.done >= self.total:
            parts.append(f"took {human_seconds(elapsed)}")
        elif self.total and self.done:
            parts.append(f"{human_seconds((self.total - self.done) / rate)} left")
        return ", ".join(parts + ([note] if note else []))

    def _rate(self, elapsed: float) -> float:
        """A second: over all at the end, before that of what came after the first ones, where that is known."""
        ended = self.total and self.done >= self.total
        if ended or self._first is None or self.done <= self._first[1]:
            return self.done / elapsed
        return (self.done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-6)

    def _print_line(self, note: str) -> None:
        self._last_line = time.monotonic()
        print(self.line(note), file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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


def print_collection(result: dict[str, Any], stream: TextIO) -> None:
    """A line for each cartridge: what it says and how likely it finds the gold answers, beside full context."""
    rows = [["cartridge", "version", "tokens", "p", "contains", "full", "NLL", "full", "choice", "full"]]
    for one in result["cartridges"]:
        card = one["report_card"]
        rows.append([one["name"], one["version"][:8], str(card["corpus"]["tokens"]),
                     str(card["cartridge"]["num_tokens"]),
                     *(_mean(card, arm, metric) for metric in ("contains", "nll_per_token", "choice_accuracy")
                       for arm in ("cartridge", "full_context"))])
    print_table(rows, stream)
    for one in result["failed"]:
        print(f"{one['name']}: not built: {one['error']}", file=stream)
    print(f"\npublished {len(result['cartridges'])} cartridges in {result['registry']}; "
          f"{human_seconds(result['seconds'])} in all", file=stream)


def print_ablation(result: dict[str, Any], stream: TextIO) -> None:
    """What each variation said, and how that differs from the settings given, question by question. Long ones are
    spelled out below, so that a row holds all metrics."""
    metrics = list(result["variations"][0]["metrics"])
    names = {one["label"]: one["label"] if len(one["label"]) <= LABEL_WIDTH else f"[{number}]"
             for number, one in enumerate(result["variations"])}

    def cells(of: dict[str, Any], signed: bool = False) -> list[str]:
        return [_interval(of.get(metric), signed) for metric in metrics]

    rows = [["cartridge", *metrics, "kept", "steps", "minutes"]]
    if result["full_context"]:
        rows.append(["(full context)", *cells(result["full_context"]), "", "", ""])
    rows += [[names[one["label"]], *cells(one["metrics"]), str(one["kept"]), str(one["steps"]),
              f"{sum(one['seconds'].values()) / 60:.1f}"] for one in result["variations"]]
    print_table(rows, stream)
    print("\npaired differences to the settings given (95 % interval):", file=stream)
    print_table([["variation", *metrics], *([names[one["label"]], *cells(one["paired"], signed=True)]
                                           for one in result["variations"] if "paired" in one)], stream)
    for label, name in names.items():
        if name != label:
            print(f"{name} is {label}", file=stream)
    for one in result["failed"]:
        print(f"{one['label']}: not built: {one['error']}", file=stream)
    print(f"\n{result['questions']['asked']} questions, one run each: a run with another seed "
          "(--vary seed=1) shows what chance does", file=stream)


def _mean(card: dict[str, Any], arm: str, metric: str) -> str:
    interval = card["arms"].get(arm, {}).get("metrics", {}).get(metric)
    return "-" if interval is None or interval["mean"] is None else f"{interval['mean']:.2f}"


def print_report_card(card: dict[str, Any], stream: TextIO) -> None:
    """Arms x metrics with 95 % intervals, paired differences, build seconds and sizes."""
    print(_headline(card), file=stream)
    if card.get("arms"):
        print(file=stream)
        print_table(_arm_rows(card["arms"]), stream)
    if card.get("paired"):
        print("\npaired differences (95 % interval):", file=stream)
        print_table(_paired_rows(card["paired"]), stream)
    for line in _remarks(card):
        print(line, file=stream)
    seconds = card.get("build", {}).get("seconds", {})
    if seconds:
        stages = ", ".join(f"{stage} {human_seconds(taken)}" for stage, taken in seconds.items())
        print(f"\nbuild: {stages}; {human_seconds(sum(seconds.values()))} in all", file=stream)


def _remarks(card: dict[str, Any]) -> list[str]:
    """Where the questions come from, the controls, and what the reader should know."""
    lines = []
    questions = card.get("questions", {})
    if questions.get("source") == "held_out_self_study":
        lines.append("the questions are held-out self-study questions, not a person's")
    controls = card.get("controls", {})
    if controls:
        lines.append("controls: " + ", ".join(f"{name} {value:.4g}" for name, value in controls.items()))
    return ["", *lines, *card.get("notes", [])] if lines or card.get("notes") else []


def _headline(card: dict[str, Any]) -> str:
    cartridge, corpus = card.get("cartridge", {}), card.get("corpus", {})
    parts = [f"{cartridge.get('name', 'cartridge')}@{cartridge.get('version', 'unpublished')}"]
    if "num_tokens" in cartridge:
        parts.append(f"{cartridge['num_tokens']} tokens")
    if "bytes" in cartridge:
        parts.append(human_bytes(cartridge["bytes"]))
    if "tokens" in corpus:
        parts.append(f"corpus of {corpus['tokens']} tokens")
    if "compression_ratio" in cartridge:
        parts.append(f"{cartridge['compression_ratio']:.1f}x smaller")
    return ", ".join(parts)


def _arm_rows(arms: dict[str, Any]) -> list[list[str]]:
    metrics = _shown(metric for arm in arms.values() for metric in arm["metrics"])
    rows = [["arm", *metrics, "n", "KV"]]
    for name, arm in arms.items():
        counts = [interval["n"] for interval in arm["metrics"].values()]
        kv_bytes = arm.get("kv_bytes")
        rows.append([name, *(_interval(arm["metrics"].get(metric)) for metric in metrics),
                     str(max(counts, default=0)), "-" if kv_bytes is None else human_bytes(kv_bytes)])
    return rows


def _paired_rows(paired: dict[str, Any]) -> list[list[str]]:
    metrics = _shown(metric for pair in paired.values() for metric in pair)
    return [["difference", *metrics]] + [
        [name, *(_interval(pair.get(metric), signed=True) for metric in metrics)]
        for name, pair in paired.items()]


def _shown(metrics: Iterable[str]) -> list[str]:
    return [metric for metric in dict.fromkeys(metrics) if metric not in HIDDEN_METRICS]


def _interval(interval: dict[str, Any] | None, signed: bool = False) -> str:
    """`0.71 (0.64..0.78)`, or `-` where the metric does not apply to the arm."""
    if interval is None or interval["mean"] is None:
        return "-"
    sign = "+" if signed else ""
    low, high = interval.get("low"), interval.get("high")
    bounds = "" if low is None or high is None else f" ({low:{sign}.2f}..{high:{sign}.2f})"
    return f"{interval['mean']:{sign}.2f}{bounds}"


def print_summary(result: dict[str, Any], stream: TextIO, indent: str = "") -> None:
    """A stage's result as indented `key: value` lines."""
    for key, value in result.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{key}:", file=stream)
            print_summary(value, stream, indent + "  ")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}{key}: {shown}", file=stream)
