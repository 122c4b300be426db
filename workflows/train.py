"""Context distillation under Ray Train: conversations -> cartridge, on any number of workers.

    DIR/work/run/              Ray Train's run: checkpoints (pruned) and where it stands
    DIR/metrics.jsonl          one row a step, by the first worker
    DIR/cartridge/             the artifact
    DIR/train.json             manifest, written last

Killed anywhere, the same call goes on from the last checkpoint and reaches the same curve.
"""

import json
import logging
import os
import shutil
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cartridges.artifact import read_manifest as read_artifact_manifest
from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus
from cartridges.errors import UserError
from cartridges.records import Corpus
from workflows.stage import Clock, fingerprint, read_manifest, require_match, write_manifest
from workflows.synthesize import MANIFEST as DATASET_MANIFEST
from workflows.synthesize import ProgressCallback, corpus_tokens, fingerprints

MANIFEST = "train.json"
MAX_FAILURES = 2
"""Lost workers after which the run is given up; it goes on from the last checkpoint each time."""
POLL_SECONDS = 0.5


def train(dataset_dir: str, corpus: str, output_dir: str, settings: BuildSettings,
          progress: ProgressCallback | None = None, job: str | None = None,
          earlier: Sequence[str] = (), held_out: str | None = None) -> dict[str, Any]:
    """A cartridge from the conversations in `dataset_dir`, in `output_dir/cartridge`; returns the manifest.

    `job` groups the W&B runs of one build. The conversations of the data sets `earlier` are trained on as
    well; the questions of the file `held_out`, where one is given, are kept out in place of drawn ones.

    Raises `UserError` where the data set is unfinished or of another corpus, or where `output_dir`
    holds another training.
    """
    dataset, output = Path(dataset_dir), Path(output_dir)
    loaded = load_corpus(corpus, settings.corpus.corpus_id)
    made_of = _dataset_manifest(dataset, loaded)
    expected = train_fingerprint(made_of["fingerprint"], settings, earlier, held_out)
    done = read_manifest(output / MANIFEST)
    require_match(done, expected, output)
    if done is not None:
        return done
    check_training(loaded, settings)
    output.mkdir(parents=True, exist_ok=True)
    require_match(read_manifest(output / "started.json"), expected, output)
    write_manifest(output / "started.json", {"fingerprint": expected})
    from workflows.tracking import track

    config = {"datasets": [str(Path(one).resolve()) for one in (dataset_dir, *earlier)],
              "held_out": held_out and str(Path(held_out).resolve()), "corpus": str(Path(corpus).resolve()),
              "output": str(output.resolve()), "settings": settings.model_dump(mode="json"),
              "corpus_record": made_of["corpus"], "synthesize": made_of["settings"]}
    with track("train", loaded.corpus_id, settings.model_dump(mode="json"), output, job) as run:
        clock = Clock(output / "work" / "clock.json")
        _fit(config, settings, run, progress, clock)
        manifest = _finish(output, expected, clock.seconds)
        run.log({"train/seconds": manifest["seconds"]})
    return manifest


def _dataset_manifest(dataset: Path, corpus: Corpus) -> dict[str, Any]:
    manifest = read_manifest(dataset / DATASET_MANIFEST)
    if manifest is None:
        raise UserError(f"{dataset} holds no finished conversations; run `cartridges synthesize` first")
    if manifest["corpus"]["fingerprint"] != corpus.fingerprint:
        raise UserError(f"the conversations in {dataset} are of another corpus; give the one they are of")
    if manifest["conversations"]["kept"] == 0:
        raise UserError(f"no conversation in {dataset} was kept; dataset.json there counts the reasons. "
                        "Raise synthesize.num_conversations or choose other synthesize.families")
    return manifest


def train_fingerprint(dataset_fingerprint: str, settings: BuildSettings, earlier: Sequence[str] = (),
                      held_out: str | None = None) -> str:
    """Changes with whatever changes the cartridge, and with nothing else."""
    how = {"num_workers", "threads_per_worker", "zero_stage", "checkpoint_every", "keep_checkpoints"}
    start = settings.train.init_cartridge
    follows = {"earlier": fingerprints(earlier), "held_out": read_manifest(Path(held_out))} if held_out else {}
    return fingerprint({
        **follows, "dataset": dataset_fingerprint, "seed": settings.seed, "dtype": settings.model.dtype,
        "train": settings.train.model_dump(mode="json", exclude=how),
        "init_cartridge": read_artifact_manifest(start).digest if start else None,
    })



