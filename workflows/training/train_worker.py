"""The training worker under Ray Train, and the files that it leaves for the driver.

Into each member's output directory: by the first worker `metrics.jsonl`, `held_out.json`, `best.safetensors` where it
was asked for, the artifact `cartridge/` and `trained.json`. Checkpoints go through Ray Train.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from cartridges.cartridge import Cartridge
from cartridges.config import BuildSettings, TrainSettings
from cartridges.corpus import load_corpus
from cartridges.distill.course import Course, StepMetrics
from cartridges.distill.trainer import Trainer
from cartridges.errors import NonFiniteLoss
from cartridges.models import BaseModel
from workflows.runtime.manifests import Failed, write_failed, write_manifest
from workflows.training.held_out_evaluation import HeldOutEvaluation
from workflows.training.held_out_questions import HELD_OUT, read_held_out, write_held_out
from workflows.training.records import OUTCOME, WorkerMember, WorkerRun
from workflows.training.step_log import STEPS, CohortLog, StepLog
from workflows.training.step_meter import StepMeter


@dataclass(frozen=True)
class TrainingMember:
    """A member with what its training holds in memory: `cartridge` is at its start."""

    member: WorkerMember
    cartridge: Cartridge
    course: Course
    evaluation: HeldOutEvaluation

    @property
    def output(self) -> Path:
        return self.member.output

    @property
    def settings(self) -> BuildSettings:
        return self.member.settings

    @property
    def has_wave_distractors(self) -> bool:
        """Whether its distractors are the other members of its wave."""
        return self.member.inputs.partners > 0


def train_worker(config: dict[str, WorkerRun]) -> None:
    """Train wave after wave, from the last checkpoint to the last step, and save the artifacts.

    `config` holds the `run` alone, because Ray Train passes a dictionary.
    """
    import ray.train
    import torch

    from cartridges.models import load_base_model
    from workflows.training.zero3 import load_partitioned

    run = config["run"]
    torch.set_num_threads(run.threads)
    settings = run.members[0].settings
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    base = (load_partitioned if settings.train.zero_stage == 3 else load_base_model)(settings.model)
    reached = _reached()
    joint = CohortLog(run.directory / "work" / STEPS) if rank == 0 and len(run.members) > 1 else None
    for number, indices in enumerate(run.waves):
        members = [run.members[index] for index in indices]
        if number < reached.wave or all(member.is_settled for member in members):
            continue
        resumed = number == reached.wave and reached.next_step > 0
        wave = [_prepare(member, base, rank, world, resumed) for member in members]
        _train_wave(number, wave, base, rank, reached if resumed else None, joint)


@dataclass(frozen=True)
class Reached:
    """Where a checkpoint stands; `failed` has the messages of the wave's members that had failed, by place."""

    wave: int = 0
    next_step: int = 0
    failed: Mapping[int, str] = field(default_factory=dict)


def _reached() -> Reached:
    """Where the last checkpoint stands, or the beginning."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Reached()
    with checkpoint.as_directory() as directory:
        told = json.loads((Path(directory) / "step.json").read_text())
    return Reached(told["wave"], told["next_step"], {int(place): why for place, why in told["failed"].items()})


def _train_wave(number: int, wave: Sequence[TrainingMember], base: BaseModel, rank: int, reached: Reached | None,
                joint: CohortLog | None) -> None:
    import ray.train

    from cartridges.distill.lower_layers import MOST_BYTES
    from cartridges.distill.student import Student
    from workflows.training.deepspeed_stepper import DeepSpeedStepper
    from workflows.training.zero3 import gathered

    settings = wave[0].settings
    spread = settings.train.zero_stage == 3
    distractors = [_distractors(one, wave, base) for one in wave]
    students = [Student(base.model, one.cartridge, settings.train.loss, others, gathered if spread else None,
                        live=one.has_wave_distractors, kept_bytes=MOST_BYTES // len(wave),
                        recompute=settings.train.gradient_checkpointing)
                for one, others in zip(wave, distractors, strict=True)]
    stepper = DeepSpeedStepper(students, settings.train)
    trainer = Trainer(stepper, [one.course for one in wave], stepper.device)
    if reached is not None:
        with ray.train.get_checkpoint().as_directory() as directory:
            stepper.load(Path(directory))
        trainer.next_step = reached.next_step
        trainer.failed = dict(reached.failed)
    if settings.train.loss != "none":
        if rank == 0:
            meter = StepMeter(base, [one.course for one in wave], [one.cartridge for one in wave], distractors)
            report = _reporter(wave, trainer, meter, joint)
        else:
            report = _echo(wave) if spread else lambda _: None
        try:
            trainer.run(report, lambda step: _checkpoint(trainer, number, step))
        except NonFiniteLoss as error:  # no member is left; a retry would come to the same, and other waves may be good
            trainer.failed = {place: trainer.failed.get(place, str(error)) for place in range(len(wave))}
        if joint is not None:
            joint.flush(trainer.steps)
    if rank == 0:
        for place, one in enumerate(wave):
            if one.member.is_settled:
                continue
            if place in trainer.failed:
                write_failed(one.output / OUTCOME, Failed(trainer.failed[place]))
            else:
                _save(one, base)


def _reporter(wave: Sequence[TrainingMember], trainer: Trainer, meter: StepMeter,
              joint: CohortLog | None) -> Callable[[StepMetrics], None]:
    """Writes a row a step; the other workers wait at the next step's gradients while this one looks."""
    logs = [StepLog(one.output / STEPS, trainer.next_step, keeps=not one.member.done) for one in wave]

    def report(metrics: StepMetrics) -> None:
        done, evaluation = metrics.step + 1, wave[metrics.member].evaluation
        held_out = {"held_out": evaluation.run(done)} if evaluation.due(done, metrics.steps) else {}
        row = logs[metrics.member].write(metrics, meter.read(metrics) | held_out)
        if joint is not None:
            joint.write(row, trainer.steps)

    return report


