"""`model: "auto"` and `fallback`: answers from the right corpus, and from its text when the cartridge is unsure."""

import math
import threading
from types import SimpleNamespace

import openai
import pytest

from cartridges.corpus_text import TEXT
from cartridges.engines.base import Request, TextPrefix
from cartridges.registry import Registry
from tests.serve_support import TEXTS, listening, load_stock, make_service, publish, value_of
from workflows.serving.catalog import Catalog
from workflows.serving.errors import ApiError
from workflows.serving.keys import add_key
from workflows.serving.passages import PassageIndex
from workflows.serving.search import CorpusSearch
from workflows.serving.uncertainty import entropy

PAGES = {"harbour": "\n\n".join([TEXTS["harbour"], *(f"Quay {n} takes {n * 7} barges." for n in range(60))]),
         "orchard": "\n\n".join([TEXTS["orchard"], *(f"Row {n} has {n * 5} plum trees." for n in range(60))])}


@pytest.fixture(scope="module")
def registry(base, tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    scratch = tmp_path_factory.mktemp("scratch")
    for name, text in PAGES.items():
        publish(base, registry, name, TEXTS[name], scratch, kept=text)
    publish(base, registry, "private", "The toll of the mountain pass is secret.", scratch)
    return registry


@pytest.fixture(scope="module")
def service(base, engine, registry):
    return make_service(base, registry, engine, retrieval_tokens=192)


@pytest.fixture(scope="module")
def client(service):
    with listening(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, model: str, question: str, **options):
    extra = {key: options.pop(key) for key in ("fallback", "fallback_entropy", "full_context") if key in options}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}],
                                          extra_body=extra, **{"max_tokens": 12} | options)


def text_of(answer) -> str:
    return answer.choices[0].message.content


@pytest.mark.parametrize(("question", "name"), [
    ("Who is the harbour master of Quell?", "harbour"), ("How many pear trees are grown?", "orchard"),
    ("What does quay 17 take?", "harbour")])
def test_auto_answers_from_the_corpus_that_the_question_is_about(client, question, name):
    answer = ask(client, "auto", question)
    assert answer.model == name
    assert text_of(answer) == text_of(ask(client, name, question))


def test_auto_looks_at_the_last_question_and_takes_the_base_model_for_what_is_in_no_corpus(client, service):
    messages = [{"role": "user", "content": "What does quay 17 take?"}, {"role": "assistant", "content": "Barges."},
                {"role": "user", "content": "And the pear trees?"}]
    assert client.chat.completions.create(model="auto", messages=messages, max_tokens=2).model == "orchard"
    nothing = ask(client, "auto", "Zyzzyva?")
    assert nothing.context["kind"] == "base" and nothing.model == service.identity.name
    assert client.completions.create(model="auto", prompt="The pear trees", max_tokens=2).model == "orchard"


def test_auto_never_names_a_corpus_that_the_key_may_not_use(base, engine, registry, tmp_path):
    keys = {corpora: add_key(tmp_path / "keys.yaml", "acme", corpora, 0, False)[1]
            for corpora in (("orchard",), ("private",), ("*",))}
    with listening(make_service(base, registry, engine, keys_file=str(tmp_path / "keys.yaml"))) as url:
        def asked(*corpora: str) -> str:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=keys[corpora], max_retries=0) as client:
                return ask(client, "auto", "The harbour master and his trees?").model

        assert (asked("*"), asked("orchard")) == ("harbour", "orchard")
        with pytest.raises(openai.BadRequestError, match="published with its corpus text"):
            asked("private")


def test_what_is_in_other_corpora_does_not_show(base):
    """Which of two allowed corpora is found does not change with what a hidden third one says."""
    def found(hidden: str) -> str:
        texts = {"ships": "merger papers", "trees": "ledger papers", "hidden": hidden}
        entries = [SimpleNamespace(name=name, version=hidden[:6]) for name in texts]
        search = CorpusSearch(lambda entry: texts[entry.name], lambda: entries, base.template)
        return search.which(lambda name: name != "hidden", "ledger or merger?").name

    assert found("nothing") == found("merger " * 50) == found("ledger " * 50)


