"""A stage's progress on stderr."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from workflows.runtime.console import human_seconds

LINE_EVERY_SECONDS = 10.0
"""Pace of progress lines where stderr is not a terminal (logs, CI)."""

ProgressCallback = Callable[[int, int, str], None]
"""`(done, total, label)`."""


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
