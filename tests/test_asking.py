"""Another asking side: a second model beside the teacher, or one behind an OpenAI-compatible service."""

from dataclasses import dataclass

import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from cartridges.config import AskingSettings, BuildSettings
from cartridges.corpus import load_corpus
from cartridges.engines.base import Request, TextPrefix
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import UserError
from cartridges.records import Conversation
from cartridges.selfstudy.asker import Ask, as_question
from cartridges.selfstudy.endpoint_asker import EndpointAsker
from cartridges.selfstudy.plan import plan
from cartridges.selfstudy.seed_prompts import ASKING_EXAMPLES
from cartridges.selfstudy.synthesizer import Synthesizer
from cartridges.settings import load
from tests.serve_support import listening, listening_app, make_service
from tests.test_selfstudy import CHUNKS, settings
from tests.test_selfstudy_filters import UNUSABLE
from tests.test_synthesize import CORPUS, tiny_settings
from workflows.synthesis.dataset import dataset_fingerprint
from workflows.synthesis.failures import run_with_retry
from workflows.synthesis.open_synthesizer import check_generation, make_asker
from workflows.synthesis.synthesize import synthesize

TEXT = "The toll is 41 crowns a ship."
BY_HAND = {"families": {"question": 1, "anchored_asked": 1}, "asking_temperature": 0.0, "max_question_tokens": 8}


@pytest.fixture
def url(base, engine, registry):
    with listening(make_service(base, registry, engine)) as url:
        yield f"{url}/v1"


def asking(model_dir, **fields) -> BuildSettings:
    return tiny_settings(model_dir, **BY_HAND, asking=fields)


@dataclass
class Always:
    """An asker that gives the same for all."""

    answer: object

    def ask(self, asks):
        return [self.answer] * len(asks)


@dataclass
class Raising:
    """A synthesizer that does one thing."""

    act: object

    def run(self, tasks):
        return self.act()


def chat(url: str, **fields) -> str:
    client = openai.OpenAI(base_url=url, api_key="none")
    made = client.chat.completions.create(model="base", max_tokens=8, temperature=0, **fields)
    return made.choices[0].message.content.strip()


@pytest.mark.parametrize("written, finish_reason, question", [
    (" Who is it?\n", "length", "Who is it?"), ("Who is it", "stop", "Who is it?"), ("Who is", "length", "Who is"),
    ("Question: Who is it?", "length", "Who is it?"), ("**Question:** Who is it?", "length", "Who is it?"),
    ("Question one: who is it?", "length", "Question one: who is it?")])
def test_what_is_written_as_a_question(written, finish_reason, question):
    assert as_question(written, finish_reason) == question


def test_a_service_is_asked_with_the_chunk_in_sight(url, tiny_model_dir):
    asker = make_asker(asking(tiny_model_dir, endpoint=url, endpoint_model="base", concurrency=3))
    prompts = [f"Ask about number {number}." for number in range(5)]
    written = asker.ask([Ask(0, seed_prompt=prompt, text=TEXT) for prompt in prompts])
    for prompt, text in zip(prompts, written, strict=True):
        messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": prompt}]
        assert text.rstrip("?") == chat(url, messages=messages).rstrip("?")
    assert len(set(written)) > 1
    (continued,) = asker.ask([Ask(0, completion="Text: It is red.\nAnswer: red\nQuestion:")])
    made = openai.OpenAI(base_url=url, api_key="none").completions.create(
        model="base", prompt=ASKING_EXAMPLES + "Text: It is red.\nAnswer: red\nQuestion:", max_tokens=8, temperature=0,
        stop=["\n", "?"])
    assert continued.rstrip("?") == made.choices[0].text.strip().rstrip("?")


def test_what_another_model_asks_the_teacher_answers(tiny_base_model, tiny_model_dir, tiny_qwen3_dir):
    wanted = settings(count=6, families={"question": 1}, filters_off=(*UNUSABLE, "answer_in_question"))
    build = asking(tiny_model_dir, model={"name": str(tiny_qwen3_dir), "dtype": "float32"})
    build = build.model_copy(update={"synthesize": wanted.model_copy(update={"asking": build.synthesize.asking})})
    asker = make_asker(build)
    engine = TransformersEngine(tiny_base_model)
    chunks = {chunk.chunk_id: chunk for chunk in CHUNKS}
    tasks = plan(CHUNKS, wanted, 0)
    results = Synthesizer(engine, tiny_base_model.template, chunks, wanted, asker).run(tasks)
    alone = Synthesizer(engine, tiny_base_model.template, chunks, wanted).run(tasks)
    assert all(isinstance(result, Conversation) for result in results)
    for one, other in zip(results, alone, strict=True):
        question, answer = (message["content"] for message in one.messages[-2:])
        assert question != other.messages[-2]["content"]
        ids = tiny_base_model.template.conversation_ids([{"role": "user", "content": question}])
        (told,) = engine.generate([Request(tuple(ids), TextPrefix(chunks[one.chunk_id].text),
                                           max_tokens=wanted.max_answer_tokens)])
        assert answer == told.text