def test_a_cartridge_of_another_model_is_not_found(base, engine, tiny_qwen3_dir, tmp_path):
    registry = Registry(tmp_path / "registry")
    publish(load_stock(tiny_qwen3_dir), registry, "a-harbour", TEXTS["harbour"], tmp_path, kept=PAGES["harbour"])
    publish(base, registry, "harbour", TEXTS["harbour"], tmp_path, kept=PAGES["harbour"])
    with listening(make_service(base, registry, engine)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            assert ask(client, "auto", "Who is the harbour master?").model == "harbour"


def test_what_was_read_at_the_start_is_not_read_for_the_first_question(base, engine, registry, monkeypatch):
    started = threading.Event()
    monkeypatch.setattr(CorpusSearch, "warm", lambda self: started.set())
    make_service(base, registry, engine)
    assert not started.wait(0.2)
    make_service(base, registry, engine, search_at_start=True)
    assert started.wait(60)
    monkeypatch.undo()
    entries, down = Catalog(registry, base.identity).searchable(), []

    def read(entry):
        assert not down
        return PAGES[entry.name]

    def listed():
        if down:
            raise OSError("unreachable")
        return entries

    search = CorpusSearch(read, listed, base.template)
    search.warm()
    down.append("now")
    assert search.which(lambda name: True, "Who is the harbour master?").name == "harbour"
    CorpusSearch(read, listed, base.template).warm()  # a service starts all the same


def test_a_text_that_could_not_be_read_is_found_later(base, registry, monkeypatch):
    monkeypatch.setattr("workflows.serving.search.FRESH_S", 0.0)
    entries, down = Catalog(registry, base.identity).searchable(), ["harbour"]

    def read(entry):
        if entry.name in down:
            raise ApiError(503, "unreachable")
        return PAGES[entry.name]

    def listed():
        if "list" in down:
            raise OSError("unreachable")
        return entries

    search, question = CorpusSearch(read, listed, base.template), "Who is the harbour master?"
    assert search.which(lambda name: True, question) is None
    down.clear()
    assert search.which(lambda name: True, question).name == "harbour"
    down.append("list")  # What was known goes on being found.
    assert search.which(lambda name: True, question).name == "harbour"
    with pytest.raises(ApiError) as refused:
        CorpusSearch(read, listed, base.template).which(lambda name: True, question)
    assert refused.value.status == 503


def test_a_sure_answer_stays_the_cartridges(client):
    question = "Who is the harbour master of Quell?"
    answer = ask(client, "harbour", question, fallback="retrieval", fallback_entropy=1000)
    plain = ask(client, "harbour", question)
    assert text_of(answer) == text_of(plain) and answer.usage == plain.usage
    assert answer.context["kind"] == "cartridge" and answer.context["fallback"] is False
    assert 0 < answer.context["entropy"] < math.log(49152)


def test_an_unsure_answer_comes_from_the_passages(client, service, base, engine):
    question = "Who is the harbour master of Quell?"
    before = value_of(service.metrics, "cartridges_fallbacks_total", model="harbour")
    answer = ask(client, "harbour", question, fallback="retrieval", fallback_entropy=0)
    context = answer.context
    assert context["kind"] == "retrieval" and context["fallback"] is True and context["entropy"] > 0
    assert context["tokens"] <= 192 < len(base.template.system_ids(PAGES["harbour"]))
    passages = service.planner.search.passages(
        service.catalog.resolve("harbour").entries, question, service.settings.retrieval_tokens)
    assert "Ida Brand" in passages
    assert text_of(answer) == from_text(base, engine, passages, question)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert value_of(service.metrics, "cartridges_fallbacks_total", model="harbour") == before + 1
    assert service.in_flight == 0


def from_text(base, engine, text: str, question: str) -> str:
    import asyncio

    ids = tuple(base.template.conversation_ids([{"role": "user", "content": question}]))

    async def run():
        return "".join([event.text async for event in engine.stream(Request(ids, TextPrefix(text), max_tokens=12))])

    return asyncio.run(run())


def test_an_unsure_answer_comes_from_the_whole_text(client, base, engine):
    whole = ask(client, "harbour", "Who?", full_context=True)
    answer = ask(client, "harbour", "Who?", fallback="full_context", fallback_entropy=0)
    assert text_of(answer) == text_of(whole) and answer.context["kind"] == "full_context"


@pytest.mark.parametrize("threshold", [0, 1000])
def test_a_stream_holds_back_until_it_is_known_who_answers(client, threshold):
    options = {"fallback": "retrieval", "fallback_entropy": threshold}
    whole = ask(client, "harbour", "Who is the harbour master of Quell?", **options)
    chunks = list(ask(client, "harbour", "Who is the harbour master of Quell?", stream=True, **options))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert chunks[0].context == whole.context


def test_auto_and_fallback_go_together(client):
    answer = ask(client, "auto", "How many pear trees?", fallback="retrieval", fallback_entropy=0)
    assert answer.model == "orchard" and answer.context["kind"] == "retrieval"
    assert ask(client, "auto", "Zyzzyva?", fallback="retrieval").context["kind"] == "base"


def test_a_full_service_does_not_refuse_what_it_has_accepted(base, engine, registry):
    """A request that falls back keeps its slot meanwhile, also when its first answer has ended."""
    service = make_service(base, registry, engine, retrieval_tokens=192)
    fall_back, seen = service.planner.fall_back, []
    service.planner.fall_back = lambda *arguments: (seen.append(service.in_flight), fall_back(*arguments))[1]
    with listening(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = ask(client, "harbour", "Who is the harbour master?", max_tokens=4, fallback="retrieval",
                     fallback_entropy=0)
        assert answer.context["kind"] == "retrieval"
    assert seen == [1] and service.in_flight == 0
    for name in ("in_flight", "queued"):
        for model in ("harbour", "harbour:retrieval"):
            assert value_of(service.metrics, f"cartridges_{name}", model=model) == 0
    # The answer that was thrown away is in no latency.
    assert value_of(service.metrics, "cartridges_request_seconds_count", model="harbour") == 0
    assert value_of(service.metrics, "cartridges_request_seconds_count", model="harbour:retrieval") == 1


def test_where_the_text_cannot_be_read_the_cartridge_answers(base, engine, tmp_path):
    registry = Registry(tmp_path / "registry")
    version = publish(base, registry, "harbour", TEXTS["harbour"], tmp_path, kept=PAGES["harbour"])
    (tmp_path / "registry" / "harbour" / version / TEXT).write_text("damaged")
    with listening(make_service(base, registry, engine)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = ask(client, "harbour", "Who is the master?", fallback="retrieval", fallback_entropy=0)
            assert answer.context["kind"] == "cartridge" and answer.context["fallback"] is False
            assert text_of(answer) == text_of(ask(client, "harbour", "Who is the master?"))


def test_the_kv_of_passages_is_not_kept(client, engine):
    """Kept, it would tell by its speed what another has asked."""
    ask(client, "harbour", "Who is the harbour master of Quell?", fallback="retrieval", fallback_entropy=0)
    before = engine.prefixes.num_bytes
    ask(client, "harbour", "What does quay 33 take, and quay 44?", fallback="retrieval", fallback_entropy=0)
    assert engine.prefixes.num_bytes == before


def test_a_prompt_that_is_too_long_is_refused_before_it_is_searched_for(client, service, monkeypatch):
    monkeypatch.setattr(service.planner, "search", None)
    with pytest.raises(openai.BadRequestError, match="the prompt has"):
        ask(client, "auto", "quay " * service.identity.max_position_embeddings)


def test_where_nothing_is_found_the_cartridge_answers(client):
    answer = ask(client, "harbour", "Zyzzyva?", fallback="retrieval", fallback_entropy=0)
    assert answer.context["kind"] == "cartridge" and answer.context["fallback"] is False
    assert text_of(answer) == text_of(ask(client, "harbour", "Zyzzyva?"))


def test_logprobs_are_only_those_that_were_asked_for(client):
    sure = {"fallback": "retrieval", "fallback_entropy": 1000}
    answer = ask(client, "harbour", "Who?", logprobs=True, top_logprobs=2, **sure)
    assert {len(token.top_logprobs) for token in answer.choices[0].logprobs.content} == {2}
    assert ask(client, "harbour", "Who?", **sure).choices[0].logprobs is None


@pytest.mark.parametrize(("model", "options", "message"), [
    ("private", {"fallback": "retrieval"}, "no corpus text of private"),
    ("base", {"fallback": "retrieval"}, "no corpus text of the base model"),
    ("harbour", {"fallback": "retrieval", "n": 2}, "n=1"),
    ("harbour", {"fallback_entropy": 1.0}, "goes with fallback"),
    ("harbour", {"fallback": "retrieval", "full_context": True}, "leave fallback out"),
    ("harbour", {"fallback": "magic"}, "retrieval")])
def test_what_makes_no_sense_is_refused(client, model, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, model, "Who?", **options)


def test_entropy_counts_what_is_outside_the_top_as_one_more_outcome():
    assert entropy([0.0]) == 0
    assert entropy([math.log(0.5), math.log(0.5)]) == pytest.approx(math.log(2))
    assert entropy([math.log(0.25), math.log(0.25)]) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(2))


def test_passages_are_ranked_by_shared_words_in_any_script():
    index = PassageIndex([["The toll is 41 crowns.", "Ida is master."], ["港の税は四十一", "1730 trees"], [""]])
    found = [(passage.owner, passage.index) for passage in index.best("What is the toll?", 5)]
    assert found == [(0, 0)]
    assert [(passage.owner, passage.index) for passage in index.best("税", 5)] == [(1, 0)]
    assert index.best("?", 5) == [] == PassageIndex([]).best("toll", 5)
