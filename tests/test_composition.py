"""Several cartridges in one request, allowed where a collapse test has passed."""

import asyncio
import json
import sys
from pathlib import Path

import openai
import pytest

from cartridges.compose import compose
from cartridges.config import BuildSettings, ModelSettings
from cartridges.engines.base import CartridgePrefix, Request
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import UserError
from cartridges.models import load_base_model, rope_frequencies
from cartridges.registry import Registry
from tests.serve_support import TEXTS, exact_cartridge, listening, load_stock, make_service, publish
from workflows.cli.commands.compose_test import print_composition
from workflows.evaluation import answer_cache
from workflows.evaluation.composition import compose_test

ASK = [{"role": "user", "content": "What is known?"}]
MORE = TEXTS | {"mill": "The mill of Tarn grinds 12 sacks a day for Ove Lind."}


@pytest.fixture(scope="module")
def registry(base, tmp_path_factory):
    """`harbour` and `orchard` are tested with one partner, `mill` with none."""
    registry, scratch = Registry(tmp_path_factory.mktemp("registry")), tmp_path_factory.mktemp("scratch")
    for name, text in MORE.items():
        publish(base, registry, name, text, scratch, kept=text)
    for name in TEXTS:
        registry.annotate(name, composition=1)
    return registry


@pytest.fixture(scope="module")
def client(base, engine, registry):
    with listening(make_service(base, registry, engine)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield client


def ask(client, model: str, **extra):
    return client.chat.completions.create(model=model, messages=ASK, max_tokens=12, extra_body=extra)


def test_two_cartridges_answer_as_their_composition(client, base, engine):
    parts = [exact_cartridge(base, TEXTS[name]) for name in TEXTS]
    composed = compose(parts, rope_frequencies(base.identity))

    async def direct():
        request = Request(tuple(base.template.conversation_ids(ASK)), CartridgePrefix(composed, "composed"), 12)
        return "".join([event.text async for event in engine.stream(request)])

    expected = asyncio.run(direct())
    answer = ask(client, "harbour+orchard")
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens_details.cached_tokens == composed.num_tokens
    assert answer.context["kind"] == "composition" and answer.context["tokens"] == composed.num_tokens
    assert answer.system_fingerprint.count("+") == 1
    alone = {ask(client, name).choices[0].message.content for name in TEXTS}
    assert expected not in alone
    listed = [ask(client, "base", cartridges=["harbour", "orchard"]),
              ask(client, "harbour", cartridges=["harbour@latest", "orchard"])]
    assert [one.choices[0].message.content for one in listed] == [expected] * 2


def test_what_was_not_tested_together_is_refused(client):
    for model, extra in [("harbour+mill", {}), ("harbour", {"cartridges": ["orchard", "mill"]})]:
        with pytest.raises(openai.BadRequestError, match="was tested with") as refused:
            ask(client, model, **extra)
        assert refused.value.body["code"] == "composition_not_tested"
    with pytest.raises(openai.NotFoundError, match="no model 'harbor'"):
        ask(client, "orchard+harbor")


def test_full_context_of_several_needs_no_test(client, base):
    answer = ask(client, "harbour+mill", full_context=True)
    both = base.template.system_ids(f"{MORE['harbour']}\n\n{MORE['mill']}")
    assert answer.context["kind"] == "full_context" and answer.context["tokens"] == len(both)


@pytest.fixture
def questions(base, registry, tmp_path):
    """What `harbour` answers by itself is the gold answer: alone it is right by construction."""
    prefix = CartridgePrefix(exact_cartridge(base, MORE["harbour"]), "harbour")
    asked = ["Who keeps it?", "How many?", "Where is it?"]
    ids = [tuple(base.template.conversation_ids([{"role": "user", "content": one}])) for one in asked]
    # A copy: the batch engine puts its own attention into the model.
    copy = load_stock(base.model.name_or_path)
    told = TransformersEngine(copy).generate([Request(one, prefix, max_tokens=8) for one in ids])
    rows = [{"question": one, "answers": [answer.text.strip()]} for one, answer in zip(asked, told, strict=True)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run(registry, base, questions: str, share: float, partners=("orchard", "mill"), name="harbour"):
    settings = BuildSettings.model_validate({
        "model": {"name": base.model.name_or_path, "dtype": "float32"},
        "evaluate": {"composition_share": share, "max_answer_tokens": 8, "bootstrap_samples": 100}})
    return compose_test(name, partners, questions, registry.root, settings, f"{registry.root}-work")


def test_a_cartridge_that_collapses_is_not_recorded(base, registry, questions):
    before = registry.resolve("harbour").version
    result = run(registry, base, questions, share=0.9)
    assert result["composition"] == 0 and result["card"]["alone"]["accuracy"]["mean"] == 1
    (row,) = result["card"]["loaded"]
    assert row["loaded"] == 2 and not row["passed"]
    assert min(row[place]["accuracy_change"]["mean"] for place in ("first", "last")) < -0.1
    entry = registry.resolve("harbour")
    assert entry.version == before and entry.manifest.composition == 0
    assert entry.manifest.composition_card == result["card"]
    # The bar is a setting; with none to keep, the test passes with as many as were loaded.
    assert run(registry, base, questions, share=0.0)["composition"] == 1
    assert registry.resolve("harbour").manifest.composition == 1


def test_a_test_that_is_interrupted_asks_only_what_is_left(base, registry, questions, monkeypatch):
    undisturbed = run(registry, base, questions, share=0.9)
    asked, really = [], answer_cache.ask

    def ask_or_interrupt(*of):
        asked.append(of)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return really(*of)

    monkeypatch.setattr(answer_cache, "ask", ask_or_interrupt)
    registry.annotate("harbour", composition=7, composition_card=None)
    with pytest.raises(KeyboardInterrupt):
        run(registry, base, questions, share=0.9)
    assert registry.resolve("harbour").manifest.composition == 7
    # Closed book, alone, and two places beside another: four in all, two of which are there.
    assert run(registry, base, questions, share=0.9) == undisturbed
    assert len(asked) == 3 + 2 and not list(Path(f"{registry.root}-work").iterdir())
    assert registry.resolve("harbour").manifest.composition_card == undisturbed["card"]


def test_a_cartridge_that_knows_nothing_passes_nothing(base, registry, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "Who?", "answers": ["no such words at all"]}) + "\n")
    assert run(registry, base, str(file), share=0.0, partners=("mill",))["composition"] == 0
    registry.annotate("harbour", composition=1)


