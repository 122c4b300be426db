"""Context distillation under Ray Train: conversations -> cartridges, on any number of workers.

One run trains one cartridge, or a cohort: several, of several corpora, before one frozen base model. Each member
learns what it would alone. `cohort.active` of them are trained at once, a wave, and only those have optimiser state.

    DIR/work/run/              Ray Train's run: checkpoints (pruned) and where it stands
    DIR/work/waves.json        who is trained with whom, as it was decided when the run began
    DIR/work/metrics.jsonl     of a cohort: one row a step, the members' mean
    MEMBER/metrics.jsonl       one row a step, by the first worker
    MEMBER/cartridge/          the artifact
    MEMBER/train.json          manifest, written last

DIR is the member's own where there is one. Killed anywhere, the same call goes on from the last checkpoint and
reaches the same curves.
"""

import logging
import os
import shutil
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cartridges.config import TrainSettings
from cartridges.errors import NonFiniteLoss, UserError
from workflows.runtime.manifests import (
    Clock,
    Failed,
    fingerprint,
    read_failed,
    read_manifest,
    require_match,
    write_manifest,
)
from workflows.runtime.progress import ProgressCallback
from workflows.training.records import MANIFEST, OUTCOME, Member, WorkerMember, WorkerRun
from workflows.training.step_log import STEPS, StepLogFollower, read_rows

logger = logging.getLogger(__name__)

Size = tuple[int, int]
"""Slots of a cartridge, and how many of them are frozen."""
MAX_FAILURES = 2
"""Lost workers after which the run is given up; it goes on from the last checkpoint each time."""


def train_cohort(members: Sequence[Member], directory: Path, label: str, progress: ProgressCallback | None = None,
                 job: str | None = None) -> list[dict[str, Any] | Failed]:
    """Train those of `members` that are not trained yet; the manifests of all, in order, and `Failed` of a member whose
    training failed while others went on: the next run tries it again.

    `label` names the run, `job` groups the W&B runs of one build. Raises `UserError` where a member's `output` holds
    another training.
    """
    for member in members:
        require_match(member.manifest, member.fingerprint, member.output)
    todo = [member for member in members if member.manifest is None]
    if todo:
        failed = _train(members, todo, directory, label, progress, job)
    return [failed[member.output] if member.manifest is None else member.manifest for member in members]


def _train(members: Sequence[Member], todo: Sequence[Member], directory: Path, label: str,
           progress: ProgressCallback | None, job: str | None) -> dict[Path, Failed]:
    """Train `todo`, and with them those of `members` that are in their company; the failures by output directory.

    Raises `NonFiniteLoss` where only one is trained; its last checkpoint is kept.
    """
    from workflows.runtime.tracking import track

    taken = _with_company(members, {member.output for member in todo})
    if not (directory / "work").is_dir():  # nothing to go on with, so those that failed are tried again
        for member in todo:
            if read_failed(member.output / OUTCOME):
                (member.output / OUTCOME).unlink()
    for member in todo:
        member.output.mkdir(parents=True, exist_ok=True)
        require_match(read_manifest(member.output / "started.json"), member.fingerprint, member.output)
        write_manifest(member.output / "started.json", {"fingerprint": member.fingerprint})
    with track("train", label, members[0].settings.model_dump(mode="json"), directory, job) as run:
        clock = Clock(directory / "work" / "clock.json")
        _fit(taken, directory, run, progress, clock)
        seconds, shares = clock.seconds, _shares(todo)
        failed = {member.output: failure for member, share in zip(todo, shares, strict=True)
                  if (failure := _finish(member, seconds * share))}
        if failed and len(taken) == 1:
            (todo[0].output / OUTCOME).unlink()
            raise NonFiniteLoss(failed[todo[0].output].reason)
        shutil.rmtree(directory / "work")
        run.log({"train/seconds": seconds})
    return failed


def _with_company(members: Sequence[Member], todo: set[Path]) -> list[Member]:
    """The members in `todo`, and the others of their waves: these are trained again, and their finished files stay."""
    if not any(member.inputs.partners for member in members):
        return [member for member in members if member.output in todo]
    return [members[index] for wave in waves(members) if any(members[index].output in todo for index in wave)
            for index in wave]


def waves(members: Sequence[Member]) -> list[list[int]]:
    """Indices of the members that are trained at once, of like size. They do not depend on what is done already."""
    order = sorted(range(len(members)), key=lambda index: (-members[index].size, index))
    active = members[0].settings.cohort.active
    return [order[first:first + active] for first in range(0, len(order), active)]


def with_wave_distractors(members: Sequence[Member]) -> list[Member]:
    """The members, each with the others of its wave as distractors while they are trained, which changes what it
    becomes; so their fingerprints are in its own. Raises `UserError` where the model's window has no room for them."""
    from cartridges.models import load_identity, resolve_model_dir

    found, wanted = list(members), members[0].settings.train
    window = load_identity(resolve_model_dir(members[0].settings.model)).max_position_embeddings
    for wave in waves(members):
        sizes = sorted(((one.num_tokens, one.num_frozen_tokens)
                        for one in (members[index].settings.train for index in wave)), reverse=True)
        check_window(sizes[0], sizes[1:], wanted, window)
        for index in wave:
            others = [members[other].fingerprint for other in wave if other != index]
            if others:
                found[index] = replace(
                    members[index], inputs=replace(members[index].inputs, partners=len(others)),
                    fingerprint=fingerprint([members[index].fingerprint, others, wanted.distractor_share,
                                             wanted.max_distractors]))
    return found


