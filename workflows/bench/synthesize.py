"""`cartridges bench synthesize`: self-study on Ray Data against a plain loop over the same engine, in one run.

The loop is one task that goes through the same batches of the same tasks and keeps the conversations in memory:
what planning, blocks, commits and Parquet cost is the difference. Each engine is also a side of its own.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from cartridges.config import BuildSettings
from cartridges.records import Chunk, Conversation
from workflows.runtime.progress import Progress

LOOP = "loop"
NOTES = (
    "a rate counts from the first finished batch (of each actor) to the last: starting Ray, actors and models is left "
    "out; a pipeline's commits are seen once a second",
    "prefixes found: for transformers with the example turns that requests share, for vLLM without",
    "ratios are medians over rounds of the pipeline over the loop, which has all CPUs; actors share them",
    "kept is of the planned conversations; the engines draw differently, so between engines it differs a little",
)


def bench_synthesize(settings: BuildSettings, corpus: str | None, engines: Sequence[str], actors: Sequence[int],
                     rounds: int) -> dict[str, Any]:
    """Conversations a second of every engine's loop and pipelines, interleaved; ratios over the loop of that engine.

    Raises `UserError` for an engine that is not installed, or a corpus that cannot be read.
    """
    from cartridges.evaluation.report_card import machine
    from cartridges.models import load_base_model
    from workflows.bench.conversations import SAMPLE
    from workflows.runtime.local_ray import local_ray
    from workflows.synthesis.open_synthesizer import check_generation

    sides = [(engine, count) for engine in engines for count in (0, *actors)]
    chosen = {side: _settings(settings, *side) for side in sides}
    for wanted in chosen.values():
        check_generation(wanted)
    rows = []
    with local_ray(), Progress(rounds * len(sides), "bench synthesize", "measurements") as progress:
        for number in range(rounds):
            for side in sides if number % 2 else sides[::-1]:
                measured = _measure(corpus or str(SAMPLE), chosen[side], pipeline=side[1] > 0)
                if not measured["conversations_per_s"]:
                    raise RuntimeError(f"{_name(side[1])}: too quick to be measured; give more --conversations")
                rows.append({"round": number, "engine": side[0], "actors": side[1], **measured})
                progress.update(note=_name(side[1]))
    return summarize(rows) | {"rounds": rounds, "runs": rounds, "batch_size": settings.synthesize.batch_size,
                              "conversations": settings.synthesize.num_conversations,
                              "machine": machine(load_base_model(settings.model))}


def _settings(settings: BuildSettings, engine: str, actors: int) -> BuildSettings:
    synthesis = settings.synthesize.model_copy(update={"engine": engine, "num_actors": max(1, actors)})
    return settings.model_copy(update={"synthesize": synthesis})


def _name(actors: int) -> str:
    return f"{actors} actors" if actors > 1 else "1 actor" if actors else LOOP


def _measure(corpus: str, settings: BuildSettings, pipeline: bool) -> dict[str, Any]:
    start = time.monotonic()
    measured = _pipeline(corpus, settings) if pipeline else _loop(corpus, settings)
    return measured | {"seconds": time.monotonic() - start}


def _pipeline(corpus: str, settings: BuildSettings) -> dict[str, Any]:
    from cartridges.corpus import load_corpus
    from workflows.synthesis.synthesize import synthesize

    with tempfile.TemporaryDirectory() as directory:
        manifest = synthesize(load_corpus(corpus, settings.corpus.corpus_id), directory, settings,
                              progress=lambda done, total, note: None)
    return {"conversations_per_s": manifest["conversations_per_s"], "kept": manifest["conversations"]["kept"],
            "prefix_hit_share": None}


def _loop(corpus: str, settings: BuildSettings) -> dict[str, Any]:
    """As a Ray task, so that it has what the pipeline's actors have: a process of its own, at Ray's priority."""
    import ray

    from cartridges.engines.vllm_setup import gpus_of_an_engine

    loaded = _loaded(corpus, settings)
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    looping = ray.remote(num_cpus=1, num_gpus=gpus_of_an_engine(
        settings.vllm, settings.synthesize.engine) if has_gpu else 0)(_run_loop)
    return ray.get(looping.remote(loaded, settings))


def _loaded(corpus: str, settings: BuildSettings) -> list[Chunk]:
    from cartridges.chunking import chunk_corpus
    from cartridges.corpus import load_corpus
    from cartridges.models import load_tokenizer, resolve_model_dir

    tokenizer = load_tokenizer(resolve_model_dir(settings.model))
    return chunk_corpus(load_corpus(corpus, settings.corpus.corpus_id), tokenizer, settings.synthesize.chunk)


def _run_loop(chunks: list[Chunk], settings: BuildSettings) -> dict[str, Any]:
    import os

    import torch

    from cartridges.selfstudy.plan import plan
    from workflows.synthesis.open_synthesizer import open_synthesizer

    torch.set_num_threads(os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count() or 1)
    tasks = plan(chunks, settings.synthesize, settings.seed)
    finished, kept = [], 0
    with open_synthesizer(settings, {chunk.chunk_id: chunk for chunk in chunks}) as synthesizer:
        for first in range(0, len(tasks), settings.synthesize.batch_size):
            batch = tasks[first:first + settings.synthesize.batch_size]
            kept += sum(isinstance(result, Conversation) for result in synthesizer.run(batch))
            finished.append((time.monotonic(), len(batch)))
        share = synthesizer.engine.prefix_hit_share()
    seconds = finished[-1][0] - finished[0][0]
    return {"conversations_per_s": sum(count for _, count in finished[1:]) / seconds, "kept": kept,
            "prefix_hit_share": share}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each side the median rate, the ratios over the loop of its engine round by round, and the rows."""
    rates: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for engine in dict.fromkeys(row["engine"] for row in rows):
        of = [row for row in rows if row["engine"] == engine]
        loops = {row["round"]: row["conversations_per_s"] for row in of if not row["actors"]}
        rates[engine], ratios[engine] = {}, {}
        for actors in sorted({row["actors"] for row in of}):
            mine = [row for row in of if row["actors"] == actors]
            rates[engine][_name(actors)] = statistics.median(row["conversations_per_s"] for row in mine)
            ratios[engine][_name(actors)] = statistics.median(
                row["conversations_per_s"] / loops[row["round"]] for row in mine)
    shares = {row["engine"]: row["prefix_hit_share"] for row in rows if not row["actors"]}
    return {"conversations_per_s": rates, "ratios": ratios, "prefix_hit_share": shares, "rows": list(rows),
            "notes": list(NOTES)}
