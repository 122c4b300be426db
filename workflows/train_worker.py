"""What a training worker runs under Ray Train, and what it leaves for the driver.

Into the run's output directory: checkpoints through Ray Train, and by the first worker `metrics.jsonl`,
`held_out.json`, `best.safetensors` where it was asked for, the artifact `cartridge/` and `trained.json`.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from cartridges.config import BuildSettings, TrainSettings
from cartridges.corpus import load_corpus
from workflows.checkups import Checkups
from workflows.held_out import HELD_OUT, read_held_out, write_held_out
from workflows.stage import write_manifest
from workflows.step_log import STEPS, StepLog


def train_worker(config: dict[str, Any]) -> None:
    """What each worker runs: the student, from the last checkpoint to the last step, then the artifact."""
    import ray.train
    import torch

    from cartridges.distill.student import Student
    from cartridges.distill.trainer import Trainer
    from workflows.deepspeed_stepper import DeepSpeedStepper
    from workflows.gauge import Gauge

    torch.set_num_threads(config["threads"])
    settings, output = BuildSettings.model_validate(config["settings"]), Path(config["output"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    base, cartridge, conversations, questions = _prepare(config, settings, rank)
    distractors = _distractors(config, base.device)
    student = Student(base.model, cartridge, settings.train.loss, distractors)
    stepper = DeepSpeedStepper(student, settings.train)
    trainer = Trainer(stepper, conversations, settings.train, settings.seed, stepper.device, rank, world)
    _resume(trainer)
    checkups = Checkups(base, cartridge, questions, settings.train, output)
    if settings.train.loss != "none":
        gauge = Gauge(base, trainer, cartridge, distractors) if rank == 0 else None
        trainer.run(_reporter(output, trainer, checkups, gauge) if gauge else lambda _: None,
                    lambda step: _checkpoint(trainer, step))
    if rank == 0:
        _save(config, settings, base, cartridge, trainer, checkups)


def _reporter(output: Path, trainer, checkups: Checkups, gauge) -> Callable[[Any], None]:
    """Writes a row a step; the other workers wait at the next step's gradients while this one looks."""
    log = StepLog(output / STEPS, trainer.next_step)

    def report(metrics) -> None:
        done = metrics.step + 1
        held_out = {"held_out": checkups.run(done)} if checkups.due(done, metrics.steps) else {}
        log.write(metrics, gauge.read(metrics) | held_out)

    return report


def _prepare(config: dict[str, Any], settings: BuildSettings, rank: int):
    """`(base, cartridge at its start, conversations, held-out questions)`; the first worker writes these down."""
    from cartridges.distill.initialize import initialize
    from cartridges.models import load_base_model
    from cartridges.selfstudy.held_out import split, without
    from cartridges.selfstudy.storage import load_conversations

    base = load_base_model(settings.model)
    made = [one for dataset in config["datasets"] for one in load_conversations(Path(dataset) / "shards")]
    if config["held_out"]:
        questions = read_held_out(Path(config["held_out"]))
        conversations = without(made, [question.question for question in questions])
    else:
        conversations, questions = split(made, settings.train.held_out, settings.seed)
    if rank == 0:
        write_held_out(Path(config["output"]) / HELD_OUT, questions)
    corpus = load_corpus(config["corpus"], settings.corpus.corpus_id)
    return base, initialize(base, corpus.text, _start(settings.train, rank), settings.seed), conversations, questions


def _start(wanted: TrainSettings, rank: int) -> TrainSettings:
    """The other workers are sent the first one's start, and a resumed one reads its checkpoint: what these begin
    with need only have the shape, so it need not be fitted."""
    import ray.train

    given = rank > 0 or ray.train.get_checkpoint() is not None
    return wanted.model_copy(update={"init": "prefix"}) if given and wanted.init == "attention_matching" else wanted


def _distractors(config: dict[str, Any], device) -> list:
    """The cartridges of other corpora that are loaded beside in some packs."""
    from cartridges import artifact

    return [artifact.load(directory).cartridge.to(device) for directory in config["distractors"]]


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


def _save(config: dict[str, Any], settings: BuildSettings, base, cartridge, trainer, checkups: Checkups) -> None:
    from cartridges import artifact
    from cartridges.distill.packing import count_truncated, own_lengths

    best = checkups.best()
    if best:
        checkups.restore()
    output, lengths = Path(config["output"]), own_lengths(trainer.conversations)
    artifact.save(
        output / "cartridge", cartridge, model=base.identity,
        corpus=artifact.CorpusRecord(**config["corpus_record"]), seed=settings.seed,
        settings={"synthesize": config["synthesize"], "train": settings.train.model_dump(mode="json") | (
            # Not where they lay: the same training has the same version anywhere.
            {"distractors": config["distractor_digests"]})})
    write_manifest(output / "trained.json", {
        "steps": trainer.order.steps, "best": best, "conversations": len(trainer.conversations),
        "mean_tokens": mean(lengths) if lengths else 0.0,
        "truncated": count_truncated(trainer.conversations, settings.train.pack_tokens)})
