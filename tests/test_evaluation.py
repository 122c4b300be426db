"""Metrics against hand values, intervals that cover, arms that are what they say, the card's shape."""

import json
from dataclasses import replace

import numpy as np
import pytest
import sacrebleu

from cartridges.config import EvaluateSettings
from cartridges.errors import UserError
from cartridges.evaluation import metrics
from cartridges.evaluation.bootstrap import interval, paired_interval
from cartridges.prompts import question_messages
from cartridges.records import Question

# ---------------------------------------------------------------- metrics


def test_squad_metrics_by_hand():
    assert metrics.normalize_squad("The  Cat's, a Hat!") == "cats hat"
    assert metrics.exact_match("The Vistula.", ["vistula", "river"]) == 1
    assert metrics.exact_match("Vistula River", ["Vistula"]) == 0
    assert metrics.f1("the old Vistula river", ["Vistula River", "x"]) == pytest.approx(0.8)
    assert metrics.f1("nothing", ["Vistula"]) == 0


@pytest.mark.parametrize("output,answer,expected", [
    ("The port is 17.", "17", 1), ("The port is 170", "17", 0), ("It is 1,700", "1", 0),
    ("It is 1.5", "1", 0), ("version 2.1", "1", 0), ("It is 1.", "1", 1), ("(17)", "17", 1),
    ("In Gdansk’s  harbour", "gdansk's HARBOUR", 1), ("southern France", "southern France,", 1),
    ("catalogue", "cat", 0), ("C++ it is", "C++", 1), ("", "x", 0), ("ＡＢＣ", "abc", 1), ("?", "?", 1),
])
def test_contains_whole_words(output, answer, expected):
    assert metrics.contains(output, [answer, "never this"]) == expected


def test_chrf_equals_sacrebleu():
    outputs = ["the cat sat on the mat", "", "x", "Kibis me yar", "übel 漢字", "same"]
    answers = [["the cat sat", "a dog"], ["word"], ["xy", "x"], ["At the mainland there are stones."],
               ["übel 漢字!"], ["same"]]
    stats = [metrics.chrf_statistics(o, a) for o, a in zip(outputs, answers, strict=True)]
    width = max(map(len, answers))
    streams = [[a[i] if i < len(a) else None for a in answers] for i in range(width)]
    assert float(metrics.chrf_score(sum(stats))) == pytest.approx(
        sacrebleu.corpus_chrf(outputs, streams).score)
    assert metrics.chrf_score(np.mean(stats, 0)) == pytest.approx(metrics.chrf_score(sum(stats)))
    for o, a, s in zip(outputs, answers, stats, strict=True):
        assert float(metrics.chrf_score(s)) == pytest.approx(sacrebleu.sentence_chrf(o, a).score)


# ---------------------------------------------------------------- bootstrap


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = interval(rng.random(60), 300, trial)
        assert found["low"] <= found["mean"] <= found["high"] and found["n"] == 60
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_paired_interval_is_narrow_where_questions_vary_and_zero_for_the_same():
    rng = np.random.default_rng(1)
    hard = rng.random(200) * 10
    better = hard + 0.1 + 0.01 * rng.standard_normal(200)
    found = paired_interval(better, hard, 500, 0)
    assert 0.09 < found["low"] < found["mean"] < found["high"] < 0.11
    same = paired_interval(hard, hard, 500, 0)
    assert same == {"mean": 0, "low": 0, "high": 0, "n": 200}
    assert interval(hard, 500, 3) == interval(hard, 500, 3)
    with pytest.raises(ValueError):
        paired_interval(hard, hard[:-1], 500, 0)


# ---------------------------------------------------------------- arms and the card, on a tiny model

TEXT = "\n\n".join(f"The toll of ship number {n} is {n * 37} crowns, paid at gate {n}." for n in range(12))
QUESTIONS = tuple(Question(f"q{n}", f"What is the toll of ship number {n}?",
                           (str(n * 37), f"{n * 37} crowns")) for n in range(2, 8)) + (
    Question("mc", "Which gate?", ("gate 2",), ("gate 1", "gate 2", "gate 3"), 1),)
QUICK = EvaluateSettings(max_answer_tokens=4, bootstrap_samples=100)


@pytest.fixture(scope="module")
def engine(tiny_base_model):
    from cartridges.engines.transformers import TransformersEngine

    return TransformersEngine(tiny_base_model)


@pytest.fixture(scope="module")
def subject(tiny_base_model, engine):
    from cartridges.evaluation.arms import decoy_cartridge
    from cartridges.evaluation.report_card import Subject

    return Subject("tolls", decoy_cartridge(tiny_base_model, 40), "c", "f" * 32,
                   len(tiny_base_model.tokenizer.encode(TEXT)), TEXT, "0" * 16)


