"""`metrics.jsonl`: a row a step from the first worker to the driver, its progress line and W&B."""

import json
import threading
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from cartridges.files import write_atomically
from workflows.runtime.manifests import Clock
from workflows.runtime.progress import ProgressCallback

STEPS = "metrics.jsonl"
POLL_SECONDS = 0.5


class StepLog:
    """One JSON row a step. On resuming, rows past the checkpoint are dropped: each step is there once. One that does
    not `keeps` leaves the file as it is."""

    def __init__(self, path: Path, next_step: int, keeps: bool = True):
        self.path, self.keeps = path, keeps
        if keeps:
            _rewrite(path, [row for row in read_rows(path) if row["step"] < next_step])

    def write(self, metrics, more: dict[str, Any]) -> dict[str, Any]:
        """`more` fields of the row: the machine's (`meter`), and `held_out`, the figures of the held-out questions
        after this step, where they were asked."""
        row = {name: value for name, value in asdict(metrics).items() if name != "member"} | more
        if self.keeps:
            _append(self.path, row)
        return row


class CohortLog:
    """One row a step for all members together: means of what is a mean, sums of tokens and seconds.

    Steps are counted from the beginning of the run, wave after wave, and those that a killed run did in vain too.
    """

    def __init__(self, path: Path):
        rows = read_rows(path)
        _rewrite(path, rows)
        self.path, self.done = path, len(rows)
        self._rows: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any], steps: int) -> None:
        """A member's row. `steps` are those of the longest member of the wave."""
        if self._rows and row["step"] != self._rows[0]["step"]:
            self.flush(steps)
        self._rows.append(row)

    def flush(self, steps: int) -> None:
        """Write the step whose rows have come so far."""
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        joined = {name: mean(row[name] for row in rows) for name in MEANS if name in rows[0]}
        joined |= {name: sum(row[name] for row in rows) for name in ("tokens", "loss_tokens", "seconds")}
        held_out = [row["held_out"] for row in rows if "held_out" in row]
        if held_out:
            joined["held_out"] = {name: mean(one[name] for one in held_out) for name in held_out[0]}
        left = steps - rows[0]["step"]
        _append(self.path, joined | {"step": self.done, "steps": self.done + left, "members": len(rows)})
        self.done += 1


MEANS = ("loss", "kl", "teacher_entropy", "topk_mass", "lr", "grad_norm", "matmul_share", "memory_bytes")


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Without the half of a line that a kill may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows so far. The last line may be half-written by a worker that was killed."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


class StepLogFollower:
    """Follows `metrics.jsonl` while the workers write it: progress (of `steps`; 0 where not known), and W&B."""

    def __init__(self, path: Path, run, progress: ProgressCallback, clock: Clock, steps: int):
        self.path, self.run, self.progress, self.clock, self.steps = path, run, progress, clock, steps
        self.logged, self.before, self.told = 0, len(read_rows(path)), 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        rows = read_rows(self.path)
        for row in rows[self.logged:]:
            self.run.log(_figures(row), step=row["step"])
        # Steps of an earlier run are not progress of this one: the rate would include loading the model.
        self.before = min(self.before, len(rows))
        if len(rows) == self.before:
            self.progress(0, self.steps, "loading the model, to go on from the last checkpoint" if rows else
                          "loading the model and fitting the start")
        elif len(rows) != self.told:
            last = rows[-1]
            accuracy = next((f", held-out accuracy {row['held_out']['contains']:.2f}" for row in reversed(rows)
                             if "held_out" in row), "")
            self.progress(last["step"] + 1, last["steps"], f"loss {last['loss']:.3f}, KL {last['kl']:.3f}{accuracy}")
        self.told = len(rows)
        # A resumed run's log is cut back to its checkpoint; steps seen before are not logged again.
        self.logged = max(self.logged, len(rows))
        self.clock.save()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self._read()


def _figures(row: dict[str, Any]) -> dict[str, float]:
    same = ("loss", "kl", "teacher_entropy", "topk_mass", "lr", "grad_norm", "loss_tokens", "matmul_share",
            "memory_bytes")
    held_out = {f"train/held_out_{name}": value for name, value in row.get("held_out", {}).items()}
    return {**{f"train/{name}": row[name] for name in same if name in row}, **held_out,
            "train/step_seconds": row["seconds"], "train/tokens_per_s": row["tokens"] / row["seconds"],
            "train/eta_seconds": row["seconds"] * (row["steps"] - row["step"] - 1)}
