"""Rates of this machine, measured by a short calibration and remembered from finished stages."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from cartridges.config import BuildSettings
from cartridges.download import home
from cartridges.errors import UserError
from cartridges.files import write_atomically
from cartridges.records import Chunk, Conversation, Corpus, Task
from workflows.building.budget import Rates
from workflows.runtime.manifests import fingerprint

BATCHES = 3
"""Batches of conversations, and training steps, in a calibration; the first of each only warms up."""
PLANNED_BATCHES = 12
"""Batches that a calibration plans, so that as many conversations share a chunk as in a build. It runs some of them."""
MOST_CHUNKS = 4096
"""Number of the corpus' first chunks that those conversations are about."""
WORKER_SLOWDOWN = 1.3
"""Ratio of a training step's time in Ray's worker, beside Ray's other processes, to its time here: measured
on two cores (docs/log.md). Where a build has finished, its own rate stands instead."""

AGREES = 1.5
"""Rates that differ by less are of the same machine in the same state; a calibration is no more exact."""


def remembered(settings: BuildSettings) -> Rates | None:
    """The rates of the last finished build with the like of these settings, on this machine."""
    file = _file(settings)
    return Rates(**json.loads(file.read_text())) if file.is_file() else None


def remember(settings: BuildSettings, dataset: dict[str, Any], trained: dict[str, Any]) -> None:
    """Keep what a build's manifests say, where they say it: a tiny or untrained build has no rates."""
    kept = dataset["conversations"]["kept"]
    if not (kept and dataset["conversations_per_s"] and {"step_seconds", "mean_tokens"} <= trained.keys()):
        return
    rates = Rates(1 / dataset["conversations_per_s"], trained["step_seconds"] / settings.train.packs_per_step,
                  kept / dataset["planned"], trained["mean_tokens"])
    keep(settings, rates)


def keep(settings: BuildSettings, rates: Rates) -> None:
    """Remember `rates` for the next build."""
    file = _file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(asdict(rates)) + "\n")


def measured(corpus: Corpus, settings: BuildSettings) -> Rates:
    """Rates to plan a budget by, calibrated on this corpus and kept for the next build: once a process, so that the
    corpora of a collection share them. Raises as `calibrate`.

    A finished build timed whole stages, so its seconds stand where the calibration agrees with them. Where it does
    not, the machine was busy then, or is now.
    """
    file = _file(settings)
    if file not in _MEASURED:
        start = time.monotonic()
        before, now = remembered(settings), calibrate(corpus, settings)
        _SECONDS[file] = time.monotonic() - start
        _MEASURED[file] = now if before is None else replace(
            now, conversation_seconds=_trusted(before.conversation_seconds, now.conversation_seconds),
            pack_seconds=_trusted(before.pack_seconds, now.pack_seconds))
        keep(settings, _MEASURED[file])
    return _MEASURED[file]


def calibration_seconds(settings: BuildSettings) -> float:
    """Seconds that the calibration took in this process; 0 where there was none."""
    return _SECONDS.get(_file(settings), 0.0)


_MEASURED: dict[Path, Rates] = {}
_SECONDS: dict[Path, float] = {}


def _trusted(before: float, now: float) -> float:
    return before if now / AGREES <= before <= now * AGREES else now


def calibrate(corpus: Corpus, settings: BuildSettings, training: bool = True) -> Rates:
    """Measure the rates on a few batches of the corpus' conversations and, for `training`, a few steps on them. One
    engine is measured, and counted as often as synthesis will have it.

    Raises `UserError` when the filters keep none of those conversations.
    """
    import torch

    from cartridges.chunking import Chunks
    from cartridges.distill.packing import own_lengths
    from cartridges.models import load_base_model, load_tokenizer, resolve_model_dir
    from workflows.synthesis.open_synthesizer import check_generation, runs_on_vllm
    from workflows.synthesis.ray_pipeline import engines_at_once

    check_generation(settings)
    engines = engines_at_once(settings)
    # vLLM asks for most of a GPU at its start: the model comes after it, and is gone before Ray's workers come.
    base = None if runs_on_vllm(settings) else load_base_model(settings.model)
    tokenizer = base.tokenizer if base else load_tokenizer(resolve_model_dir(settings.model))
    chunks = list(islice(Chunks(corpus, tokenizer, settings.synthesize.chunk), MOST_CHUNKS))
    conversations, conversation_seconds, kept = _time_synthesis(base, chunks, settings)
    if not conversations:
        raise UserError("no conversation of the calibration passed the filters, so a budget cannot be planned; give "
                        "--set synthesize.num_conversations=N instead, and see synthesize.filters_off")
    tokens = mean(own_lengths(conversations))
    pack_seconds = 0.0
    if training:
        base = base or load_base_model(settings.model)
        pack_seconds = WORKER_SLOWDOWN * _time_steps(base, corpus, conversations, settings)
    del base
    torch.cuda.empty_cache()  # nothing without a GPU
    return Rates(conversation_seconds / engines, pack_seconds, kept, tokens)