def check_training(corpus: Corpus, settings: BuildSettings) -> None:
    """A user's mistakes, found before Ray starts."""
    from cartridges.artifact import check_compatible
    from cartridges.models import load_identity, resolve_model_dir

    wanted = settings.train
    if wanted.packs_per_step % wanted.num_workers:
        raise UserError(f"train.packs_per_step={wanted.packs_per_step} is not a multiple of "
                        f"train.num_workers={wanted.num_workers}; workers share a step's packs evenly")
    if wanted.zero_stage == 3:
        raise UserError("train.zero_stage=3 (a base model partitioned over workers) is not supported yet; "
                        "use 0, 1 or 2")
    if wanted.zero_stage and wanted.optimizer.name != "adam":
        raise UserError(f"train.zero_stage={wanted.zero_stage} cuts the optimiser's state up, and "
                        f"{wanted.optimizer.name} needs it whole; use 0, or train.optimizer.name=adam")
    if wanted.init == "cartridge":
        if wanted.init_cartridge is None:
            raise UserError("train.init=cartridge needs train.init_cartridge, the directory of a cartridge")
        given = read_artifact_manifest(wanted.init_cartridge)
        check_compatible(given, load_identity(resolve_model_dir(settings.model)))
        if given.num_tokens != wanted.num_tokens:
            raise UserError(f"train.num_tokens={wanted.num_tokens}, but {wanted.init_cartridge} has "
                            f"{given.num_tokens}; set it to that")
    elif corpus_tokens(corpus, settings) < wanted.num_tokens:
        raise UserError(f"the corpus is shorter than num_tokens={wanted.num_tokens}; choose a smaller "
                        "--num-tokens (a tenth of the corpus is a good start)")


def _fit(config: dict[str, Any], settings: BuildSettings, run, progress: ProgressCallback | None,
         clock: Clock) -> None:
    from ray.train import TrainingFailedError

    from workflows.console import Progress
    from workflows.local_ray import local_ray

    with ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(Progress(None, "train", "steps")).callback
        stack.enter_context(local_ray())
        stack.enter_context(_Following(Path(config["output"]) / "metrics.jsonl", run, progress, clock))
        try:
            with _own_interrupt():
                _torch_trainer(config, settings).fit()
        except TrainingFailedError as error:
            raise _cause(error) from error


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ctrl-C stays a `KeyboardInterrupt`: Ray Train takes the signal, ends in `SystemExit`, and keeps it."""
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if in_main else None
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if in_main:
            signal.signal(signal.SIGINT, previous)


def _cause(error) -> Exception:
    """What a worker raised, where that is known: it says more than Ray Train's wrapper."""
    from ray.train import WorkerGroupError

    from cartridges.distill.trainer import NonFiniteLoss

    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    return next((failure for failure in failures if isinstance(failure, UserError | NonFiniteLoss)), error)


def _torch_trainer(config: dict[str, Any], settings: BuildSettings):
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    workers = settings.train.num_workers
    threads = settings.train.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)
    return TorchTrainer(
        train_worker, train_loop_config={**config, "threads": threads},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=has_gpu),
        torch_config=TorchConfig(backend="nccl" if has_gpu else "gloo"),
        run_config=RunConfig(
            name="run", storage_path=str(Path(config["output"]) / "work"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=settings.train.keep_checkpoints)))


