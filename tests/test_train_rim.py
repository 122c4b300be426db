"""Training under Ray Train and DeepSpeed: as torch alone, as one worker, as if never killed."""

import errno
import json
import os
import random
import signal
import socket
import threading
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from cartridges import artifact
from cartridges.chunking import chunk_corpus
from cartridges.config import BuildSettings, OptimizerSettings, TrainSettings
from cartridges.corpus import load_corpus
from cartridges.distill.course import Course
from cartridges.distill.initialize import initialize
from cartridges.distill.packing import unshared
from cartridges.distill.remaining import remaining_kl
from cartridges.distill.student import Student
from cartridges.distill.trainer import TorchStepper, Trainer
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import NonFiniteLoss, UserError
from cartridges.selfstudy.deduplicate import deduplicate
from cartridges.selfstudy.held_out import split
from cartridges.selfstudy.plan import plan
from cartridges.selfstudy.storage import load_conversations
from cartridges.selfstudy.synthesizer import Synthesizer
from tests.serve_support import load_stock
from tests.test_synthesize import CORPUS, in_a_process, tiny_settings, wait_for, write_part
from workflows.runtime.manifests import write_manifest
from workflows.synthesis.dataset import corpus_tokens, dataset_fingerprint
from workflows.training.cohort import _cause
from workflows.training.train import train

TRAIN = {"num_tokens": 32, "row_tokens": 64, "pack_tokens": 256, "packs_per_step": 2, "steps": 12,
         "checkpoint_every": 2, "held_out": 4, "evaluate_every": 5}


@pytest.fixture(scope="module")
def settings(tiny_model_dir):
    base = tiny_settings(tiny_model_dir, num_conversations=96,
                         families={"anchored": 0.5, "cloze": 0.3, "recall": 0.2})
    return BuildSettings.model_validate({**base.model_dump(), "train": TRAIN})


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(CORPUS)
    return file


@pytest.fixture(scope="module")
def dataset(tiny_base_model, settings, corpus_file, tmp_path_factory):
    """A finished data set, made without Ray."""
    directory = tmp_path_factory.mktemp("dataset")
    corpus = load_corpus(str(corpus_file))
    chunks = chunk_corpus(corpus, tiny_base_model.tokenizer, settings.synthesize.chunk)
    synthesizer = Synthesizer(TransformersEngine(tiny_base_model), tiny_base_model.template,
                              {chunk.chunk_id: chunk for chunk in chunks}, settings.synthesize)
    tasks = plan(chunks, settings.synthesize, settings.seed)
    write_part(directory / "parts", "a.parquet", synthesizer.run(tasks))
    summary = deduplicate(directory / "parts", directory / "shards").as_dict()
    write_manifest(directory / "dataset.json", {
        **summary, "fingerprint": dataset_fingerprint(corpus, settings), "settings": {},
        "corpus": {"id": corpus.corpus_id, "fingerprint": corpus.fingerprint,
                   "tokens": corpus_tokens(corpus, settings)}})
    assert summary["conversations"]["kept"] >= 20
    return directory


