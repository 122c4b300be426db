"""What settings are worth: the same questions, asked of cartridges that differ in what --vary says."""

import io
import json

import pytest

import workflows.building.ablate
from cartridges.errors import NonFiniteLoss
from tests.test_build import EVALUATE, FAMILIES
from tests.test_synthesize import CORPUS, tiny_settings
from workflows.building.budget import Rates
from workflows.building.build import Made
from workflows.cli import main
from workflows.cli.commands.ablate import print_ablation
from workflows.training.draft import draft


@pytest.fixture
def ablate(tiny_model_dir, tmp_path, monkeypatch, capfd):
    """Runs the command on a small corpus with three questions: `(exit code, JSON result or None, stderr)`."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("CARTRIDGES_HOME", str(tmp_path / "home"))
    (tmp_path / "corpus.txt").write_text(CORPUS)
    (tmp_path / "questions.jsonl").write_text(json.dumps({"corpus_id": "lights", "questions": [
        {"question": f"How many {what}?", "answers": [str(n)]} for n, what in enumerate(("bells", "boats", "lamps"))]}))
    made = tiny_settings(tiny_model_dir, num_conversations=64, batch_size=16, families=FAMILIES)
    config = {**made.model_dump(mode="json", include={"model", "synthesize"}), "evaluate": EVALUATE, "train": {
        "num_tokens": 32, "row_tokens": 64, "pack_tokens": 256, "steps": 2, "loss": "none", "init": "prefix"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))

    def run(*varied: str, questions: bool = True):
        asked = ["--questions", str(tmp_path / "questions.jsonl")] if questions else []
        code = main(["ablate", str(tmp_path / "corpus.txt"), "--config", str(tmp_path / "config.yaml"), "--json",
                     "--workdir", str(tmp_path / "work"), "--registry", str(tmp_path / "registry"), *asked,
                     *(word for text in varied for word in ("--vary", text))])
        told = capfd.readouterr()
        return code, json.loads(told.out) if told.out else None, told.err

    return run


def test_variations_are_paired_with_what_was_given_and_one_that_fails_is_listed(ablate, tmp_path):
    varied = ("train.init=random", "train.init=random; train.num_tokens=48", "train.num_tokens=3", "seed=5")
    code, result, _ = ablate(*varied)
    assert code == 1 and [one["label"] for one in result["failed"]] == ["train.num_tokens=3"]
    given, *others = result["variations"]
    assert [one["label"] for one in others] == [varied[0], varied[1], varied[3]]
    assert given["label"] == "as given" and "paired" not in given
    assert result["full_context"].keys() == given["metrics"].keys()
    for one in others:
        nll, difference = one["metrics"]["nll_per_token"], one["paired"]["nll_per_token"]
        assert difference["mean"] == pytest.approx(nll["mean"] - given["metrics"]["nll_per_token"]["mean"])
        assert nll["n"] == difference["n"] == 3
    assert others[0]["paired"]["nll_per_token"]["mean"] != 0
    # The prefix is no matter of chance, and the questions are asked by the given seed: the very same figures.
    assert others[2]["metrics"] == given["metrics"]
    assert json.loads((tmp_path / "work" / "ablation.json").read_text()) == result
    assert not (tmp_path / "registry").exists()
    print_ablation(result, told := io.StringIO())
    assert all(f"\n{name}  " in told.getvalue() for name in ("as given", "train.init=random", "[2]", "seed=5"))
    assert f"[2] is {varied[1]}\n{varied[2]}: not built: " in told.getvalue()
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("cartridge.safetensors")}
    again = ablate(*varied)[1]
    assert [one["metrics"] for one in again["variations"]] == [one["metrics"] for one in result["variations"]]
    assert made == {file: file.stat().st_mtime_ns for file in made}


def test_mistakes_are_named_before_anything_is_made(ablate, tmp_path):
    for varied, message in (((), "nothing to compare"), (("train.init=prefix",), "changes nothing"),
                            (("train.nit=prefix",), "train.nit"), (("evaluate.max_questions=1",), "the same for all"),
                            (("train.init=random", "train.num_tokens=9999"), "shorter than num_tokens=9999"),
                            (("train.init=random", "train.init=random;"), "given twice"),
                            (("serve.port=1",), "changes nothing"), (("model.name=other",), "another model"),
                            (("train.loss=next_token; budget=soon",), "budget 'soon' is neither a time nor a count")):
        code, result, said = ablate(*varied)
        assert (code, result) == (2, None) and message in said and len(said.splitlines()) == 1
    assert "has no questions" in ablate("train.init=random", questions=False)[2]
    config = json.loads((tmp_path / "config.yaml").read_text())
    config["evaluate"]["arms"] = ["closed_book"]
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert "leaves the cartridge out" in ablate("train.init=random")[2]
    assert not (tmp_path / "work").exists()


def test_one_that_diverges_costs_no_other(ablate, monkeypatch):
    def make_or_not(job, really=workflows.building.ablate.make):
        if job.settings.seed == 1:
            raise NonFiniteLoss("the gradient became nan at step 7")
        return really(job)

    monkeypatch.setattr("workflows.building.ablate.make", make_or_not)
    code, result, _ = ablate("seed=1", "seed=2")
    assert code == 1 and [one["label"] for one in result["variations"]] == ["as given", "seed=2"]
    assert result["failed"] == [{"label": "seed=1", "error": "the gradient became nan at step 7"}]


def test_variations_of_training_have_the_conversations_that_a_budget_came_to(ablate, tmp_path, monkeypatch):
    """Whatever a plan of their own would be: cartridges of different sizes have rates of their own."""
    config = json.loads((tmp_path / "config.yaml").read_text())
    config |= {"budget": "9m", "train": config["train"] | {"loss": "distillation", "steps": 0}}
    config["synthesize"]["num_conversations"] = 0
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    planned = []

    def make_draft(job):  # how many conversations there would be, without making them
        planned.append(job.settings.synthesize.num_conversations)
        return Made(None, *draft(job.loaded, job.settings, job.work))

    monkeypatch.setattr("workflows.building.ablate.make", make_draft)
    monkeypatch.setattr("workflows.building.machine_rates.calibrate", lambda corpus, settings: Rates(
        0.1, settings.train.num_tokens / 32, 0.9, 30.0))
    code, _, said = ablate("train.num_tokens=64", "train.num_tokens=64; synthesize.topk=2")
    assert code == 0, said
    assert planned[0] == planned[1] > planned[2] > 0


@pytest.mark.slow
def test_trainings_of_the_same_conversations_share_them(ablate, tmp_path):
    code, result, said = ablate("train.loss=distillation", "train.loss=next_token")
    assert code == 0, said
    assert [one["steps"] for one in result["variations"]] == [0, 2, 2]
    assert result["variations"][1]["kept"] == result["variations"][2]["kept"] > 0
    assert len(list((tmp_path / "work").glob("synthesize-*"))) == 1
