"""What a training worker runs under Ray Train, and what it leaves for the driver.

Into each member's output directory: by the first worker `metrics.jsonl`, `held_out.json`, `best.safetensors` where it
was asked for, the artifact `cartridge/` and `trained.json`. Checkpoints go through Ray Train.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cartridges.cartridge import Cartridge
from cartridges.config import BuildSettings, TrainSettings
from cartridges.corpus import load_corpus
from cartridges.distill.course import Course, StepMetrics
from cartridges.distill.trainer import NonFiniteLoss, Trainer
from cartridges.models import BaseModel
from workflows.runtime.manifests import read_manifest, write_manifest
from workflows.training.held_out_evaluation import HeldOutEvaluation
from workflows.training.held_out_questions import HELD_OUT, read_held_out, write_held_out
from workflows.training.step_log import STEPS, TRAINED, CohortLog, StepLog


@dataclass(frozen=True)
class Pupil:
    """A member of the cohort in a worker: `config` is its own, `cartridge` is at its start."""

    config: dict[str, Any]
    settings: BuildSettings
    cartridge: Cartridge
    course: Course
    evaluation: HeldOutEvaluation

    @property
    def output(self) -> Path:
        return Path(self.config["output"])


def train_worker(config: dict[str, Any]) -> None:
    """What each worker runs: wave after wave, from the last checkpoint to the last step, then the artifacts."""
    import ray.train
    import torch

    from cartridges.models import load_base_model
    from workflows.training.zero3 import load_partitioned

    torch.set_num_threads(config["threads"])
    settings = BuildSettings.model_validate(config["members"][0]["settings"])
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    base = (load_partitioned if settings.train.zero_stage == 3 else load_base_model)(settings.model)
    reached = _reached()
    joint = CohortLog(Path(config["output"]) / "work" / STEPS) if rank == 0 and len(config["members"]) > 1 else None
    for number, wave in enumerate(config["waves"]):
        members = [config["members"][index] for index in wave]
        if number < reached["wave"] or all(_is_settled(member) for member in members):
            continue
        resumed = number == reached["wave"] and reached["next_step"] > 0
        pupils = [_pupil(member, base, rank, world, resumed) for member in members]
        _train_wave(number, pupils, base, rank, reached if resumed else None, joint, len(config["members"]) == 1)


def _reached() -> dict[str, Any]:
    """Wave and step of the last checkpoint, and who had failed by then."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return {"wave": 0, "next_step": 0, "failed": {}}
    with checkpoint.as_directory() as directory:
        return json.loads((Path(directory) / "step.json").read_text())


def _is_settled(member: dict[str, Any]) -> bool:
    """Trained, or failed, be it in another run."""
    return member["done"] or read_manifest(Path(member["output"]) / TRAINED) is not None


def _train_wave(number: int, pupils: Sequence[Pupil], base: BaseModel, rank: int, reached: dict[str, Any] | None,
                joint: CohortLog | None, alone: bool) -> None:
    import ray.train

    from cartridges.distill.lower_layers import MOST_BYTES
    from cartridges.distill.student import Student
    from workflows.training.deepspeed_stepper import DeepSpeedStepper
    from workflows.training.step_meter import StepMeter
    from workflows.training.zero3 import gathered

    settings = pupils[0].settings
    spread = settings.train.zero_stage == 3
    beside = [_beside(pupil, pupils, base) for pupil in pupils]
    students = [Student(base.model, pupil.cartridge, settings.train.loss, others, gathered if spread else None,
                        live=_live(pupil), kept_bytes=MOST_BYTES // len(pupils),
                        recompute=settings.train.gradient_checkpointing)
                for pupil, others in zip(pupils, beside, strict=True)]
    stepper = DeepSpeedStepper(students, settings.train)
    trainer = Trainer(stepper, [pupil.course for pupil in pupils], stepper.device)
    if reached is not None:
        with ray.train.get_checkpoint().as_directory() as directory:
            stepper.load(Path(directory))
        trainer.next_step = reached["next_step"]
        trainer.failed = {int(member): message for member, message in reached["failed"].items()}
    if settings.train.loss != "none":
        if rank == 0:
            meter = StepMeter(base, [pupil.course for pupil in pupils], [pupil.cartridge for pupil in pupils], beside)
            report = _reporter(pupils, trainer, meter, joint)
        else:
            report = _echo(pupils) if spread else lambda _: None
        try:
            trainer.run(report, lambda step: _checkpoint(trainer, number, step))
        except NonFiniteLoss:  # of all in this wave: the others' may be good
            if alone:
                raise
        if joint is not None:
            joint.flush(trainer.steps)
    if rank == 0:
        for member, pupil in enumerate(pupils):
            if _is_settled(pupil.config):
                continue
            if member in trainer.failed:
                write_manifest(pupil.output / TRAINED, {"failed": trainer.failed[member]})
            else:
                _save(pupil, base)