@pytest.fixture(scope="module")
def process_group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_takes_the_steps_that_torch_takes(process_group, tiny_base_model, settings, dataset,
                                                    corpus_file, tmp_path, stage):
    from workflows.training.deepspeed_stepper import DeepSpeedStepper

    corpus = load_corpus(str(corpus_file))
    optimizer = OptimizerSettings(name="adam") if stage else OptimizerSettings()
    wanted = settings.train.model_copy(update={"zero_stage": stage, "optimizer": optimizer})
    conversations = load_conversations(dataset / "shards")
    curves, cartridges = [], []
    for stepper_class in (TorchStepper, DeepSpeedStepper):
        cartridge = initialize(tiny_base_model, corpus.text, settings.train, settings.seed)
        stepper = stepper_class([Student(tiny_base_model.model, cartridge)], wanted)
        trainer, curve = Trainer(stepper, [Course(conversations, wanted, 0)]), []
        trainer.run(curve.append, until=3)
        directory = tmp_path / stepper_class.__name__
        directory.mkdir()
        stepper.save(directory)
        trainer.run(curve.append, until=5)
        stepper.load(directory)
        trainer.next_step = 3
        trainer.run(curve.append, until=5)
        curves.append([(step.loss, step.grad_norm) for step in curve])
        cartridges.append(cartridge.trainable_keys.detach().clone())
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-4)
    np.testing.assert_allclose(curves[1][3:5], curves[1][5:7], rtol=1e-6)
    torch.testing.assert_close(cartridges[0], cartridges[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trained_layers", [0.5, 1.0])
def test_a_base_spread_over_workers_gives_the_same_steps(process_group, tiny_base_model, settings, dataset,
                                                         trained_layers):
    from workflows.training.deepspeed_stepper import DeepSpeedStepper
    from workflows.training.zero3 import gathered, load_partitioned

    spread = load_partitioned(settings.model)
    assert sum(weight.numel() for weight in spread.model.parameters()) == 0
    wanted = settings.train.model_copy(update={"zero_stage": 3, "trained_layers": trained_layers})
    conversations = unshared(load_conversations(dataset / "shards"))
    found = []
    for base, stepper_class, gather in ((tiny_base_model, TorchStepper, None), (spread, DeepSpeedStepper, gathered)):
        cartridge, curve = initialize(base, CORPUS, wanted, settings.seed), []
        stepper = stepper_class([Student(base.model, cartridge, gathered=gather)], wanted)
        Trainer(stepper, [Course(conversations, wanted, 0)]).run(curve.append, until=4)
        found.append(([(step.loss, step.grad_norm) for step in curve], cartridge.trainable_values.detach()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)
    assert sum(weight.numel() for weight in spread.model.parameters()) == 0


OTHER = "The baker of Ostwick keeps nine loaves for the watch. " * 8


def a_cartridge(base, directory, text, fingerprint="another"):
    """An untrained cartridge of `text` as an artifact."""
    start = initialize(base, text, TrainSettings(num_tokens=TRAIN["num_tokens"]), 0)
    record = artifact.CorpusRecord(id="text", fingerprint=fingerprint, tokens=100)
    artifact.save(directory, start, model=base.identity, corpus=record, settings={}, dtype="float32")
    return directory


def test_training_goes_on_from_a_cartridge(tiny_base_model, settings, corpus_file, tmp_path):
    corpus = load_corpus(str(corpus_file))
    before = artifact.load(a_cartridge(tiny_base_model, tmp_path / "before", CORPUS)).cartridge
    for share, frozen in ((0.5, 1), (1.0, 0)):
        update = {"init": "cartridge", "init_cartridge": str(tmp_path / "before"), "trained_layers": share}
        wanted = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
        again = initialize(tiny_base_model, corpus.text, wanted.train, wanted.seed)
        assert again.num_frozen_layers == frozen
        assert all(map(torch.equal, again.keys_values(), before.keys_values()))


def rows(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output):
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows(output)]


def _kl(base, cartridge, dataset, settings):
    """Mean over the chunks of what the cartridge has yet to learn of all conversations."""
    told = remaining_kl(Student(base.model, cartridge), load_conversations(dataset / "shards"), settings.train, 0)
    return np.mean(list(told.values()))


def _in_this_process(base, settings, dataset, distractor, packed=list):
    """`(cartridge, curve)` of the same training without Ray and DeepSpeed, never disturbed."""
    conversations, _ = split(load_conversations(dataset / "shards"), settings.train.held_out, settings.seed)
    cartridge, steps = initialize(base, CORPUS, settings.train, settings.seed), []
    student = Student(base.model, cartridge, distractors=[artifact.load(distractor).cartridge])
    course = Course(packed(conversations), settings.train, settings.seed)
    Trainer(TorchStepper([student], settings.train), [course]).run(steps.append)
    return cartridge, [(step.step, step.loss, step.grad_norm, step.lr) for step in steps]


@contextmanager
def a_worker_killed(output):
    """SIGKILL one of this process' training workers, whichever step it is at. Yields the killed ones' process ids."""
    killed, over = [], threading.Event()

    def kill():
        begun = len(curve(output))
        while not over.wait(0.05):
            workers = [one for one in psutil.Process().children(recursive=True) if "RayTrainWorker" in one.name()]
            if len(workers) == 2 and len(curve(output)) > begun:
                victim = random.choice(workers)
                victim.kill()
                killed.append(victim.pid)
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
def test_workers_and_kills_do_not_change_the_result(tiny_base_model, dataset, corpus_file, settings, tmp_path,
                                                    monkeypatch):
    """Two workers end where this process alone ends: with the driver and then a worker killed on the way, or with the
    base model spread over them. With a distractor in some of the packs, and held-out answers on the way."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    update = {"distractors": (str(a_cartridge(tiny_base_model, tmp_path / "other", OTHER)),), "distractor_share": 0.5}
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
    two = settings.model_copy(update={"train": settings.train.model_copy(update={"num_workers": 2})})
    spread = two.model_copy(update={"train": two.train.model_copy(update={"zero_stage": 3, "steps": 6})})
    output = tmp_path / "killed"
    with in_a_process(_TRAIN, dataset, corpus_file, output, two.model_dump_json()) as process:
        wait_for(lambda: list(output.glob("work/run/checkpoint_*")), process)
    assert not (output / "train.json").exists()

    from workflows.runtime.local_ray import local_ray

    with local_ray():
        corpus = load_corpus(str(corpus_file))
        with a_worker_killed(output) as killed:
            done = train(str(dataset), str(corpus_file), corpus, str(output), two)
        assert killed
        train(str(dataset), str(corpus_file), corpus, str(tmp_path / "spread"), spread)

    assert [row["step"] for row in rows(output)] == list(range(12))
    undisturbed, expected = _in_this_process(tiny_base_model, settings, dataset, tmp_path / "other")
    # The loss in a row is that of the first worker's packs; the gradient is everybody's.
    np.testing.assert_allclose([row[2] for row in curve(output)], [row[2] for row in expected], rtol=1e-3)
    assert _kl(tiny_base_model, undisturbed, dataset, settings) < _kl(
        tiny_base_model, initialize(tiny_base_model, CORPUS, settings.train, settings.seed), dataset, settings)
    # Example turns stand in every conversation there, so the packs are others.
    _, whole = _in_this_process(tiny_base_model, spread, dataset, tmp_path / "other", unshared)
    np.testing.assert_allclose([row[2] for row in curve(tmp_path / "spread")], [row[2] for row in whole], rtol=1e-2)
    for name in ("killed", "spread"):
        asked = {row["step"] + 1: row["held_out"] for row in rows(tmp_path / name) if "held_out" in row}
        assert list(asked) == ([5, 6] if name == "spread" else [5, 10, 12])
        best = json.loads((tmp_path / name / "train.json").read_text())["best"]
        kept = load_file(tmp_path / name / "best.safetensors")["trainable_keys"]
        published = artifact.load(tmp_path / name / "cartridge").cartridge.trainable_keys.detach()
        # An artifact is in bfloat16, and only the upper layers were trained.
        assert torch.equal(kept.bfloat16(), published[-len(kept):].bfloat16())
        assert best["step"] == max(asked, key=lambda step: (asked[step]["contains"], -asked[step]["nll_per_token"]))
        assert all(row["memory_bytes"] > 2**20 for row in rows(tmp_path / name))
        # Of a single step it may be above 1, where the machine was busy while the rate was measured.
        assert name == "spread" or 0 < np.median([row["matmul_share"] for row in rows(tmp_path / name)]) < 1
    told = artifact.read_manifest(output / "cartridge").settings["train"]
    assert told["distractors"] == [artifact.read_manifest(tmp_path / "other").digest]
    assert done["steps"] == 12 and done["truncated"] == 0 and done["mean_tokens"] > 5
    assert len(json.loads((output / "held_out.json").read_text())["questions"]) > 0
    assert not (output / "work").exists()


def test_a_full_disk_of_a_worker_is_told_as_such():
    from ray.train import WorkerGroupError

    full = OSError(errno.ENOSPC, "No space left on device", "runs/x")
    assert _cause(WorkerGroupError("a worker failed", {0: RuntimeError("peer"), 1: full})) is full


@pytest.mark.slow
def test_training_that_cannot_go_on_says_why(dataset, corpus_file, settings, tmp_path, monkeypatch):
    """A gradient that is not finite is not tried again; workers for whom there is no room are not waited for."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    corpus = load_corpus(str(corpus_file))

    def attempt(name, **update):
        changed = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
        train(str(dataset), str(corpus_file), corpus, str(tmp_path / name), changed)

    from workflows.runtime.local_ray import local_ray

    with local_ray():
        with pytest.raises(NonFiniteLoss, match="lower train.optimizer.lr"):
            attempt("fast", optimizer=OptimizerSettings(lr=3e38, key_lr_scale=1.0))
        with pytest.raises(UserError, match="take at most"):
            attempt("many", num_workers=64, packs_per_step=64)
    assert (tmp_path / "fast" / "work").is_dir() and not (tmp_path / "fast" / "trained.json").exists()
    assert not (tmp_path / "fast" / "cartridge").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_training_gets_one_line_and_the_checkpoint(dataset, corpus_file, settings, tmp_path, number):
    output, config, said = tmp_path / "out", tmp_path / "settings.yaml", tmp_path / "stderr"
    config.write_text(settings.model_copy(
        update={"train": settings.train.model_copy(update={"steps": 5000})}).model_dump_json())
    command = ["train", dataset, "--corpus", corpus_file, "--output", output, "--config", config]
    with open(said, "w") as stderr, in_a_process(_COMMAND, *command, stderr=stderr) as process:
        wait_for(lambda: list(output.glob("work/run/checkpoint_*")), process)
        process.send_signal(number)
        assert process.wait(120) == 130
    lines = said.read_text().splitlines()
    assert lines[-1] == "cartridges: interrupted; the same command goes on where it stopped"
    assert all(line.startswith(("train: ", "cartridges: ")) for line in lines)
    assert list(output.glob("work/run/checkpoint_*")) and not (output / "cartridge").exists()


_COMMAND = """
import sys
from workflows.cli import main
sys.exit(main(sys.argv[1:]))
"""

_TRAIN = """
import json, sys
from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus
from workflows.training.train import train
train(sys.argv[1], sys.argv[2], load_corpus(sys.argv[2]), sys.argv[3],
      BuildSettings.model_validate(json.loads(sys.argv[4])))
"""


def test_mistakes_are_named_before_ray_starts(tiny_base_model, tiny_qwen3_dir, dataset, corpus_file, settings,
                                            tmp_path):
    def attempt(**update):
        changed = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
        train(str(dataset), str(corpus_file), load_corpus(str(corpus_file)), str(tmp_path / "out"), changed)

    with pytest.raises(UserError, match="not a multiple"):
        attempt(num_workers=3)
    with pytest.raises(UserError, match="shorter than num_tokens"):
        attempt(num_tokens=4096)
    with pytest.raises(UserError, match="optimizer.name=adam"):
        attempt(zero_stage=1)
    with pytest.raises(UserError, match="init_cartridge"):
        attempt(init="cartridge")
    with pytest.raises(UserError, match="is not a directory"):
        attempt(distractors=(str(tmp_path / "nowhere"),))
    with pytest.raises(UserError, match="of this very corpus"):
        attempt(distractors=(str(a_cartridge(tiny_base_model, tmp_path / "own", CORPUS,
                                             fingerprint=load_corpus(str(corpus_file)).fingerprint)),))
    with pytest.raises(UserError, match="was built for"):
        attempt(distractors=(str(a_cartridge(load_stock(tiny_qwen3_dir), tmp_path / "qwen",
                                             OTHER)),))
    other = str(a_cartridge(tiny_base_model, tmp_path / "another", OTHER))
    with pytest.raises(UserError, match="same cartridge twice"):
        attempt(distractors=(other, other))
    with pytest.raises(UserError, match="leave no room"):
        attempt(distractors=(other,), pack_tokens=1 << 20)
    with pytest.raises(UserError, match="set train.held_out"):
        attempt(held_out=0)
    with pytest.raises(UserError, match="no finished conversations"):
        train(str(tmp_path), str(corpus_file), load_corpus(str(corpus_file)), str(tmp_path / "out"), settings)
    other = tmp_path / "other.txt"
    other.write_text("Another corpus.")
    with pytest.raises(UserError, match="another corpus"):
        train(str(dataset), str(other), load_corpus(str(other)), str(tmp_path / "out"), settings)
