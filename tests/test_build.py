"""The whole chain on a tiny model: published with its report card; run again, nothing is done twice."""

import json
import time
from types import SimpleNamespace

import pytest

from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus
from cartridges.errors import UserError
from cartridges.prompts import example_messages
from cartridges.registry import Registry
from tests.test_synthesize import CORPUS, tiny_settings
from tests.test_tracking import records
from workflows.building.budget import Rates
from workflows.building.build import build
from workflows.building.machine_rates import calibrate, keep, measured, remembered
from workflows.cli import main

pytestmark = pytest.mark.usefixtures("one_ray")
FAMILIES = {"anchored": 0.5, "cloze": 0.3, "recall": 0.2}
TRAIN = {"num_tokens": 32, "row_tokens": 64, "pack_tokens": 256, "steps": 3, "threads_per_worker": 1}
EVALUATE = {"arms": ["closed_book", "full_context", "cartridge", "exact_kv"], "max_questions": 4,
            "max_answer_tokens": 4, "bootstrap_samples": 100}


@pytest.fixture
def settings(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("CARTRIDGES_HOME", str(tmp_path / "home"))
    base = tiny_settings(tiny_model_dir, num_conversations=64, batch_size=16, families=FAMILIES)
    return BuildSettings.model_validate({**base.model_dump(), "train": TRAIN, "evaluate": EVALUATE})


@pytest.fixture
def corpus_file(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text(CORPUS)
    return file


@pytest.mark.slow
def test_build_publishes_once_and_resumes_for_nothing(settings, corpus_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)  # each stage keeps its run beside its work
    monkeypatch.chdir(tmp_path)  # as a user would be: the default work directory is a relative path
    work = tmp_path / "runs" / "lights"
    arguments = (str(corpus_file), "lights", settings, str(tmp_path / "registry"), None, None)
    result = build(*arguments)
    card = result["report_card"]
    entry = Registry(tmp_path / "registry").resolve("lights")
    assert entry.version == result["version"] == card["cartridge"]["version"]
    assert entry.manifest.report_card["arms"].keys() == set(EVALUATE["arms"])
    assert card["questions"]["source"] == "held_out_self_study"
    assert set(card["build"]["seconds"]) == {"synthesize", "train", "evaluate"}
    assert card["build"]["conversations"]["kept"] > 0
    assert "plan: 64 conversations, 3 steps" in capsys.readouterr().err
    stages = [*work.glob("synthesize-*"), *work.glob("train-*"), work]
    assert [records(stage, "run")[0].run_group for stage in stages] == ["lights"] * 3
    start = time.monotonic()
    again = build(*arguments)
    assert time.monotonic() - start < result["seconds"] / 2
    assert (again["version"], again["report_card"]) == (result["version"], card)
    assert len(Registry(tmp_path / "registry").versions("lights")) == 1


def test_a_draft_is_published_as_one_without_ray_and_conversations(settings, corpus_file, tmp_path, capsys,
                                                                   monkeypatch, tiny_qwen3_dir):
    def no_ray():
        raise AssertionError("a draft needs no Ray")

    monkeypatch.setattr("workflows.runtime.local_ray.local_ray", no_ray)
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": f"How many {what}?", "answers": [str(n)]} for n, what in enumerate(("bells", "boats"))]
    questions.write_text(json.dumps({"corpus_id": "c", "text": "", "questions": rows}) + "\n")
    train = settings.train.model_copy(update={"loss": "none", "init": "attention_matching"})
    settings = settings.model_copy(update={"train": train})
    registry = str(tmp_path / "registry")
    arguments = (str(corpus_file), "quick", settings, registry, str(questions), str(tmp_path / "work"))
    result = build(*arguments)
    assert not list((tmp_path / "work").glob("synthesize-*"))
    assert result["report_card"]["build"]["conversations"] == {"kept": 0, "dropped": {}}
    assert "published as a draft" in capsys.readouterr().err
    assert main(["list", "--registry", registry, "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["cartridges"]
    assert line["draft"] and line["version"] == result["version"]
    assert main(["list", "--registry", registry]) == main(["show", "quick", "--registry", registry]) == 0
    said = capsys.readouterr().out
    assert "quick (draft)" in said and "a draft: the start" in said
    made = next((tmp_path / "work").glob("draft-*/cartridge/cartridge.safetensors"))
    before = made.stat().st_mtime_ns
    assert build(*arguments)["version"] == result["version"] and made.stat().st_mtime_ns == before
    other = settings.model_copy(update={"model": settings.model.model_copy(update={"name": str(tiny_qwen3_dir)})})
    assert build(str(corpus_file), "other", other, *arguments[3:])["version"] != result["version"]


@pytest.mark.slow
def test_a_draft_without_questions_is_asked_held_out_ones(settings, corpus_file, tmp_path):
    train = settings.train.model_copy(update={"loss": "none"})
    result = build(str(corpus_file), "quick", settings.model_copy(update={"train": train}), str(tmp_path / "registry"),
                   None, str(tmp_path / "work"))
    card = result["report_card"]
    assert card["questions"]["source"] == "held_out_self_study" and card["questions"]["asked"] > 0
    assert card["build"]["conversations"]["kept"] > 0
    assert Registry(tmp_path / "registry").resolve("quick").manifest.is_draft


def test_calibration_measures_what_a_plan_needs(settings, corpus_file):
    assert remembered(settings) is None
    # Distractors are not read for it, however they are named.
    with_others = settings.train.model_copy(update={"distractors": ("elsewhere",), "distractor_share": 1.0})
    rates = calibrate(load_corpus(str(corpus_file)), settings.model_copy(update={"train": with_others}))
    assert rates.conversation_seconds > 0 and rates.pack_seconds > 0
    assert 0 < rates.kept <= 1 and rates.tokens > 5


def test_a_calibration_counts_every_engine_that_synthesis_will_have(settings, corpus_file, monkeypatch):
    """One of a million takes no microsecond for a conversation; one alone takes a millisecond at the least."""
    monkeypatch.setattr("workflows.synthesis.ray_pipeline.engines_at_once", lambda _: 10**6)
    rates = calibrate(load_corpus(str(corpus_file)), settings, training=False)
    assert 0 < rates.conversation_seconds < 1e-5 and 0 < rates.kept <= 1


def test_a_remembered_rate_stands_while_a_measurement_agrees(settings, corpus_file, monkeypatch):
    """A build beside which the machine was busy must not make every later plan a third as long."""
    corpus, now = load_corpus(str(corpus_file)), Rates(0.1, 0.8, 0.9, 30.0)
    calls = []
    monkeypatch.setattr("workflows.building.machine_rates.calibrate", lambda *of: calls.append(of) or now)
    for number, (before, expected) in enumerate(((Rates(0.12, 2.4, 0.5, 20.0), Rates(0.12, 0.8, 0.9, 30.0)),
                                                 (Rates(0.02, 1.0, 0.5, 20.0), Rates(0.1, 1.0, 0.9, 30.0)),
                                                 (None, now))):
        lengthened = settings.train.model_copy(update={"num_tokens": 32 + number})  # rates go by it
        of = settings.model_copy(update={"train": lengthened})
        if before:
            keep(of, before)
        assert measured(corpus, of) == measured(corpus, of) == remembered(of) == expected
        assert len(calls) == number + 1


@pytest.mark.slow
def test_a_budget_is_planned_spent_and_kept(settings, corpus_file, tmp_path, capsys, monkeypatch):
    """Steps are decided when it is known what the conversations took; a build that goes on keeps both numbers."""
    monkeypatch.setattr("workflows.building.machine_rates.calibrate", lambda *of: Rates(0.5, 30.0, 0.9, 30.0))
    monkeypatch.setattr("workflows.building.machine_rates.time", SimpleNamespace(monotonic=iter((0.0, 40.0)).__next__))
    open_steps = settings.train.model_copy(update={"steps": 0, "held_out": 8})
    synthesize = settings.synthesize.model_copy(update={"num_conversations": 0})
    settings = settings.model_copy(update={"budget": "5m", "train": open_steps, "synthesize": synthesize})
    questions = tmp_path / "questions.jsonl"
    rows = [{"question": "How many bells?", "answers": ["3"]}]
    questions.write_text(json.dumps({"corpus_id": "c", "text": "", "questions": rows}) + "\n")
    work = tmp_path / "work"
    arguments = (str(corpus_file), "timed", settings, str(tmp_path / "registry"), str(questions), str(work))
    first = build(*arguments)
    said = capsys.readouterr().err
    steps = json.loads(next(work.glob("train-*/train.json")).read_text())["steps"]
    assert f"{steps} steps for the rest" in said
    took = first["report_card"]["build"]["seconds"]["synthesize"]
    assert steps == max(1, int((300 - 40 - took - 60) / 30))  # 40 for the calibration
    # In another process, on a machine that is slower by now, and examined in another way.
    monkeypatch.setattr("workflows.building.machine_rates._MEASURED", {})
    monkeypatch.setattr("workflows.building.machine_rates.calibrate", lambda *of: Rates(5.0, 300.0, 0.5, 20.0))
    keep(settings, Rates(5.0, 300.0, 0.5, 20.0))
    fewer = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"max_answer_tokens": 2})})
    again = build(arguments[0], "timed", fewer, *arguments[3:])
    assert again["version"] == first["version"]
    assert len(list(work.glob("synthesize-*"))) == len(list(work.glob("train-*"))) == 1