def _time_synthesis(base, chunks: Sequence[Chunk],
                    settings: BuildSettings) -> tuple[list[Conversation], float, float]:
    """`(kept conversations, seconds for a planned one, share kept)`."""
    from cartridges.selfstudy.families import decodes
    from cartridges.selfstudy.plan import plan
    from workflows.synthesis.open_synthesizer import open_synthesizer

    size = settings.synthesize.batch_size
    wanted = settings.synthesize.model_copy(update={"num_conversations": PLANNED_BATCHES * size})
    tasks = plan(chunks, wanted, settings.seed)
    kept: list[Conversation] = []
    seconds = share = 0.0
    with open_synthesizer(settings, {chunk.chunk_id: chunk for chunk in chunks}, base) as synthesizer:
        # Written ones cost many times scored ones, and the fewer are in a batch the more each: so either kind is timed
        # in batches of one size, and counts by its share of the plan.
        for written in (False, True):
            group = [task for task in tasks if decodes(task.seed_family) == written]
            if not group:
                continue
            batches = _spread(group, size // 4 if written else size // 2)
            found, taken = _timed(synthesizer, batches)
            kept += found
            of_all, tried = len(group) / len(tasks), sum(map(len, batches))
            seconds += of_all * taken
            share += of_all * len(found) / tried
    return kept, seconds, share


def _spread(tasks: Sequence[Task], size: int) -> list[Sequence[Task]]:
    """At most `BATCHES` full batches of neighbours, from all over `tasks`; one where there are fewer than that."""
    size = max(1, size)
    starts = range(0, max(1, len(tasks) - size + 1), size)
    chosen = [starts[index * (len(starts) - 1) // (BATCHES - 1)] for index in range(BATCHES)]
    return [tasks[start:start + size] for start in dict.fromkeys(chosen)]


def _timed(synthesizer, batches: Sequence[Sequence[Task]]) -> tuple[list[Conversation], float]:
    """`(kept conversations, seconds for a task)`; the first batch warms up, where there are others."""
    results, timed = [], batches[1:] or batches
    for batch in batches[:-len(timed)]:
        results += synthesizer.run(batch)
    start = time.monotonic()
    for batch in timed:
        results += synthesizer.run(batch)
    seconds = (time.monotonic() - start) / sum(map(len, timed))
    return [result for result in results if isinstance(result, Conversation)], seconds


def _time_steps(base, corpus: Corpus, conversations: Sequence[Conversation],
                settings: BuildSettings) -> float:
    """Seconds for a pack of a training step, of the first epoch and of later ones, whose states are known."""
    from cartridges.distill.course import Course
    from cartridges.distill.initialize import MOST_CHARACTERS, initialize
    from cartridges.distill.student import Student
    from cartridges.distill.trainer import TorchStepper, Trainer

    # Any start will do, so one that takes no time; what packs with distractors cost more is not known.
    start = "prefix" if settings.train.init == "attention_matching" else settings.train.init
    wanted = settings.train.model_copy(update={"steps": BATCHES, "init": start, "distractors": ()})
    student = Student(base.model, initialize(base, corpus.spread(MOST_CHARACTERS), wanted, settings.seed), wanted.loss)
    trainer = Trainer(TorchStepper([student], wanted), [Course(conversations, wanted, settings.seed)], base.device)
    passes: list[float] = []
    for _ in range(2):
        seconds: list[float] = []
        trainer.next_step = 0
        trainer.run(lambda metrics, seconds=seconds: seconds.append(metrics.seconds))
        passes.append(sum(seconds[1:]) / (len(seconds) - 1) / wanted.packs_per_step)
    first_epoch = 1 / max(1.0, settings.train.epochs)
    return first_epoch * passes[0] + (1 - first_epoch) * passes[1]


def _file(settings: BuildSettings) -> Path:
    shape = ("num_tokens", "trained_layers", "row_tokens", "pack_tokens", "loss", "init", "num_workers",
             "zero_stage")
    synthesis = settings.synthesize.model_dump(mode="json", exclude={"num_conversations"})
    key = fingerprint([settings.model.model_dump(mode="json"), synthesis, os.uname().nodename, os.cpu_count(),
                       [getattr(settings.train, name) for name in shape], settings.train.optimizer.name])
    return home() / "rates" / f"{key}.json"