def _reporter(pupils: Sequence[Pupil], trainer: Trainer, meter, joint: CohortLog | None) -> Callable[[Any], None]:
    """Writes a row a step; the other workers wait at the next step's gradients while this one looks."""
    logs = [StepLog(pupil.output / STEPS, trainer.next_step, keeps=not pupil.config["done"]) for pupil in pupils]

    def report(metrics: StepMetrics) -> None:
        done, evaluation = metrics.step + 1, pupils[metrics.member].evaluation
        held_out = {"held_out": evaluation.run(done)} if evaluation.due(done, metrics.steps) else {}
        row = logs[metrics.member].write(metrics, meter.read(metrics) | held_out)
        if joint is not None:
            joint.write(row, trainer.steps)

    return report


def _echo(pupils: Sequence[Pupil]) -> Callable[[Any], None]:
    """Of a worker that holds a part of the base: the first one cannot look at the answers without it."""
    def report(metrics: StepMetrics) -> None:
        evaluation = pupils[metrics.member].evaluation
        if evaluation.due(metrics.step + 1, metrics.steps):
            evaluation.run(metrics.step + 1)

    return report


def _pupil(config: dict[str, Any], base: BaseModel, rank: int, world: int, resumed: bool) -> Pupil:
    """The member's cartridge at its start and what it is taught; the first worker writes its questions down."""
    from cartridges.distill.initialize import MOST_CHARACTERS, initialize
    from cartridges.distill.packing import unshared
    from cartridges.selfstudy.held_out import split, without
    from cartridges.selfstudy.storage import load_conversations

    settings, output = BuildSettings.model_validate(config["settings"]), Path(config["output"])
    made = [one for dataset in config["datasets"] for one in load_conversations(Path(dataset) / "shards")]
    if config["held_out"]:
        questions = read_held_out(Path(config["held_out"]))
        conversations = without(made, [question.question for question in questions])
    else:
        conversations, questions = split(made, settings.train.held_out, settings.seed)
    if rank == 0:
        write_held_out(output / HELD_OUT, questions)
    corpus = load_corpus(config["corpus"], settings.corpus.corpus_id)
    text = corpus.spread(MOST_CHARACTERS)
    cartridge = initialize(base, text, _start(settings.train, rank, resumed), settings.seed)
    if settings.train.zero_stage == 3:
        conversations = unshared(conversations)
    course = Course(conversations, settings.train, settings.seed, rank, world, config["partners"])
    return Pupil(config, settings, cartridge, course,
                 HeldOutEvaluation(base, cartridge, questions, settings.train, output,
                                   keeps=rank == 0 and not config["done"]))


def _start(wanted: TrainSettings, rank: int, resumed: bool) -> TrainSettings:
    """The other workers are sent the first one's start, and a resumed one reads its checkpoint: what these begin
    with need only have the shape, so it need not be fitted. Where the base is spread over the workers none can do
    without the others."""
    given = resumed or (rank > 0 and wanted.zero_stage < 3)
    return wanted.model_copy(update={"init": "prefix"}) if given and wanted.init == "attention_matching" else wanted


def _live(pupil: Pupil) -> bool:
    return pupil.config["partners"] > 0


def _beside(pupil: Pupil, pupils: Sequence[Pupil], base: BaseModel) -> list[Cartridge]:
    """What is loaded beside a cartridge in some packs: the others of its wave, as they are by then, or finished
    cartridges of other corpora."""
    from cartridges import artifact

    if _live(pupil):
        return [one.cartridge for one in pupils if one is not pupil]
    return [artifact.load(directory).cartridge.to(base.device) for directory in pupil.config["distractors"]]


def _checkpoint(trainer: Trainer, wave: int, step: int) -> None:
    """Every worker writes its part; Ray Train merges, registers and prunes."""
    import ray.train

    with tempfile.TemporaryDirectory() as directory:
        trainer.stepper.save(Path(directory))
        (Path(directory) / "step.json").write_text(
            json.dumps({"wave": wave, "next_step": step, "failed": trainer.failed}))
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(directory))


def _save(pupil: Pupil, base: BaseModel) -> None:
    from cartridges import artifact
    from cartridges.distill.packing import count_truncated, own_lengths

    best = pupil.evaluation.best()
    if best:
        pupil.evaluation.restore()
    settings, conversations = pupil.settings, pupil.course.conversations
    lengths = own_lengths(conversations)
    artifact.save(
        pupil.output / "cartridge", pupil.cartridge, model=base.identity,
        corpus=artifact.CorpusRecord(**pupil.config["corpus_record"]), seed=settings.seed,
        settings={"synthesize": pupil.config["synthesize"], "train": settings.train.model_dump(mode="json") | (
            # Not where they lay: the same training has the same version anywhere.
            {"distractors": pupil.config["distractor_digests"]} | (
                {"partners": pupil.config["partners"]} if _live(pupil) else {}))})
    write_manifest(pupil.output / TRAINED, {
        "steps": pupil.course.steps, "best": best, "conversations": len(conversations),
        "mean_tokens": mean(lengths) if lengths else 0.0,
        "truncated": count_truncated(conversations, settings.train.pack_tokens)})
