"""Conversations that raise: tried again alone, then counted and listed, fatal when they are too many."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cartridges.errors import UserError
from cartridges.records import Dropped, Task
from cartridges.selfstudy.asker import AskingRefusedError
from cartridges.selfstudy.drop_reasons import ERROR, error_reason

REFUSED = f"{ERROR}{AskingRefusedError.__name__}: "
FEWEST_FAILED = 8
"""That do not yet end a run before its time."""


def run_with_retry(synthesizer, tasks: Sequence[Task], retries: int = 1) -> list[Any]:
    """`synthesizer.run(tasks)`; where that raises, each task alone, up to `retries` times.

    One result a task, in order. What still raises is dropped with the reason `error: <type>: <message>`;
    the others of its batch have `retries` in their `info`. Where the asking side is refused none is tried again.
    """
    try:
        return synthesizer.run(tasks)
    except AskingRefusedError as error:  # so it would be each of them, alone too
        return [_failed(task, error) for task in tasks]
    except Exception as error:  # the declared retry: alone, so that one bad row does not cost the batch
        return [_retry(synthesizer, task, retries, error) for task in tasks]


def _retry(synthesizer, task: Task, retries: int, error: Exception) -> Any:
    for attempt in range(1, retries + 1):
        try:
            (result,) = synthesizer.run([task])
        except Exception as again:  # recorded in the row, counted, and fatal above max_failed_share
            error = again
            continue
        return result if isinstance(result, Dropped) else replace(result, info={**result.info, "retries": attempt})
    return _failed(task, error)


def _failed(task: Task, error: Exception) -> Dropped:
    return Dropped(task.conversation_id, task.seed_family, error_reason(error), task.chunk_id)


def failed_among(results: Sequence[Any]) -> list[str]:
    """The reasons of those that raised."""
    return [one.reason for one in results if isinstance(one, Dropped) and one.reason.startswith(ERROR)]


class TooManyFailed(Exception):
    """So many raised that the run cannot end well."""


class Tolerance:
    """Counts what raises in a whole run; `failed` of them did in its earlier goes."""

    def __init__(self, allowed: float, planned: int, failed: int = 0):
        self.most, self.failed, self.reason = max(allowed * planned, FEWEST_FAILED), failed, ""

    def add(self, failed: int, reason: str) -> None:
        """Raises `TooManyFailed` once there are more than a finished run may have, and a few at least."""
        self.failed, self.reason = self.failed + failed, self.reason or reason
        if self.exceeded():
            raise TooManyFailed(f"{self.failed}; {self.reason}")

    def exceeded(self) -> tuple[int, str] | None:
        """How many there are and why the first one failed, where they are too many. The driver asks: what an actor
        raises reaches it without its cause."""
        return (self.failed, self.reason) if self.failed > self.most else None


def count_failed(work: Path) -> int:
    """Committed rows in `work` that raised. Batches that are pending will be done again, so they do not count."""
    import pyarrow.parquet as pq

    pending = tuple(file.name.removesuffix(".pending.parquet")
                    for file in (work / "checkpoint").glob("*.pending.parquet"))
    return sum(reason.startswith(ERROR)
               for file in (work / "parts").glob("*.parquet") if not file.stem.startswith(pending)
               for reason in pq.read_table(file, columns=["dropped"])["dropped"].to_pylist())


def require_few(failed: int, planned: int, allowed: float, work: Path) -> None:
    """Raise where more than the share `allowed` failed: `UserError` where the asking side was refused, else
    `RuntimeError`.

    Their batches in `work` are taken back first, so that the next run does them again.
    """
    if failed <= allowed * planned:
        return
    raise _too_many(failed, planned, allowed, forget_failed(work))


def too_many(failed: int, reason: str, planned: int, allowed: float, work: Path) -> Exception:
    """What to raise where a run was stopped before its end."""
    return _too_many(failed, planned, allowed, forget_failed(work) or reason)


def _too_many(failed: int, planned: int, allowed: float, reason: str) -> Exception:
    if reason.startswith(REFUSED):
        return UserError(f"{reason.removeprefix(REFUSED)} ({failed} of {planned} conversations failed; the same "
                         "command goes on)")
    return RuntimeError(f"{failed} of {planned} conversations failed, more than synthesize.max_failed_share "
                        f"({allowed}) allows; the first: {reason}")


def forget_failed(work: Path) -> str:
    """Mark every committed batch that holds a failed row as pending; the first row's reason.

    Ray Data deletes what is pending when it starts, the batch's file with it, and does it again.
    """
    import pyarrow.parquet as pq

    first = ""
    for file in sorted((work / "parts").glob("*.parquet")):
        failed = [reason for reason in pq.read_table(file, columns=["dropped"])["dropped"].to_pylist()
                  if reason.startswith(ERROR)]
        if failed:
            first = first or failed[0]
            for committed in (work / "checkpoint").glob("*.parquet"):
                if file.stem.startswith(committed.stem):
                    committed.rename(committed.with_suffix(".pending.parquet"))
    return first