def train_worker(config: dict[str, Any]) -> None:
    """What each worker runs: the student, from the last checkpoint to the last step, then the artifact."""
    import ray.train
    import torch

    from cartridges.distill.student import Student
    from cartridges.distill.trainer import Trainer
    from workflows.deepspeed_stepper import DeepSpeedStepper

    torch.set_num_threads(config["threads"])
    settings, output = BuildSettings.model_validate(config["settings"]), Path(config["output"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    base, cartridge, conversations = _prepare(config, settings, rank)
    stepper = DeepSpeedStepper(Student(base.model, cartridge, settings.train.loss), settings.train)
    trainer = Trainer(stepper, conversations, settings.train, settings.seed, stepper.device, rank, world)
    _resume(trainer)
    log = _MetricsLog(output / "metrics.jsonl", trainer.next_step).write if rank == 0 else lambda _: None
    if settings.train.loss != "none":
        trainer.run(log, lambda step: _checkpoint(trainer, step))
    if rank == 0:
        _save(config, settings, base, cartridge, trainer)


def _prepare(config: dict[str, Any], settings: BuildSettings, rank: int):
    """`(base, cartridge at its start, conversations)`; the first worker writes down what is held out."""
    from cartridges.models import load_base_model
    from cartridges.selfstudy.held_out import split, without
    from cartridges.selfstudy.storage import load_conversations

    base = load_base_model(settings.model)
    made = [one for dataset in config["datasets"] for one in load_conversations(Path(dataset) / "shards")]
    if config["held_out"]:
        questions = read_manifest(Path(config["held_out"]))["questions"]
        conversations = without(made, [row["question"] for row in questions])
    else:
        conversations, held_out = split(made, settings.train.held_out, settings.seed)
        questions = [asdict(question) for question in held_out]
    if rank == 0:
        write_manifest(Path(config["output"]) / "held_out.json", {"questions": questions})
    corpus = load_corpus(config["corpus"], settings.corpus.corpus_id)
    return base, start_cartridge(base, corpus, settings), conversations


def start_cartridge(base, corpus: Corpus, settings: BuildSettings):
    """The cartridge before its first step, by `train.init`."""
    from cartridges import artifact
    from cartridges.distill.initialize import frozen_layers, initialize

    if settings.train.init == "cartridge":
        before = artifact.load(settings.train.init_cartridge).cartridge
        return before.with_frozen_layers(frozen_layers(before.shape.num_layers, settings.train))
    return initialize(base, corpus.text, settings.train, settings.seed)


def _resume(trainer) -> None:
    """Go on from the last checkpoint, on every worker alike."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return
    with checkpoint.as_directory() as directory:
        trainer.stepper.load(Path(directory))
        trainer.next_step = json.loads((Path(directory) / "step.json").read_text())["next_step"]


def _checkpoint(trainer, step: int) -> None:
    """Every worker writes its part; Ray Train merges, registers and prunes."""
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        trainer.stepper.save(Path(directory))
        (Path(directory) / "step.json").write_text(json.dumps({"next_step": step}))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _save(config: dict[str, Any], settings: BuildSettings, base, cartridge, trainer) -> None:
    from cartridges import artifact
    from cartridges.distill.packing import count_truncated

    output = Path(config["output"])
    artifact.save(
        output / "cartridge", cartridge, model=base.identity,
        corpus=artifact.CorpusRecord(**config["corpus_record"]), seed=settings.seed,
        settings={"synthesize": config["synthesize"], "train": settings.train.model_dump(mode="json")})
    write_manifest(output / "trained.json", {
        "steps": trainer.order.steps, "conversations": len(trainer.conversations),
        "truncated": count_truncated(trainer.conversations, settings.train.pack_tokens)})


class _MetricsLog:
    """One JSON row a step. On resuming, rows past the checkpoint are dropped: each step is there once."""

    def __init__(self, path: Path, next_step: int):
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] < next_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)

    def write(self, metrics) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")


def _lines(path: Path) -> list[str]:
    """Whole lines: the last one may be half-written by a worker that was killed."""
    return path.read_text().split("\n")[:-1] if path.is_file() else []


class _Following:
    """Follows `metrics.jsonl` while the workers write it: progress, and W&B."""

    def __init__(self, path: Path, run, progress: ProgressCallback, clock: Clock):
        self.path, self.run, self.progress, self.clock = path, run, progress, clock
        self.seen = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while not self.stop.wait(POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        rows = [json.loads(line) for line in _lines(self.path)]
        for row in rows[self.seen:]:
            self.run.log(_figures(row), step=row["step"])
        if rows[self.seen:]:
            last = rows[-1]
            self.progress(last["step"] + 1, last["steps"], f"loss {last['loss']:.3f}, KL {last['kl']:.3f}")
        # A resumed run's log is cut back to its checkpoint; steps seen before are not logged again.
        self.seen = max(self.seen, len(rows))
        self.clock.save()

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self._read()


def _figures(row: dict[str, Any]) -> dict[str, float]:
    same = ("loss", "kl", "teacher_entropy", "topk_mass", "lr", "grad_norm", "loss_tokens")
    return {**{f"train/{name}": row[name] for name in same}, "train/step_seconds": row["seconds"],
            "train/tokens_per_s": row["tokens"] / row["seconds"],
            "train/eta_seconds": row["seconds"] * (row["steps"] - row["step"] - 1)}


def _finish(output: Path, expected: str, seconds: float) -> dict[str, Any]:
    trained = read_manifest(output / "trained.json")
    rows = [json.loads(line) for line in _lines(output / "metrics.jsonl")]
    manifest = {"fingerprint": expected, "seconds": seconds, **trained}
    if rows:
        # The first step warms up; the median does not see what else the machine did.
        manifest |= {"first": rows[0], "last": rows[-1],
                     "step_seconds": statistics.median(row["seconds"] for row in rows[1:] or rows)}
    write_manifest(output / MANIFEST, manifest)
    shutil.rmtree(output / "work")
    return manifest