def test_turns_that_a_pack_shares_are_not_counted_in_the_plan(settings, corpus_file, tiny_base_model):
    short = settings.synthesize.model_copy(update={"families": {"anchored": 1.0}})
    rates = calibrate(load_corpus(str(corpus_file)), settings.model_copy(update={"synthesize": short}))
    shared = tiny_base_model.template.conversation_ids(example_messages(), generation_prompt=False)
    assert 5 < rates.tokens < len(shared)


def test_mistakes_are_named_before_anything_begins(settings, corpus_file, tmp_path):
    def attempt(name="lights", questions=None, **update):
        changed = settings.model_copy(update=update)
        build(str(corpus_file), name, changed, str(tmp_path / "registry"), questions, str(tmp_path / "work"))

    with pytest.raises(UserError, match="Bad Name"):
        attempt(name="Bad Name")
    with pytest.raises(UserError, match="shorter than num_tokens"):
        attempt(train=settings.train.model_copy(update={"num_tokens": 4096}))
    with pytest.raises(UserError, match="budget"):
        attempt(budget="soon")
    with pytest.raises(UserError, match="leave --budget and --curriculum out"):
        attempt(budget="5m", train=settings.train.model_copy(update={"loss": "none"}))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        attempt(questions=str(tmp_path / "empty.jsonl"))
    assert not (tmp_path / "work").exists()