def test_a_service_that_cannot_be_used_is_named_before_anything_begins(url, tiny_model_dir):
    check_generation(asking(tiny_model_dir, endpoint=url, endpoint_model="base"))
    with pytest.raises(UserError, match="nobody.*endpoint_model"):
        check_generation(asking(tiny_model_dir, endpoint=url, endpoint_model="nobody"))
    with pytest.raises(UserError, match="127.0.0.1:9/v1: Connection error"):
        check_generation(asking(tiny_model_dir, endpoint="http://127.0.0.1:9/v1", endpoint_model="base"))
    with pytest.raises(UserError, match="synthesize.asking: give a model or an endpoint, not both$"):
        load(BuildSettings, None, ["synthesize.asking={endpoint: 'http://x', endpoint_model: m, model: {}}"])
    with pytest.raises(UserError, match="go together"):
        load(BuildSettings, None, ["synthesize.asking.endpoint=http://x"])
    with pytest.raises(UserError, match="must not hold a password"):
        load(BuildSettings, None, ["synthesize.asking={endpoint: 'https://a:b@x/v1', endpoint_model: m}"])
    with pytest.raises(UserError, match="did you mean name"):
        load(BuildSettings, None, ["synthesize.asking.model.nmae=x"])


def test_what_is_odd_costs_its_own_conversation_and_a_refused_key_the_run(tiny_base_model, tiny_model_dir,
                                                                          monkeypatch):
    base_engine = TransformersEngine(tiny_base_model)
    monkeypatch.setenv("THE_KEY", "sk-secret")
    answers = {"odd": (200, "<html>hello</html>"), "none": (200, {"choices": []}), "busy": (500, {"error": "busy"}),
               "key": (401, {"error": {"message": "wrong key sk-secret"}})}
    seen = []

    async def respond(request):
        seen.append(request.headers["authorization"])
        status, body = answers[(await request.json())["messages"][-1]["content"]]
        return HTMLResponse(body, status) if isinstance(body, str) else JSONResponse(body, status)

    app = Starlette(routes=[Route("/v1/chat/completions", respond, methods=["POST"])])
    with listening_app(app) as url:
        build = asking(tiny_model_dir, endpoint=f"{url}/v1", endpoint_model="m", api_key_env="THE_KEY")
        asker = EndpointAsker(build.synthesize, retries=0)
        made = asker.ask([Ask(0, seed_prompt=prompt) for prompt in ("odd", "none", "busy")])
        assert all(isinstance(one, Exception) for one in made)
        chunks = {chunk.chunk_id: chunk for chunk in CHUNKS}
        tasks = plan(CHUNKS, settings(count=4, families={"question": 1}), 0)
        failing = Synthesizer(base_engine, base_engine.base.template, chunks, build.synthesize, Always(made[0]))
        assert {result.reason.split(":")[0] for result in failing.run(tasks)} == {"error"}
        refused = run_with_retry(Raising(lambda: asker.ask([Ask(0, seed_prompt="key")])), tasks)
        assert len(refused) == 4 and all("AskingRefusedError" in result.reason for result in refused)
        assert all(result.reason.count("wrong key ***") == 1 for result in refused)
    assert set(seen) == {"Bearer sk-secret"} and len(seen) == 4


def test_who_asks_is_part_of_the_conversations_and_the_engine_is_not(tiny_model_dir, tiny_qwen3_dir, tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text(CORPUS)
    corpus, plain = load_corpus(str(file)), tiny_settings(tiny_model_dir)

    def fingerprint(**changed) -> str:
        wanted = plain.synthesize.model_copy(update=changed)
        return dataset_fingerprint(corpus, plain.model_copy(update={"synthesize": wanted}))

    usual = fingerprint()
    assert fingerprint(engine="transformers") == usual
    service = AskingSettings(endpoint="http://x/v1", endpoint_model="m")
    others = [fingerprint(asking=service), fingerprint(asking=AskingSettings.model_validate(
        {"model": {"name": str(tiny_qwen3_dir)}}))]
    assert len({usual, *others}) == 3
    assert fingerprint(asking=service.model_copy(update={"concurrency": 2, "api_key_env": "K"})) == others[0]


@pytest.mark.slow
def test_a_key_that_is_refused_on_the_way_is_one_line_and_the_run_goes_on(tiny_model_dir, tmp_path, monkeypatch,
                                                                          one_ray):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    asked, allowed = [], [1]

    async def respond(request):
        asked.append(await request.json())
        message = {"role": "assistant", "content": f"What is number {len(asked)}?"}
        if len(asked) > allowed[0]:
            return JSONResponse({"error": {"message": "this key has expired"}}, 401)
        return JSONResponse({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    file = tmp_path / "corpus.txt"
    file.write_text(CORPUS)
    app = Starlette(routes=[Route("/v1/chat/completions", respond, methods=["POST"])])
    with listening_app(app) as url:
        build = tiny_settings(tiny_model_dir, num_conversations=8, families={"question": 1}, filters_off=UNUSABLE,
                              max_answer_tokens=4, asking={"endpoint": f"{url}/v1", "endpoint_model": "m"})
        arguments = load_corpus(str(file)), str(tmp_path / "out"), build
        with pytest.raises(UserError, match=r"^synthesize.asking.endpoint .*this key has expired") as refused:
            synthesize(*arguments)
        assert "8 of 8 conversations failed" in str(refused.value)
        assert asked[0]["messages"][-1]["content"].startswith("Ask a question")
        allowed[0] = 1000
        done = synthesize(*arguments)
    assert done["conversations"] == {"kept": 8, "dropped": {}}
    # The service is gone, and what is finished asks nobody.
    assert synthesize(*arguments) == done
