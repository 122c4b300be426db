"""Self-study on Ray Data: corpus -> chunks -> planned tasks -> actors -> Parquet shards.

    DIR/plan.json                     what is to be done, with its fingerprint
    DIR/chunks.parquet                the chunks that are asked about
    DIR/work/{tasks,parts,checkpoint} Ray Data's input, output and what it has committed
    DIR/shards/part-*.parquet         the finished conversations, kept and dropped, in order of id
    DIR/data_card.json                what is in them (`cartridges inspect DIR`)
    DIR/dataset.json                  manifest, written last

Killed anywhere, the same call goes on: Ray Data skips what is committed, at most the batches in
flight are done again, and the ids are those of the plan.
"""

import contextlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import cached_property, lru_cache, reduce
from itertools import chain
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus
from cartridges.errors import UserError
from cartridges.records import Chunk, Corpus
from workflows.budget import with_counts
from workflows.placement import Placement, place, threads_here
from workflows.stage import Clock, fingerprint, read_manifest, require_match, write_manifest

MANIFEST = "dataset.json"
CARD = "data_card.json"
POLL_SECONDS = 1.0
FEW_KEPT = 0.1
"""Of the planned conversations: fewer are worth a warning."""
logger = logging.getLogger(__name__)

ProgressCallback = Callable[[int, int, str], None]
"""`(done, total, label)`."""