def test_a_pattern_tests_each_with_those_behind_it(base, questions, tiny_qwen3_dir, tmp_path, capsys):
    registry, scratch = Registry(tmp_path / "registry"), tmp_path / "scratch"
    scratch.mkdir()
    texts = {"kb.a": MORE["harbour"], "kb.b": MORE["orchard"], "kb.c": MORE["mill"], "other": "A bell of bronze."}
    for name, text in texts.items():
        publish(base, registry, name, text, scratch)
    ids = {name: registry.resolve(name).manifest.corpus.id for name in texts}
    assert len(set(ids.values())) == 4
    file = tmp_path / "by_id.jsonl"
    file.write_text("".join(json.dumps({"corpus_id": ids[name], "questions": [
        {"question": f"Who {what}?", "answers": ["nobody at all"]} for what in ("keeps it", "made it")[:count]]}) + "\n"
        for name, count in (("kb.a", 2), ("kb.b", 1), ("kb.c", 0))))
    result = run(registry, base, str(file), 0.5, partners=("kb.*",), name="kb.*")
    assert [one["name"] for one in result["cartridges"]] == ["kb.a", "kb.b"] and result["skipped"] == ["kb.c"]
    company = {one["name"]: [ref.split("@")[0] for ref in one["partners"]] for one in result["cartridges"]}
    assert company == {"kb.a": ["kb.b", "kb.c"], "kb.b": ["kb.c", "kb.a"]}
    # The card over all is of their questions together.
    assert result["card"]["questions"] == 3 and [row["loaded"] for row in result["card"]["loaded"]] == [2]
    mean = {one["name"]: one["card"]["alone"]["nll_per_token"]["mean"] for one in result["cartridges"]}
    assert result["card"]["alone"]["nll_per_token"]["mean"] == pytest.approx((2 * mean["kb.a"] + mean["kb.b"]) / 3)
    assert registry.resolve("kb.b").manifest.composition_card == result["cartridges"][1]["card"]
    assert registry.resolve("kb.c").manifest.composition_card is None
    print_composition(result, sys.stdout)
    assert "all 3 questions" in (said := capsys.readouterr().out) and "kb.c was not tested" in said
    named = run(registry, base, str(file), 0.5, partners=("kb.b", "kb.a"), name="kb.*")
    assert [[ref.split("@")[0] for ref in one["partners"]] for one in named["cartridges"]] == [["kb.b"], ["kb.a"]]
    qwen = load_base_model(ModelSettings(name=str(tiny_qwen3_dir), dtype="float32"))
    publish(qwen, registry, "qwen", "A bell of bronze.", scratch)
    with pytest.raises(UserError, match="has no corpus_id"):
        run(registry, base, questions, 0.5, partners=("kb.*",), name="kb.*")
    for wrong, message in (({"name": "nothing.*"}, "no cartridge in the registry"), ({"partners": ("x*",)}, "x\\*"),
                           ({"name": "kb.c*"}, "no questions about any"),
                           ({"name": "kb.a*", "partners": ("kb.a*",)}, "no other cartridge to load beside kb.a"),
                           ({"partners": ("kb.*", "qwen")}, "qwen: .*model weights differ")):
        with pytest.raises(UserError, match=message):
            run(registry, base, str(file), 0.5, **{"partners": ("kb.*",), "name": "kb.*"} | wrong)


def test_it_is_not_its_own_partner(base, registry, questions):
    with pytest.raises(UserError, match="own partner"):
        run(registry, base, questions, 0.5, partners=("harbour@latest",))
