"""`full_context: true`: the answer with the corpus in the prompt, from the text the registry keeps."""

import asyncio
import tarfile

import openai
import pytest

from cartridges import artifact
from cartridges.config import BuildSettings
from cartridges.corpus_text import TEXT, keep_text
from cartridges.engines.base import Request, TextPrefix
from cartridges.errors import UserError
from cartridges.registry import Registry
from tests.serve_support import TEXTS, listening, make_service, publish, value_of
from workflows.serving.api import ChatRequest
from workflows.serving.errors import ApiError
from workflows.serving.factory import build_service

ASK = [{"role": "user", "content": "What is known?"}]
LONG = " ".join(f"Berth {n} of Quell holds {n * 3} boats." for n in range(900))


@pytest.fixture(scope="module")
def registry(base, tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("registry"))
    scratch = tmp_path_factory.mktemp("scratch")
    # The cartridges are of other texts: an answer from them would not be the corpus'.
    publish(base, registry, "harbour", TEXTS["orchard"], scratch, kept=TEXTS["harbour"])
    publish(base, registry, "long", TEXTS["orchard"] + " ", scratch, kept=LONG)
    publish(base, registry, "private", TEXTS["harbour"], scratch)
    return registry


@pytest.fixture(scope="module")
def service(base, engine, registry):
    return make_service(base, registry, engine)


@pytest.fixture(scope="module")
def client(service):
    with listening(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, model: str, **options):
    return client.chat.completions.create(model=model, messages=ASK, extra_body={"full_context": True},
                                          **{"max_tokens": 12} | options)


def direct(base, engine, text: str) -> str:
    async def run():
        ids = tuple(base.template.conversation_ids(ASK))
        return [event.text async for event in engine.stream(Request(ids, TextPrefix(text), max_tokens=12))]

    return "".join(asyncio.run(run()))


def test_a_window_that_is_set_for_vllm_is_the_planners(service, registry, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("workflows.serving.factory.wants_vllm", lambda engine, where: engine == "vllm")

    def plan(engine: str, question: str, **options):
        settings = BuildSettings.model_validate({"model": {"name": str(tiny_model_dir)}, "serve": {"engine": engine},
                                                 "vllm": {"max_model_len": 1024}})
        made = build_service(registry.root, settings, service.backend)
        body = {"model": "long", "messages": [{"role": "user", "content": question}], **options}
        return asyncio.run(made.plan(ChatRequest.model_validate(body)))

    (call,) = plan("vllm", "Who?").calls
    assert call.max_tokens < 1024
    whole = plan("vllm", "Who?", full_context=True, max_tokens=100)
    assert whole.context.truncated and whole.prompt_tokens + 100 <= 1024
    with pytest.raises(ApiError, match="window is 1024 tokens") as refused:
        plan("vllm", "a b c d " * 600)
    assert refused.value.code == "context_length_exceeded"
    assert plan("transformers", "a b c d " * 600).prompt_tokens > 1024


def test_the_corpus_is_in_the_prompt(client, base, engine, service):
    answer = ask(client, "harbour")
    assert answer.choices[0].message.content == direct(base, engine, TEXTS["harbour"])
    plain = client.chat.completions.create(model="harbour", messages=ASK, max_tokens=12)
    assert answer.choices[0].message.content != plain.choices[0].message.content
    prefix, prompt = base.template.system_ids(TEXTS["harbour"]), base.template.conversation_ids(ASK)
    assert answer.usage.prompt_tokens == len(prefix) + len(prompt)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.context["kind"] == "full_context" and answer.context["truncated"] is False
    assert answer.context["tokens"] == len(prefix)
    # 2 (keys, values) * 2 layers * 2 heads * 16 * 2 bytes a token.
    assert answer.context["kv_bytes"] == 256 * answer.usage.prompt_tokens
    assert plain.context["kind"] == "cartridge"
    assert value_of(service.metrics, "cartridges_ttft_seconds_count", model="harbour:full_context") == 1


def test_a_stream_says_so_too(client):
    whole = ask(client, "harbour")
    chunks = list(ask(client, "harbour", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].context == chunks[-1].context == whole.context
    assert chunks[-1].usage == whole.usage
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


def test_a_corpus_longer_than_the_window_is_cut_and_says_so(client, base, engine):
    answer = ask(client, "long")
    assert answer.context["truncated"] is True
    window, room = base.identity.max_position_embeddings, len(base.template.conversation_ids(ASK)) + 12
    assert window - room - 300 < answer.context["tokens"] <= window - room
    kept = base.template.cut(LONG, answer.context["tokens"])
    assert LONG.startswith(kept) and len(base.template.system_ids(kept)) == answer.context["tokens"]
    assert answer.choices[0].message.content == direct(base, engine, kept)
    # Without max_tokens there is room for an answer.
    unlimited = ask(client, "long", max_tokens=None, stop=[" "])
    assert unlimited.context["truncated"] and unlimited.usage.completion_tokens >= 1


@pytest.mark.parametrize(("model", "message"), [
    ("private", "does not hold the corpus text of private"), ("base", "the base model has no corpus")])
def test_without_a_text_it_is_refused(client, model, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        ask(client, model)
    assert refused.value.body["code"] == "corpus_not_available"


def test_it_can_be_switched_off(base, engine, registry):
    with listening(make_service(base, registry, engine, full_context=False)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            with pytest.raises(openai.BadRequestError, match="switched off"):
                ask(client, "harbour")


def test_a_damaged_text_is_refused(base, engine, tmp_path):
    registry = Registry(tmp_path / "registry")
    version = publish(base, registry, "harbour", TEXTS["harbour"], tmp_path, kept="The toll is 41.")
    (tmp_path / "registry" / "harbour" / version / TEXT).write_text("The toll is 14.")
    with listening(make_service(base, registry, engine)) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.ConflictError, match="damaged"):
                ask(client, "harbour")


def test_the_text_is_no_part_of_the_version_and_leaves_with_the_newest_publish(base, tmp_path):
    registry = Registry(tmp_path / "registry")
    kept = publish(base, registry, "harbour", TEXTS["harbour"], tmp_path, kept="The toll is 41.")
    directory = tmp_path / "registry" / "harbour" / kept
    assert registry.corpus_text(registry.resolve("harbour")) == "The toll is 41."
    assert publish(base, registry, "harbour", TEXTS["harbour"], tmp_path) == kept
    assert registry.corpus_text(registry.resolve("harbour")) is None
    assert not (directory / TEXT).exists()


def test_an_export_never_holds_the_text(base, tmp_path):
    registry = Registry(tmp_path / "registry")
    version = publish(base, registry, "harbour", TEXTS["harbour"], tmp_path, kept="The toll is 41.")
    registry.export("harbour", tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert not [name for name in tar.getnames() if TEXT in name]
    there = Registry(tmp_path / "other")
    assert there.import_(tmp_path / "out.tar").version == version
    assert there.corpus_text(there.resolve("harbour")) is None


def test_a_text_that_changed_before_publishing_is_refused(base, tmp_path):
    registry = Registry(tmp_path / "registry")
    directory = tmp_path / "registry" / "harbour" / publish(base, registry, "harbour", "A.", tmp_path, kept="B.")
    keep_text(directory, "C.")
    (directory / TEXT).write_text("D.")
    with pytest.raises(UserError, match="damaged"):
        Registry(tmp_path / "other").publish("harbour", directory)
    assert artifact.read_manifest(directory).corpus_text is not None
