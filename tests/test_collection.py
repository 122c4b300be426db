"""A collection: a cartridge for each corpus, as if each had been trained alone."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cartridges import artifact
from cartridges.artifact import CorpusRecord
from cartridges.collection import Part, names, parts
from cartridges.config import BuildSettings
from cartridges.distill.course import Course
from cartridges.distill.initialize import initialize
from cartridges.distill.student import Student
from cartridges.distill.trainer import TorchStepper, Trainer
from cartridges.errors import UserError
from cartridges.registry import Registry, check_name
from cartridges.selfstudy.held_out import split
from cartridges.selfstudy.storage import load_conversations
from tests.test_build import EVALUATE, FAMILIES
from tests.test_synthesize import CORPUS, in_a_process, tiny_settings, wait_for
from workflows.building.collection import build_each
from workflows.cli.commands.build import print_collection
from workflows.training.cohort import waves, with_wave_distractors
from workflows.training.records import Member, TrainingInputs

TRAIN = {"num_tokens": 32, "row_tokens": 64, "pack_tokens": 256, "steps": 6, "threads_per_worker": 1,
         "checkpoint_every": 2, "held_out": 4}
TEXTS = {"keepers/North": CORPUS, "keepers/South": CORPUS.replace("lighthouse", "harbour"),
         "keepers/West": CORPUS + "\n\n" + CORPUS.replace("lighthouse", "mill"), "keepers/East": CORPUS}


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "keepers.jsonl"
    asked = [{"question": f"How many {what}?", "answers": [str(n)]} for n, what in enumerate(("bells", "boats"))]
    file.write_text("".join(json.dumps({"corpus_id": name, "text": text, "questions": asked}) + "\n"
                            for name, text in TEXTS.items()))
    return file


@pytest.fixture
def settings(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("CARTRIDGES_HOME", str(tmp_path / "home"))
    base = tiny_settings(tiny_model_dir, num_conversations=48, batch_size=16, families=FAMILIES)
    return BuildSettings.model_validate({**base.model_dump(), "train": TRAIN, "evaluate": EVALUATE,
                                         "cohort": {"active": 2}})


def test_a_collection_is_rows_by_id_or_documents_by_path(rows, tmp_path):
    assert [part.corpus_id for part in parts(str(rows))] == list(TEXTS)
    assert [part.corpus_id for part in parts(str(rows), "*/[SW]*")] == ["keepers/South", "keepers/West"]
    (tmp_path / "docs" / "a").mkdir(parents=True)
    (tmp_path / "docs" / "a" / "One.md").write_text("One keeper.")
    (tmp_path / "docs" / "two.txt").write_text("Two keepers.")
    found = parts(str(tmp_path / "docs"))
    assert [part.corpus_id for part in found] == ["two.txt", "a/One.md"]
    rows.write_text("".join(json.dumps({"corpus_id": name, "text": "x"}) + "\n" for name in ("a1", "a[1]")))
    assert [part.corpus_id for part in parts(str(rows), "a[1]")] == ["a[1]"]
    for pattern, path, message in (("x/*", rows, "no corpus 'x/\\*'"),
                                   (None, tmp_path / "docs" / "two.txt", "one document"),
                                   (None, tmp_path / "nowhere", "does not exist")):
        with pytest.raises(UserError, match=message):
            parts(str(path), pattern)


@pytest.mark.parametrize("ids", [["keepers/North", "two.txt"], ["keepers/North", "keepers north"], ["契約", "条約"],
                                 ["---"], ["x" * 80, "x" * 80 + "y"]])
def test_names_are_those_of_a_registry_and_differ(ids):
    made = names("kb", [Part("rows.jsonl", one) for one in ids])
    assert len(set(made)) == len(ids) and made == names("kb", [Part("other", one) for one in ids])
    for name in made:
        check_name(name)
        assert name.startswith("kb") and name != "kb"
    assert ids != ["keepers/North", "two.txt"] or made == ["kb.keepers-north", "kb.two-txt"]


def test_mistakes_are_named_with_their_corpus_before_anything_begins(settings, rows, tmp_path):
    def attempt(message, **update):
        with pytest.raises(UserError, match=message):
            build_each(str(rows), "kb", settings.model_copy(update=update), str(tmp_path / "registry"), None,
                       str(tmp_path / "work"))

    attempt("keepers/North: the corpus is shorter", train=settings.train.model_copy(update={"num_tokens": 4096}))
    attempt("leave --loss none", train=settings.train.model_copy(update={"loss": "none"}))
    attempt("zero_stage=1", train=settings.train.model_copy(update={"zero_stage": 1}))
    assert not (tmp_path / "work").exists() and not (tmp_path / "registry").exists()


@pytest.mark.slow
def test_a_collection_is_built_as_each_alone_and_resumes(settings, rows, tmp_path, capsys, tiny_base_model,
                                                         monkeypatch, one_ray):
    """Killed in the second of two waves, gone on with other waves in mind, and one member fails the first time. The
    cartridges differ in length, and two corpora are the same text."""
    settings = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"compression": 8})})
    registry, work = tmp_path / "registry", tmp_path / "work"
    monkeypatch.chdir(tmp_path)
    arguments = (str(rows), "kb", settings, str(registry), None, "work")
    with in_a_process(_BUILD, *arguments[:2], settings.model_dump_json(), registry, work) as process:
        wait_for(lambda: len(list(work.glob("kb.*/train-*/trained.json"))) == 2
                 and list(work.glob("cohort-*/work/run/checkpoint_*")), process)
    assert not list(work.glob("kb.*/train-*/train.json"))
    bad = next(work / name for name in ("kb.keepers-north", "kb.keepers-south", "kb.keepers-east")
               if not list((work / name).glob("train-*/trained.json")))
    (shard,) = bad.glob("synthesize-*/shards/*.parquet")
    good = shard.read_bytes()
    _spoil(shard)
    one_at_a_time = settings.model_copy(update={"cohort": settings.cohort.model_copy(update={"active": 1})})
    result = build_each(*arguments[:2], one_at_a_time, *arguments[3:])
    assert [one["name"] for one in result["failed"]] == [bad.name] and len(result["cartridges"]) == 3
    assert "lower train.optimizer.lr" in result["failed"][0]["error"]
    shard.write_bytes(good)
    before = {file: file.stat().st_mtime_ns for file in work.glob("kb.*/train-*/metrics.jsonl")
              if bad.name not in str(file)}
    result = build_each(*arguments)
    assert before == {file: file.stat().st_mtime_ns for file in before} and len(before) == 3
    made = {one["corpus_id"]: one for one in result["cartridges"]}
    assert result["failed"] == [] and list(made) == list(TEXTS)
    lengths = {name: one["report_card"]["cartridge"]["num_tokens"] for name, one in made.items()}
    assert lengths["keepers/West"] > lengths["keepers/North"] and not any(length % 32 for length in lengths.values())
    assert all(one["report_card"]["questions"]["asked"] == 2 for one in made.values())
    for name, one in made.items():
        (dataset,), (together,) = (list(work.glob(f"{one['name']}/{kind}-*")) for kind in ("synthesize", "train"))
        own = settings.train.model_copy(update={"num_tokens": lengths[name]})
        alone = _alone(tiny_base_model, own, settings.seed, TEXTS[name], load_conversations(dataset / "shards"))
        beside = artifact.load(together / "cartridge").cartridge.trainable_keys
        torch.testing.assert_close(alone, beside[-len(alone):], rtol=2e-2, atol=2e-2)
        assert len((together / "metrics.jsonl").read_text().splitlines()) == TRAIN["steps"]
    assert not list(work.glob("cohort-*/work")) and not list(work.glob("together-*"))
    again = build_each(*arguments)
    assert [one["version"] for one in again["cartridges"]] == [one["version"] for one in result["cartridges"]]
    assert set(Registry(registry).names()) == {one["name"] for one in made.values()} and len(made) == 4
    print_collection(result, sys.stderr)
    assert "published 4 cartridges" in capsys.readouterr().err


def _spoil(shard):
    """A teacher that is not a number."""
    table = pq.read_table(shard)
    column = table.schema.get_field_index("topk_logprobs")
    rows = [[[float("nan")] * len(position) for position in row] for row in table["topk_logprobs"].to_pylist()]
    field = table.schema.field(column)
    pq.write_table(table.set_column(column, field, pa.array(rows, field.type)), shard)


def test_company_changes_what_a_member_becomes(settings, tmp_path):
    def members(sizes, **train):
        own = settings.model_copy(update={"train": settings.train.model_copy(update=train)})
        inputs = TrainingInputs((), None, "c.txt", CorpusRecord(id="c", fingerprint="f", tokens=1), {})
        return [Member(tmp_path / str(i), f"f{i}", own, size, inputs) for i, size in enumerate(sizes)]

    found = with_wave_distractors(members([5, 9, 7]))
    assert waves(found) == [[1, 2], [0]]
    assert [member.inputs.partners for member in found] == [0, 1, 1] and found[0].fingerprint == "f0"
    assert found[1].fingerprint not in ("f1", found[2].fingerprint)
    assert found[1].fingerprint != with_wave_distractors(members([5, 9, 7], distractor_share=1.0))[1].fingerprint
    with pytest.raises(UserError, match="leave no room"):
        with_wave_distractors(members([5, 9], num_tokens=1 << 20))


def _alone(base, settings, seed, text, conversations):
    """The upper layers' keys of a cartridge trained in this process."""
    cartridge = initialize(base, text, settings, seed)
    kept, _ = split(conversations, settings.held_out, seed)
    Trainer(TorchStepper([Student(base.model, cartridge)], settings), [Course(kept, settings, seed)]).run()
    return cartridge.trainable_keys.detach()


_BUILD = """
import json, sys
from cartridges.config import BuildSettings
from workflows.building.collection import build_each
corpus, name, settings, registry, work = sys.argv[1:]
build_each(corpus, name, BuildSettings.model_validate(json.loads(settings)), registry, None, work)
"""
