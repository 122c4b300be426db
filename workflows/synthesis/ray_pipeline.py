"""Ray Data over the planned conversations: actors with engines, and the progress of what they have committed."""

import contextlib
import logging
import os
import threading
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.records import Chunk, Task
from workflows.runtime.manifests import Clock
from workflows.runtime.progress import ProgressCallback
from workflows.synthesis.placement import Placement, place, threads_here

POLL_SECONDS = 1.0


def generate(output: Path, settings: BuildSettings, total: int,
             progress: ProgressCallback | None) -> dict[str, float]:
    """Run Ray Data until every task is committed; how fast it went."""
    from workflows.runtime.local_ray import local_ray
    from workflows.runtime.progress import Progress

    clock = Clock(output / "work" / "clock.json")
    with ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(Progress(total, "synthesize", "conversations")).callback
        stack.enter_context(local_ray())
        placed = placement_here(settings)
        reporting = stack.enter_context(CommittedProgress(output / "work" / "checkpoint", total, progress, clock))
        _run_pipeline(output.resolve(), settings, placed, total)
    first = placed.num_actors * settings.synthesize.batch_size
    return {"seconds": clock.seconds, "conversations_per_s": reporting.rate(first)}


def placement_here(settings: BuildSettings) -> Placement:
    """Where actors go on the nodes that Ray has now."""
    import ray

    return _placement(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])


def engines_at_once(settings: BuildSettings) -> int:
    """How many times one engine's speed synthesis will have, by the nodes of the Ray that it will join, or by this
    machine where it will start its own."""
    import ray
    from torch.cuda import device_count

    from workflows.runtime.local_ray import local_ray

    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")):
        return _placement(settings, [{"CPU": os.cpu_count() or 1, "GPU": device_count()}]).engines
    with local_ray():
        placed = placement_here(settings)
        free = ray.available_resources().get("GPU", 0)  # without the driver's own, and what others hold
    return max(1, min(placed.engines, int(free // placed.num_gpus))) if placed.num_gpus else placed.engines


def _placement(settings: BuildSettings, nodes: list[dict[str, float]]) -> Placement:
    from cartridges.engines.vllm_setup import gpus_of_an_engine

    if len(nodes) == 1:  # A Ray started here offers at least four CPUs. All cores may compute, if one CPU is left over.
        nodes = [{**nodes[0], "CPU": min(nodes[0].get("CPU", 0), (os.cpu_count() or 1) + 1)}]
    return place(settings.synthesize, nodes, gpus_of_an_engine(settings.vllm, settings.synthesize.engine))


def _run_pipeline(output: Path, settings: BuildSettings, placed: Placement, total: int) -> None:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig
    from ray.exceptions import RayActorError

    from workflows.synthesis.failures import Tolerance, count_failed, too_many

    # It prints pages of what it then raises.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    work, wanted = output / "work", settings.synthesize
    tolerance = ray.remote(num_cpus=0)(Tolerance).remote(wanted.max_failed_share, total, count_failed(work))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="conversation_id", checkpoint_path=str(work / "checkpoint"),
        delete_checkpoint_on_success=False)
    try:
        # Read from a file because Ray Data filters committed rows behind a read only; a block for
        # each batch because a block is the unit that is committed.
        tasks = ray.data.read_parquet(str(work / "tasks.parquet"))
        tasks.repartition(target_num_rows_per_block=wanted.batch_size).map_batches(
            SynthesisActor, fn_constructor_args=(settings, str(output / "chunks.parquet"), placed.beside, tolerance),
            batch_size=wanted.batch_size, batch_format="pyarrow",  # a block; with GPUs Ray Data wants it said
            compute=ActorPoolStrategy(min_size=placed.num_actors, max_size=placed.most),
            num_cpus=placed.num_cpus, num_gpus=placed.num_gpus,
        ).write_parquet(str(work / "parts"))
    except Exception:
        try:
            hopeless = ray.get(tolerance.exceeded.remote())
        except RayActorError:  # lost with its node, maybe; what ended the pipeline is what to tell
            hopeless = None
        if hopeless is None:
            raise
        raise too_many(*hopeless, total, wanted.max_failed_share, work) from None
    finally:
        context.checkpoint_config = None


class SynthesisActor:
    """Holds one engine and a `Synthesizer`; a batch of tasks in, their conversations out.

    `beside` actors share its node. `tolerance` is the one actor that counts what raised in all of them.
    """

    def __init__(self, settings: BuildSettings, chunks_file: str, beside: int, tolerance: Any):
        self.settings, self.chunks_file, self.tolerance = settings, chunks_file, tolerance
        self.threads = threads_here(settings.synthesize.threads_per_actor, beside)
        # Ray gives an actor one; what the engine starts reads the variable.
        os.environ["OMP_NUM_THREADS"] = str(self.threads)

    @cached_property
    def synthesizer(self):
        """Opened by the first batch: Ray Data calls from another thread than the one that constructs, which vLLM's
        engine does not stand (docs/log.md)."""
        import pyarrow.parquet as pq
        import torch

        from workflows.synthesis.open_synthesizer import open_synthesizer

        torch.set_num_threads(self.threads)
        chunks = {row["chunk_id"]: Chunk(**row) for row in pq.read_table(self.chunks_file).to_pylist()}
        # Held, because what is let go of is closed.
        self._held = open_synthesizer(self.settings, chunks)
        return self._held.__enter__()

    def __call__(self, batch):
        import pyarrow as pa
        import ray

        from cartridges.selfstudy.storage import schema, to_row
        from workflows.synthesis.failures import failed_among, run_with_retry

        tasks = [Task(**row) for row in batch.to_pylist()]
        results = run_with_retry(self.synthesizer, tasks, self.settings.synthesize.retries)
        if failed := failed_among(results):
            ray.get(self.tolerance.add.remote(len(failed), failed[0]))
        return pa.Table.from_pylist([to_row(result) for result in results], schema=schema())


class CommittedProgress:
    """Calls `progress` every second with the rows committed so far, until the block ends."""

    def __init__(self, checkpoint: Path, total: int, progress: ProgressCallback, clock: Clock):
        self.checkpoint, self.total, self.progress, self.clock = checkpoint, total, progress, clock
        self.rows: dict[Path, int] = {}
        self.seen: list[tuple[float, int]] = []
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            self._report()

    def _report(self) -> None:
        """A full disk is for the pipeline to report, which cannot go on; this can."""
        with contextlib.suppress(OSError):
            done = self.committed()
            if not self.seen or done > self.seen[-1][1]:
                self.seen.append((time.monotonic(), done))
            self.progress(done, self.total, "")
            self.clock.save()

    def rate(self, first: int) -> float:
        """Conversations a second from when `first` were committed (a batch of each actor: no start-up) to the last;
        0 where no time was seen to pass between them."""
        committed = [seen for seen in self.seen if seen[1] >= min(first, self.total)] or [(0.0, 0)]
        (first, before), (last, after) = committed[0], committed[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def committed(self) -> int:
        import pyarrow.parquet as pq

        for file in self.checkpoint.glob("*.parquet"):
            if file not in self.rows and not file.name.endswith(".pending.parquet"):
                self.rows[file] = pq.read_metadata(file).num_rows
        return sum(self.rows.values())

    def __enter__(self) -> "CommittedProgress":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self._report()
