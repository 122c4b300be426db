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


def require_few(failed: int, planned: int, allowed: float, work: Path) -> None:
    """Raise where more than the share `allowed` failed: `UserError` where the asking side was refused, else
    `RuntimeError`.

    Their batches in `work` are taken back first, so that the next run does them again.
    """
    if failed <= allowed * planned:
        return
    reason = forget_failed(work)
    if reason.startswith(REFUSED):
        raise UserError(f"{reason.removeprefix(REFUSED)} ({failed} of {planned} conversations failed; the same command "
                        "goes on)")
    raise RuntimeError(f"{failed} of {planned} conversations failed, more than synthesize.max_failed_share "
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