@pytest.fixture(scope="module")
def report(engine, tiny_base_model, subject):
    from cartridges.evaluation.report_card import report_card

    seen = []
    made = report_card(engine, tiny_base_model, subject, QUESTIONS, QUICK, 0,
                       build={"seconds": {"train": 1.0}}, progress=lambda *args: seen.append(args))
    done, totals, labels = zip(*seen, strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[0] == totals[-1]
    assert set(labels) == set(QUICK.arms)
    return made


def test_card_has_the_contract_s_shape(report, subject):
    card = report.card
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert card["corpus"]["fingerprint"] == "f" * 32 and card["corpus"]["tokens"] == subject.corpus_tokens
    assert card["cartridge"]["num_tokens"] == subject.cartridge.cartridge.num_tokens
    assert card["cartridge"]["compression_ratio"] == subject.corpus_tokens / card["cartridge"]["num_tokens"]
    assert set(card["arms"]) == set(QUICK.arms)
    for arm in card["arms"].values():
        assert arm["kv_bytes"] == arm["num_tokens"] * 2 * 2 * 2 * 16 * 4
        for metric in ("contains", "exact_match", "f1", "chrf"):
            assert arm["metrics"][metric]["n"] == 6, "multiple choice is judged by likelihood"
        assert arm["metrics"]["nll_per_token"]["n"] == 7
        assert arm["metrics"]["choice_accuracy"]["n"] == 7
        assert all(set(figure) == {"mean", "low", "high", "n"} for figure in arm["metrics"].values())
    assert set(card["paired"]) == {f"cartridge-{arm}" for arm in QUICK.arms if arm != "cartridge"}
    pair = card["paired"]["cartridge-closed_book"]["nll_per_token"]
    means = {arm: card["arms"][arm]["metrics"]["nll_per_token"]["mean"] for arm in card["arms"]}
    assert pair["mean"] == pytest.approx(means["cartridge"] - means["closed_book"])
    assert card["build"] == {"seconds": {"train": 1.0}} and card["questions"]["source"] == "user"
    assert len(report.rows) == len(QUICK.arms) * len(QUESTIONS)


def test_exact_kv_equals_full_context_and_the_same_cartridge_differs_by_nothing(report):
    controls = report.card["controls"]
    assert controls["exact_kv_same_outputs"] == 1 and controls["exact_kv_max_nll_gap"] < 1e-3
    # The subject is the decoy, so the wrong cartridge is the same one: paired differences are zero.
    assert all(figure["mean"] == figure["low"] == figure["high"] == 0
               for figure in report.card["paired"]["cartridge-wrong_cartridge"].values())


def test_gold_likelihood_is_that_of_the_answer_s_tokens(report, tiny_base_model):
    import torch

    template, model = tiny_base_model.template, tiny_base_model.model
    row = next(row for row in report.rows if row["arm"] == "full_context" and row["question_id"] == "q3")
    answer = tiny_base_model.tokenizer.encode("111", add_special_tokens=False)
    prompt = template.system_ids(TEXT) + template.conversation_ids(question_messages(row["question"]))
    logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = -np.mean([float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)])
    assert row["nll_per_token"] == pytest.approx(expected, abs=1e-3)
    assert row["candidates"][0] == "111"


def test_distractors_are_distinct_and_stable():
    from cartridges.evaluation.asking import wrong_options

    questions = [Question(f"q{n}", "?", (answer,)) for n, answer in
                 enumerate(["1", "17", "The Bear", "bear", "42", "8", "93", "5"])]
    for question in questions:
        drawn = wrong_options(question, questions, 0)
        assert len(drawn) == 3 and drawn == wrong_options(question, questions, 0)
        folded = [metrics.normalize_squad(text) for text in (*question.answers, *drawn)]
        assert not any(a.startswith(b) for a in folded for b in folded if a is not b)
    assert {wrong_options(questions[6], questions, seed) for seed in range(5)} != {
        wrong_options(questions[6], questions, 0)}
    assert wrong_options(questions[0], questions[:4], 0) == ()


def test_questions_are_drawn_by_seed_in_their_order(tiny_base_model):
    from cartridges.evaluation.asking import plan_items

    drawn = plan_items(QUESTIONS, tiny_base_model.template, 5, max_questions=3)
    ids = [item.question.question_id for item in drawn]
    assert len(ids) == 3 and ids == [q.question_id for q in QUESTIONS if q.question_id in ids]
    everything = plan_items(QUESTIONS, tiny_base_model.template, 5)
    assert all(item in everything for item in drawn)


def test_text_within_fills_the_room_and_is_a_beginning(tiny_base_model):
    template = tiny_base_model.template
    overhead = len(template.system_ids(""))
    for room in (1, overhead, overhead + 1, overhead + 20, 10_000):
        text = template.cut(TEXT + " 漢字😀", room)
        assert (TEXT + " 漢字😀").startswith(text)
        assert len(template.system_ids(text)) <= max(room, overhead)
        if overhead < room < 1000:
            assert len(template.system_ids(text)) >= room - 1


