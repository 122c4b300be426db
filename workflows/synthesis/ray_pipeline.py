"""Ray Data over the planned conversations: actors with engines, and the progress of what they have committed."""

import logging
import os
import threading
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from cartridges.config import BuildSettings
from cartridges.records import Chunk, Task
from workflows.runtime.manifests import Clock
from workflows.runtime.progress import ProgressCallback

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
        reporting = stack.enter_context(CommittedProgress(output / "work" / "checkpoint", total, progress, clock))
        _run_pipeline(output.resolve(), settings)
    wanted = settings.synthesize
    return {"seconds": clock.seconds, "conversations_per_s": reporting.rate(wanted.num_actors * wanted.batch_size)}


def _run_pipeline(output: Path, settings: BuildSettings) -> None:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    from cartridges.engines.vllm_setup import gpus_of_an_engine

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    work, wanted = output / "work", settings.synthesize
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="conversation_id", checkpoint_path=str(work / "checkpoint"),
        delete_checkpoint_on_success=False)
    try:
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        threads = wanted.threads_per_actor or max(1, (os.cpu_count() or 1) // wanted.num_actors)
        # Read from a file because Ray Data filters committed rows behind a read only; a block for
        # each batch because a block is the unit that is committed.
        tasks = ray.data.read_parquet(str(work / "tasks.parquet"))
        tasks.repartition(target_num_rows_per_block=wanted.batch_size).map_batches(
            SynthesisActor, fn_constructor_args=(settings, str(output / "chunks.parquet"), threads),
            batch_size=None, batch_format="pyarrow", compute=ActorPoolStrategy(size=wanted.num_actors),
            num_cpus=1, num_gpus=gpus_of_an_engine(settings.vllm, wanted.engine) if has_gpu else None,
        ).write_parquet(str(work / "parts"))
    finally:
        context.checkpoint_config = None


class SynthesisActor:
    """Holds one engine and a `Synthesizer`; a batch of tasks in, their conversations out."""

    def __init__(self, settings: BuildSettings, chunks_file: str, threads: int):
        self.settings, self.chunks_file, self.threads = settings, chunks_file, threads
        # Ray gives an actor one; what the engine starts reads the variable.
        os.environ["OMP_NUM_THREADS"] = str(threads)

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

        from cartridges.selfstudy.storage import schema, to_row
        from workflows.synthesis.failures import run_with_retry

        tasks = [Task(**row) for row in batch.to_pylist()]
        results = run_with_retry(self.synthesizer, tasks, self.synthesizer.settings.retries)
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