def synthesize(corpus: str, output_dir: str, settings: BuildSettings,
               progress: ProgressCallback | None = None, job: str | None = None,
               weights: Mapping[str, float] | None = None, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Conversations of `corpus` in `output_dir`; returns the manifest. Resumes; done is done.

    `job` groups the W&B runs of one build. `weights` by chunk id give some chunks more conversations;
    what stands word for word in one of the finished data sets `earlier` is dropped as a duplicate.

    Raises `UserError` where `output_dir` holds another corpus' or other settings' conversations, and
    `RuntimeError` where more than `synthesize.max_failed_share` of the conversations raised.
    """
    output = Path(output_dir)
    loaded = load_corpus(corpus, settings.corpus.corpus_id)
    settings = with_counts(settings, corpus_tokens(loaded, settings))
    expected = dataset_fingerprint(loaded, settings, weights, earlier)
    done = read_manifest(output / MANIFEST)
    require_match(done, expected, output)
    if done is not None:
        require_some(done, output, earlier)
        return done
    from workflows.generation import check_generation
    from workflows.tracking import track

    check_generation(settings)
    output.mkdir(parents=True, exist_ok=True)
    planned = plan_dataset(loaded, output, settings, expected, weights, earlier)
    with track("synthesize", loaded.corpus_id, settings.model_dump(mode="json"), output, job) as run:
        speed = generate(output, settings, planned["conversations"], progress)
        manifest = finish_dataset(output, settings, planned, speed, earlier)
        run.log(metrics([manifest]))
    require_some(manifest, output, earlier)
    return manifest


def require_some(manifest: dict[str, Any], output: Path, earlier: Sequence[str]) -> None:
    """`UserError` where nothing was kept, though a later round may have nothing new."""
    if not manifest["conversations"]["kept"] and not earlier:
        raise UserError(f"none of the {manifest['planned']} conversations was kept ({_reasons(manifest)}); `cartridges "
                        f"inspect {output}` shows them. Choose other synthesize.families, or see filters_off")


def _reasons(manifest: dict[str, Any]) -> str:
    dropped = Counter(manifest["conversations"]["dropped"])
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(4))


def corpus_tokens(corpus: Corpus, settings: BuildSettings) -> int:
    """Length of the corpus in the model's tokens, what stands between documents included."""
    from cartridges.models import resolve_model_dir

    model = resolve_model_dir(settings.model)
    if (model, corpus.fingerprint) not in _TOKENS:
        tokenizer = _tokenizer(model)
        _TOKENS[model, corpus.fingerprint] = sum(
            len(tokenizer.encode(text, add_special_tokens=False, verbose=False))
            for text in chain(["\n\n"] * (len(corpus.documents) - 1), (one.text for one in corpus.documents)))
    return _TOKENS[model, corpus.fingerprint]


_TOKENS: dict[tuple[Path, str], int] = {}
"""Counted once: the stages of a build all ask."""


@lru_cache(maxsize=4)
def _tokenizer(directory: Path) -> Any:
    """Read once: a collection asks for each of its corpora."""
    from cartridges.models import load_tokenizer

    return load_tokenizer(directory)


@lru_cache(maxsize=4)
def _identity(directory: Path) -> Any:
    from cartridges.models import load_identity

    return load_identity(directory)


def dataset_fingerprint(corpus: Corpus, settings: BuildSettings, weights: Mapping[str, float] | None = None,
                        earlier: Sequence[str] = ()) -> str:
    """Changes with whatever changes the conversations, and with nothing else (but for what `engine=auto` comes to on
    an actor's machine, which is not known here)."""
    from cartridges.models import resolve_model_dir
    from cartridges.selfstudy.families import DEFAULT_MIXTURE

    identity = _identity(resolve_model_dir(settings.model))
    how = {"num_actors", "max_actors", "threads_per_actor", "batch_size", "max_failed_share", "retries", "engine",
           "asking"}
    # What came later and is off is left out, so that data sets made before it stay valid.
    off = {name for name in ("drop_ungrounded_names", "near_duplicate", "filters_off", "general_share")
           if not getattr(settings.synthesize, name)}
    asking = settings.synthesize.asking
    if asking.model:
        asker = _identity(resolve_model_dir(asking.model))
        asks = {"asking": [asker.weights_digest, asker.tokenizer_hash, asker.template_hash, asking.model.dtype]}
    else:
        asks = {"asking": [asking.endpoint, asking.endpoint_model]} if asking.endpoint else {}
    if settings.synthesize.engine == "vllm":
        asks["vllm"] = settings.vllm.dtype  # It draws differently, and may compute in another dtype.
    follows = {"weights": dict(weights or {}), "earlier": fingerprints(earlier), "ordinals": "go on"} \
        if earlier or weights else {}
    return fingerprint({
        **follows, **asks, "corpus": corpus.fingerprint, "seed": settings.seed, "dtype": settings.model.dtype,
        "synthesize": settings.synthesize.model_dump(mode="json", exclude=how | off),
        "families": settings.synthesize.families or DEFAULT_MIXTURE,
        "model": [identity.weights_digest, identity.tokenizer_hash, identity.template_hash],
    })


def fingerprints(datasets: Sequence[str]) -> list[str]:
    """Of finished data sets, in order."""
    return [read_manifest(Path(dataset) / MANIFEST)["fingerprint"] for dataset in datasets]


def plan_dataset(corpus: Corpus, output: Path, settings: BuildSettings, expected: str,
                 weights: Mapping[str, float] | None = None, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Chunks and tasks on disk; `plan.json` last. Found there already, it is taken as it is. Families go on through a
    chunk where the data sets `earlier` left it."""
    planned = read_manifest(output / "plan.json")
    require_match(planned, expected, output)
    if planned is not None:
        return planned
    from cartridges.chunking import Chunks
    from cartridges.models import resolve_model_dir
    from cartridges.selfstudy.plan import Task, plan
    from cartridges.selfstudy.storage import count_tasks

    chunks = Chunks(corpus, _tokenizer(resolve_model_dir(settings.model)), settings.synthesize.chunk)
    before = count_tasks(Path(dataset) / "shards" for dataset in earlier)
    tasks = plan(chunks, settings.synthesize, settings.seed, weights, before)
    if not tasks:
        raise UserError("no conversations are planned: the corpus has no text, or every share in "
                        "synthesize.families is 0")
    (output / "work").mkdir(exist_ok=True)
    asked = {task.chunk_id for task in tasks}
    write_rows(output / "chunks.parquet", Chunk, chunks.with_ids(asked))
    write_rows(output / "work" / "tasks.parquet", Task, tasks)
    planned = {
        "fingerprint": expected, "chunks": len(chunks), "conversations": len(tasks), "seed": settings.seed,
        "corpus": {"id": corpus.corpus_id, "fingerprint": corpus.fingerprint,
                   "tokens": corpus_tokens(corpus, settings)},
        "settings": settings.synthesize.model_dump(mode="json"), "model": settings.model.name,
    }
    write_manifest(output / "plan.json", planned)
    return planned


def write_rows(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Records of one `kind`, as Parquet; there may be none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64()}
    schema = pa.schema([(field.name, types[field.type]) for field in fields(kind)])
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)
    temporary.rename(path)


def generate(output: Path, settings: BuildSettings, total: int,
              progress: ProgressCallback | None) -> dict[str, float]:
    """Run Ray Data until every task is committed; how fast it went."""
    from workflows.console import Progress
    from workflows.local_ray import local_ray

    clock = Clock(output / "work" / "clock.json")
    with ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(Progress(total, "synthesize", "conversations")).callback
        stack.enter_context(local_ray())
        placed = _place(settings)
        reporting = stack.enter_context(_Reporting(output / "work" / "checkpoint", total, progress, clock))
        _run_pipeline(output.resolve(), settings, placed, total)
    return {"seconds": clock.seconds,
            "conversations_per_s": reporting.rate(placed.num_actors * settings.synthesize.batch_size)}


def _place(settings: BuildSettings) -> Placement:
    """On the nodes that Ray has now."""
    import ray

    from cartridges.engines.vllm_setup import gpus_of_an_engine

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1:  # a Ray that is started here offers more CPUs than there are
        nodes = [{**nodes[0], "CPU": min(nodes[0].get("CPU", 0), os.cpu_count() or 1) + 1}]
    return place(settings.synthesize, nodes, gpus_of_an_engine(settings.vllm, settings.synthesize.engine))


def _run_pipeline(output: Path, settings: BuildSettings, placed: Placement, total: int) -> None:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.checkpoint import CheckpointConfig

    from workflows.failures import Tolerance, count_failed, too_many

    # What it would print, pages of it, is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    work, wanted = output / "work", settings.synthesize
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig(
        id_column="conversation_id", checkpoint_path=str(work / "checkpoint"),
        delete_checkpoint_on_success=False)
    try:
        tolerance = ray.remote(num_cpus=0)(Tolerance).remote(
            wanted.max_failed_share, total, count_failed(work / "parts"))
        # Read from a file because Ray Data filters committed rows behind a read only; a block for
        # each batch because a block is the unit that is committed.
        tasks = ray.data.read_parquet(str(work / "tasks.parquet"))
        tasks.repartition(target_num_rows_per_block=wanted.batch_size).map_batches(
            SynthesisActor, fn_constructor_args=(settings, str(output / "chunks.parquet"), placed.beside, tolerance),
            batch_size=None, batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=placed.num_actors, max_size=placed.most),
            num_cpus=placed.num_cpus, num_gpus=placed.num_gpus,
        ).write_parquet(str(work / "parts"))
    except Exception:
        hopeless = ray.get(tolerance.exceeded.remote())
        if hopeless is None:
            raise
        raise too_many(*hopeless, total, wanted.max_failed_share, work) from None
    finally:
        context.checkpoint_config = None


class SynthesisActor:
    """Holds one engine and a `Synthesizer`; a batch of tasks in, their conversations out. `beside` actors share its
    node; `tolerance` is the one actor that counts what raised in all of them."""

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

        from workflows.generation import open_synthesizer

        torch.set_num_threads(self.threads)
        chunks = {row["chunk_id"]: Chunk(**row) for row in pq.read_table(self.chunks_file).to_pylist()}
        # Held, because what is let go of is closed.
        self._held = open_synthesizer(self.settings, chunks)
        return self._held.__enter__()

    def __call__(self, batch):
        import pyarrow as pa
        import ray

        from cartridges.selfstudy.plan import Task
        from cartridges.selfstudy.storage import schema, to_row
        from workflows.failures import failed_among, run_with_retry

        tasks = [Task(**row) for row in batch.to_pylist()]
        results = run_with_retry(self.synthesizer, tasks, self.settings.synthesize.retries)
        if failed := failed_among(results):
            ray.get(self.tolerance.add.remote(len(failed), failed[0]))
        return pa.Table.from_pylist([to_row(result) for result in results], schema=schema())


class _Reporting:
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
        """A full disk is for the pipeline to say, which cannot go on; this can."""
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

    def __enter__(self) -> "_Reporting":
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self._report()


def finish_dataset(output: Path, settings: BuildSettings, planned: dict[str, Any],
            speed: dict[str, float], earlier: Sequence[str]) -> dict[str, Any]:
    """Deduplicate into `shards/`, check the failures, write card and manifest, drop the work files."""
    from cartridges.selfstudy.card import data_card
    from cartridges.selfstudy.finish import finish
    from workflows.failures import require_few

    work = output / "work"
    temporary = output / "shards.tmp"
    for leftover in (temporary, output / "shards"):
        shutil.rmtree(leftover, ignore_errors=True)
    wanted = settings.synthesize
    summary = finish(work / "parts", temporary, "duplicate" not in wanted.filters_off,
                     None if "near_duplicate" in wanted.filters_off else wanted.near_duplicate,
                     [file for dataset in earlier for file in sorted((Path(dataset) / "shards").glob("*.parquet"))])
    require_few(summary.dropped["error"], planned["conversations"], wanted.max_failed_share, work)
    if summary.errors:
        logger.warning("%d conversations raised and were left out; `cartridges inspect %s` lists them",
                       summary.dropped["error"], output)
    few = summary.kept < FEW_KEPT * planned["conversations"]
    if summary.kept and (few or 2 * summary.dropped["nothing_to_ask"] > planned["conversations"]):
        logger.warning("%s: %d of %d conversations were kept (%s)", output, summary.kept, planned["conversations"],
                       _reasons(summary.as_dict()))
    temporary.rename(output / "shards")
    manifest = {**planned, **summary.as_dict(), "planned": planned["conversations"], **speed}
    write_manifest(output / CARD, data_card(summary, manifest, _model_record(settings)))
    write_manifest(output / MANIFEST, manifest)
    shutil.rmtree(work)
    return manifest


def _model_record(settings: BuildSettings) -> dict[str, str | None]:
    """What was asked for, and what it turned out to be."""
    from cartridges.models import resolve_model_dir

    identity = _identity(resolve_model_dir(settings.model))
    digests = ("weights_digest", "tokenizer_hash", "template_hash")
    return {**settings.model.model_dump(mode="json"), "source": identity.revision,
            **{name: getattr(identity, name) for name in digests}}


def metrics(manifests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of one data set, or of several that were made in one run."""
    def total(*path: str) -> float:
        return sum(reduce(dict.__getitem__, path, manifest) for manifest in manifests)

    planned, seconds, read = total("planned"), total("seconds"), total("tokens", "input")
    dropped = [manifest["conversations"]["dropped"] for manifest in manifests]
    repeated = sum(one.get("duplicate", 0) + one.get("near_duplicate", 0) for one in dropped)
    return {
        "synthesize/conversations": planned, "synthesize/kept": total("conversations", "kept"),
        "synthesize/dropped": sum(sum(one.values()) for one in dropped), "synthesize/tokens": read,
        **{f"synthesize/{name}": total(name) / len(manifests) for name in ("topk_mass", "teacher_entropy")},
        "synthesize/duplicate_share": repeated / planned,
        "synthesize/conversations_per_s": manifests[0]["conversations_per_s"],
        "synthesize/tokens_per_s": read / seconds, "synthesize/seconds": seconds,
    }