def _echo(wave: Sequence[TrainingMember]) -> Callable[[StepMetrics], None]:
    """Answers along with the first worker, which needs every worker's part of the base to do so."""
    def report(metrics: StepMetrics) -> None:
        evaluation = wave[metrics.member].evaluation
        if evaluation.due(metrics.step + 1, metrics.steps):
            evaluation.run(metrics.step + 1)

    return report


def _prepare(member: WorkerMember, base: BaseModel, rank: int, world: int, resumed: bool) -> TrainingMember:
    """The member's cartridge at its start and what it is taught; the first worker writes its questions down."""
    from cartridges.distill.initialize import MOST_CHARACTERS, initialize
    from cartridges.distill.packing import unshared
    from cartridges.selfstudy.held_out import split, without
    from cartridges.selfstudy.storage import load_conversations

    settings, inputs = member.settings, member.inputs
    made = [one for dataset in inputs.datasets for one in load_conversations(Path(dataset) / "shards")]
    if inputs.held_out:
        questions = read_held_out(Path(inputs.held_out))
        conversations = without(made, [question.question for question in questions])
    else:
        conversations, questions = split(made, settings.train.held_out, settings.seed)
    if rank == 0:
        write_held_out(member.output / HELD_OUT, questions)
    corpus = load_corpus(inputs.corpus, settings.corpus.corpus_id)
    text = corpus.spread(MOST_CHARACTERS)
    cartridge = initialize(base, text, _start(settings.train, rank, resumed), settings.seed)
    if settings.train.zero_stage == 3:
        conversations = unshared(conversations)
    course = Course(conversations, settings.train, settings.seed, rank, world, inputs.partners)
    return TrainingMember(member, cartridge, course,
                          HeldOutEvaluation(base, cartridge, questions, settings.train, member.output,
                                            keeps=rank == 0 and not member.done))


def _start(wanted: TrainSettings, rank: int, resumed: bool) -> TrainSettings:
    """The other workers are sent the first one's start, and a resumed one reads its checkpoint: what these begin
    with need only have the shape, so it need not be fitted. Where the base is spread over the workers none can do
    without the others."""
    given = resumed or (rank > 0 and wanted.zero_stage < 3)
    return wanted.model_copy(update={"init": "prefix"}) if given and wanted.init == "attention_matching" else wanted


def _distractors(own: TrainingMember, wave: Sequence[TrainingMember], base: BaseModel) -> list[Cartridge]:
    """The cartridges that stand beside `own` in some packs: the others of its wave as they are by then, or finished
    ones of other corpora."""
    from cartridges import artifact

    if own.has_wave_distractors:
        return [other.cartridge for other in wave if other is not own]
    return [artifact.load(directory).cartridge.to(base.device) for directory in own.member.inputs.distractors]


def _checkpoint(trainer: Trainer, wave: int, step: int) -> None:
    """Every worker writes its part; Ray Train merges, registers and prunes."""
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        trainer.stepper.save(Path(directory))
        (Path(directory) / "step.json").write_text(
            json.dumps({"wave": wave, "next_step": step, "failed": trainer.failed}))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _save(one: TrainingMember, base: BaseModel) -> None:
    from cartridges import artifact
    from cartridges.distill.packing import count_truncated, own_lengths

    best = one.evaluation.best()
    if best:
        one.evaluation.restore()
    settings, inputs, conversations = one.settings, one.member.inputs, one.course.conversations
    lengths = own_lengths(conversations)
    artifact.save(
        one.output / "cartridge", one.cartridge, model=base.identity,
        corpus=inputs.corpus_record, seed=settings.seed,
        settings={"synthesize": inputs.synthesize, "train": settings.train.model_dump(mode="json") | (
            # Not where they lay: the same training has the same version anywhere.
            {"distractors": list(inputs.distractor_digests)} | (
                {"partners": inputs.partners} if one.has_wave_distractors else {}))})
    write_manifest(one.output / OUTCOME, {
        "steps": one.course.steps, "best": best, "conversations": len(conversations),
        "mean_tokens": mean(lengths) if lengths else 0.0,
        "truncated": count_truncated(conversations, settings.train.pack_tokens)})
