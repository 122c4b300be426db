"""`cartridges bench train`: our trainer, with all layers and with the upper ones, against PEFT's and a plain
padded loop, in one run.

Each side has a process, a copy of the model and the same round of work. Rounds are interleaved, the order
turning, so that other work on the machine falls on all of them; ratios are medians over rounds.
"""

import statistics
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.models import load_config, resolve_model_dir
from workflows.bench.child_process import ChildProcess
from workflows.runtime.progress import Progress

SIDES = ("ours", "upper", "peft", "padded")


def bench_train(settings: BuildSettings, rounds: int, steps: int, conversations: int,
                data: str | None = None) -> dict[str, Any]:
    """Run `rounds` counted rounds of `steps` steps on each side, after one that only warms up.

    The conversations are `data` (an output directory of `cartridges synthesize`), or `conversations`
    planned by rule on the sample corpus. Raises `UserError` without PEFT.
    """
    if find_spec("peft") is None:
        raise UserError("PEFT, the peer, is not installed; run: .venv/bin/pip install -e '.[bench]'")
    # The schedule's steps are the round's; a data set or settings of few steps would cut our round short.
    settings = settings.model_copy(update={"train": settings.train.model_copy(
        update={"steps": steps, "distractors": ()})})
    load_config(resolve_model_dir(settings.model))  # a mistaken model is named here, not by four processes
    with ExitStack() as stack:
        if data is None:
            data = stack.enter_context(tempfile.TemporaryDirectory(prefix="cartridges-bench-"))
            _make(settings, conversations, Path(data))
        children = {name: stack.enter_context(_child(name, _shards(data), settings, steps)) for name in SIDES}
        described = {name: child.answer() for name, child in children.items()}
        progress = stack.enter_context(Progress((rounds + 1) * len(SIDES), "bench train", "rounds"))
        rows, memory = _measure(children, described, rounds, progress)
    return summarize(described["ours"], rows, memory, settings)


def _make(settings: BuildSettings, count: int, directory: Path) -> None:
    from cartridges.models import load_base_model
    from workflows.bench.conversations import write_conversations

    with Progress(count, "bench train", "conversations planned") as progress:
        write_conversations(load_base_model(settings.model), settings, count, directory)
        progress.set(count)


def _shards(data: str) -> Path:
    """The finished shards of a data set, or the directory as it is."""
    directory = Path(data)
    if not directory.is_dir():
        raise UserError(f"--data {data} is not a directory; give the output of `cartridges synthesize`")
    shards = directory / "shards" if (directory / "shards").is_dir() else directory
    if not any(shards.rglob("*.parquet")):
        raise UserError(f"--data {data} holds no conversations; give the output of `cartridges synthesize`")
    return shards


def _child(side: str, data: Path, settings: BuildSettings, steps: int) -> ChildProcess:
    return ChildProcess("workflows.bench.side_process", {
        "side": side, "conversations": str(data), "settings": settings.model_dump(mode="json"), "steps": steps})


def _measure(children: dict[str, ChildProcess], described, rounds: int, progress: Progress):
    """Rows of counted rounds, and each side's memory: before its first step, and at most. A side for which a GPU's
    memory does not suffice takes no further part and has neither."""
    rows, tokens, sides = [], described["ours"]["work"]["tokens"], list(SIDES)
    before = {name: described[name]["memory"] or child.resident_bytes() for name, child in children.items()}
    peaks = dict(before)
    for child in children.values():
        child.forget_peak()
    for number in range(rounds + 1):
        turn = number % len(SIDES)
        for name in [name for name in SIDES[turn:] + SIDES[:turn] if name in sides]:
            result = children[name].ask("round")
            if result["seconds"] is None:
                if name == "ours":
                    raise UserError("ours ran out of the GPU's memory; lower --pack-tokens or --num-tokens, or set "
                                    "train.gradient_checkpointing=true")
                sides.remove(name)
                progress.update(note=f"{name}: out of memory")
                continue
            peaks[name] = max(peaks[name], result["memory"] or children[name].peak_bytes)
            row = {"round": number, "side": name, "seconds": result["seconds"],
                   "tokens_per_s": tokens / result["seconds"]}
            if name == "ours":
                row["matmul_seconds"] = children[name].ask("bare")["seconds"]
                children[name].forget_peak()  # the bare products' operands are not the trainer's
            rows += [row] if number else []
            progress.update(note=f"{name} {row['tokens_per_s']:.0f} tokens/s")
    return [row for row in rows if row["side"] in sides], {name: {
        "before_bytes": before[name], "peak_bytes": peaks[name],
        "growth_bytes": peaks[name] - before[name]} if name in sides else None for name in children}


def summarize(ours: dict[str, Any], rows: list[dict[str, Any]], memory: dict[str, Any],
              settings: BuildSettings) -> dict[str, Any]:
    """The result: ratios as medians over rounds, and everything they come from. What a side that ran out of memory
    would have a part in is None."""
    work = ours["work"]
    seconds = {name: [row["seconds"] for row in rows if row["side"] == name] for name in SIDES}
    bare = [row["matmul_seconds"] for row in rows if row["side"] == "ours"]
    rates = [work["flops_computed"] / taken for taken in bare]
    shares = [work["flops_needed"] / taken / rate for taken, rate in zip(seconds["ours"], rates, strict=True)]
    wanted = settings.train
    return {
        "speedup_vs_peft": _ratio(seconds["peft"], seconds["ours"]),
        "speedup_vs_padded": _ratio(seconds["padded"], seconds["ours"]),
        "speedup_of_upper_vs_peft": _ratio(seconds["peft"], seconds["upper"]),
        "matmul_share": statistics.median(shares),
        "matmul_share_with_padding": _ratio(bare, seconds["ours"]),
        "matmul_flops_per_s": statistics.median(rates),
        "tokens_per_s": {name: work["tokens"] / statistics.median(taken) if taken else None
                         for name, taken in seconds.items()},
        "memory": memory,
        "num_tokens": wanted.num_tokens, "pack_tokens": wanted.pack_tokens, "row_tokens": wanted.row_tokens,
        "work": work, "runs": len(seconds["ours"]), "rows": rows, "machine": ours["machine"],
        "versions": {name: version(name) for name in ("peft", "transformers", "torch")},
        "notes": ["tokens are those of the conversations, the shared example turns counted in each of them",
                  "every side trains on the same conversations in as many optimiser steps",
                  "upper trains fewer layers and reads the states below them, as in every epoch but the first",
                  "one round on each side was not counted: it builds kernels for the shapes",
                  *(f"{name} ran out of the GPU's memory" for name in SIDES if not seconds[name])]}


def _ratio(over: list[float], under: list[float]) -> float | None:
    return statistics.median(a / b for a, b in zip(over, under, strict=True)) if over and under else None