def check_window(own: Size, others: Sequence[Size], wanted: TrainSettings, window: int) -> None:
    """Raise `UserError` where packs have no room behind `own` and the largest of `others` that may stand beside it."""
    from cartridges.compose import composed_tokens

    most = composed_tokens([own, *sorted(others, reverse=True)[:wanted.max_distractors]])
    if most + wanted.pack_tokens > window:
        raise UserError(f"{most} slots with train.max_distractors={wanted.max_distractors} leave no room for packs of "
                        f"{wanted.pack_tokens} tokens in the window of {window}; take fewer")


def _planned_waves(members: Sequence[Member], directory: Path) -> list[list[int]]:
    """`waves`, decided once: a run that goes on keeps those that its checkpoints count by."""
    file, outputs = directory / "work" / "waves.json", [str(member.output.resolve()) for member in members]
    decided = read_manifest(file)
    if decided is None:
        decided = {"waves": [[outputs[index] for index in wave] for wave in waves(members)]}
        write_manifest(file, decided)
    return [[outputs.index(output) for output in wave] for wave in decided["waves"]]


def _fit(members: Sequence[Member], directory: Path, run, progress: ProgressCallback | None, clock: Clock) -> None:
    from ray.train import TrainingFailedError

    from workflows.runtime.local_ray import local_ray
    from workflows.runtime.progress import Progress

    followed = (members[0].output if len(members) == 1 else directory / "work") / STEPS
    with ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(Progress(None, "train", "steps")).callback
        stack.enter_context(local_ray())
        stack.enter_context(StepLogFollower(followed, run, progress, clock,
                                      members[0].settings.train.steps if len(members) == 1 else 0))
        try:
            with _own_interrupt():
                _torch_trainer(members, directory).fit()
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
    """The worker's own exception where it says more than Ray Train's wrapper: a user's mistake, or a full disk."""
    from ray.train import WorkerGroupError

    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    return next((failure for failure in failures if isinstance(failure, UserError | OSError)), error)


def _torch_trainer(members: Sequence[Member], directory: Path):
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from workflows.training.train_worker import train_worker

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    wanted = members[0].settings.train
    _check_resources(wanted.num_workers, ray.cluster_resources(), has_gpu)
    threads = wanted.threads_per_worker or max(1, (os.cpu_count() or 1) // wanted.num_workers)
    run = WorkerRun(
        tuple(WorkerMember(member.output.resolve(), member.settings, member.inputs, member.manifest is not None)
              for member in members),
        tuple(map(tuple, _planned_waves(members, directory))), directory.resolve(), threads)
    return TorchTrainer(
        train_worker, train_loop_config={"run": run},
        scaling_config=ScalingConfig(num_workers=wanted.num_workers, use_gpu=has_gpu),
        torch_config=TorchConfig(backend="nccl" if has_gpu else "gloo"),
        run_config=RunConfig(
            name="run", storage_path=str((directory / "work").resolve()),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=wanted.keep_checkpoints)))


def _check_resources(num_workers: int, resources: Mapping[str, float], has_gpu: bool) -> None:
    """Raise `UserError` where a Ray of our own, which does not grow, has no room for the workers: Ray Train would wait
    without a word. On a cluster, which may grow, log a warning."""
    kind, each = ("GPU", "one GPU") if has_gpu else ("CPU", "one CPU")
    there = int(resources.get(kind, 0))
    if num_workers <= there:
        return
    if not os.environ.get("RAY_ADDRESS"):
        raise UserError(f"train.num_workers={num_workers}, but each takes {each} and this machine offers Ray {there}; "
                        f"take at most {there}")
    logger.warning("train.num_workers=%d, each takes %s and the cluster has %d: training waits until it has grown",
                   num_workers, each, there)


def _shares(members: Sequence[Member]) -> list[float]:
    """Each member's share of the run's time, in proportion to the time of its steps."""
    spent = [sum(row["seconds"] for row in read_rows(member.output / STEPS)) for member in members]
    return [one / sum(spent) if any(spent) else 1 / len(members) for one in spent]


def _finish(member: Member, seconds: float) -> Failed | None:
    """Write the manifest, or return why the training failed."""
    failed = read_failed(member.output / OUTCOME)
    if failed:
        return failed
    trained = read_manifest(member.output / OUTCOME)
    rows = read_rows(member.output / STEPS)
    manifest = {"fingerprint": member.fingerprint, "seconds": seconds, **trained}
    if rows:
        # The first step warms up; the median does not see what else the machine did.
        manifest |= {"first": rows[0], "last": rows[-1],
                     "step_seconds": statistics.median(row["seconds"] for row in rows[1:] or rows)}
    write_manifest(member.output / MANIFEST, manifest)
    return None