def test_corpus_beyond_the_window_is_cut_and_said(engine, tiny_base_model, subject):
    from cartridges.evaluation.report_card import report_card

    identity = replace(tiny_base_model.identity, max_position_embeddings=260)
    small = replace(tiny_base_model, identity=identity)
    arms = QUICK.model_copy(update={"arms": ("full_context", "exact_kv", "cartridge")})
    card = report_card(engine, small, subject, QUESTIONS[:2], arms, 0).card
    cut = card["arms"]["full_context"]
    assert cut["truncated_to_window"] == card["arms"]["exact_kv"]["truncated_to_window"] >= cut["num_tokens"]
    assert cut["num_tokens"] < len(tiny_base_model.template.system_ids(TEXT))
    assert any("window" in note for note in card["notes"])
    tiny = replace(tiny_base_model, identity=replace(identity, max_position_embeddings=100))
    with pytest.raises(UserError, match="leaves no room"):
        report_card(engine, tiny, subject, QUESTIONS, arms, 0)


def test_what_cannot_be_asked_is_refused(engine, tiny_base_model, subject):
    from cartridges.evaluation.report_card import report_card

    with pytest.raises(UserError, match="no questions"):
        report_card(engine, tiny_base_model, subject, (), QUICK, 0)
    with pytest.raises(UserError, match="--corpus"):
        report_card(engine, tiny_base_model, replace(subject, corpus_text=None), QUESTIONS, QUICK, 0)


# ---------------------------------------------------------------- from the registry


@pytest.fixture
def published(tmp_path, tiny_base_model, subject):
    from cartridges import artifact
    from cartridges.corpus import load_corpus
    from cartridges.registry import Registry

    corpus_file = tmp_path / "rows.jsonl"
    asked = [{"id": q.question_id, "question": q.question, "answers": list(q.answers)}
             for q in QUESTIONS[:4]]
    rows = [{"corpus_id": "tolls", "text": TEXT, "questions": asked},
            {"corpus_id": "other", "text": "Other."}]
    corpus_file.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = load_corpus(str(corpus_file), "tolls")
    record = artifact.CorpusRecord(id="tolls", fingerprint=corpus.fingerprint, tokens=subject.corpus_tokens)
    artifact.save(tmp_path / "artifact", subject.cartridge.cartridge, model=tiny_base_model.identity,
                  corpus=record, settings={}, dtype="float32")
    version = Registry(tmp_path / "registry").publish("tolls", tmp_path / "artifact")
    return tmp_path, str(corpus_file), version


def test_evaluate_a_published_cartridge(published, tiny_model_dir):
    from cartridges.config import BuildSettings, ModelSettings
    from workflows.evaluation.evaluate import evaluate

    root, questions, version = published
    settings = BuildSettings(model=ModelSettings(name=str(tiny_model_dir), dtype="float32"), evaluate=QUICK)
    card = evaluate("tolls", str(root / "registry"), questions, None, settings, workdir=str(root / "work"))
    assert card["cartridge"]["version"] == version and not card["notes"]
    assert set(card["arms"]) == set(QUICK.arms)
    assert json.loads((root / "work/evaluate/report_card.json").read_text()) == card
    rows = (root / "work/evaluate/rows.jsonl").read_text().splitlines()
    assert len(rows) == len(QUICK.arms) * 4

    bare = root / "bare.jsonl"
    bare.write_text('{"question": "Who?", "answers": ["me"]}\n')
    other = root / "other.txt"
    other.write_text("Another text.")
    card = evaluate("tolls", str(root / "registry"), str(bare), None, settings, workdir=str(root / "w2"))
    assert set(card["arms"]) == {"closed_book", "cartridge", "wrong_cartridge"}
    assert "--corpus" in card["notes"][0]
    card = evaluate("tolls", str(root / "registry"), str(bare), str(other), settings, ("full_context",),
                    str(root / "w3"))
    assert "is not the one" in card["notes"][0] and set(card["arms"]) == {"full_context"}
    with pytest.raises(UserError, match="--corpus"):
        evaluate("tolls", str(root / "registry"), str(bare), None, settings, ("full_context",))


def test_an_explicit_model_is_taken_and_the_revision_kept(published):
    from cartridges.config import DEFAULT_MODEL, BuildSettings
    from cartridges.registry import Registry
    from cartridges.settings import load
    from workflows.evaluation.base_model import model_of

    root, *_ = published
    manifest = Registry(root / "registry").resolve("tolls").manifest
    commit = "0123456789abcdef" * 2 + "01234567"
    hub = manifest.model_copy(update={"model": manifest.model.model_copy(update={"name": "a/b", "revision": commit})})

    def chosen(of, *given):
        model = model_of(of, load(BuildSettings, None, list(given)).model)
        return model.name, model.revision, model.dtype

    assert chosen(hub) == ("a/b", commit, "auto")
    assert chosen(hub, "model.dtype=float32", "model.revision=v2") == ("a/b", "v2", "float32")
    assert chosen(hub, f"model.name={DEFAULT_MODEL}") == (DEFAULT_MODEL, None, "auto")
    assert manifest.model.revision == "local" and chosen(manifest) == (manifest.model.name, None, "auto")
