"""The HTTP service on a tiny model: OpenAI's client, streaming, several cartridges, errors, limits."""

import asyncio
import json
import random
import threading
import time

import httpx
import openai
import pytest

from cartridges.engines.base import CartridgePrefix, Request
from tests.serve_support import (
    TEXTS,
    exact_cartridge,
    listening,
    make_service,
    value_of,
)
from workflows.serving.app import create_app
from workflows.serving.body_limit import BodyLimit
from workflows.serving.metrics import TABLE

ASK = [{"role": "user", "content": "What is known?"}]
HTTP = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def service(base, engine, registry):
    return make_service(base, registry, engine, max_queue=32, max_body_bytes=20_000)


@pytest.fixture(scope="module")
def url(service):
    with listening(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, body, path: str = "/v1/chat/completions", **options) -> httpx.Response:
    content = {"content": body} if isinstance(body, str | bytes) else {"json": body}
    return HTTP.post(url + path, **content, **options)


def test_models_are_the_base_and_the_registry(client, base):
    ids = [model.id for model in client.models.list()]
    assert ids == [base.identity.name, *sorted(TEXTS)]
    assert [client.models.retrieve(name).id for name in ("harbour", "auto")] == ["harbour", "auto"]


def test_chat_answers_as_the_engine_does(client, base, engine):
    cartridge = exact_cartridge(base, TEXTS["harbour"])
    ids = tuple(base.template.conversation_ids(ASK))

    async def direct():
        request = Request(ids, CartridgePrefix(cartridge, "direct"), max_tokens=16)
        return [event async for event in engine.stream(request)]

    events = asyncio.run(direct())
    answer = client.chat.completions.create(model="harbour", messages=ASK, max_tokens=16, temperature=0)
    choice = answer.choices[0]
    assert choice.message.content == "".join(event.text for event in events)
    assert choice.finish_reason == events[-1].finish_reason
    assert answer.usage.completion_tokens == len(events)
    assert answer.usage.prompt_tokens == cartridge.num_tokens + len(ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == cartridge.num_tokens


def test_streamed_text_is_the_whole_text(client):
    asked = {"model": "orchard", "messages": ASK, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}))
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert told[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_tokens_arrive_one_by_one(url):
    asked = {"model": "base", "messages": ASK, "max_tokens": 200, "stream": True}
    arrivals = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                arrivals.append((time.monotonic(), line))
    assert arrivals[-1][1] == "data: [DONE]"
    assert arrivals[-1][0] - arrivals[0][0] > 3 * (arrivals[3][0] - arrivals[0][0])


def test_logprobs(client):
    answer = client.chat.completions.create(
        model="harbour", messages=ASK, max_tokens=3, logprobs=True, top_logprobs=4, temperature=1, seed=1)
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 4
        assert token.logprob <= token.top_logprobs[0].logprob + 1e-6
    plain = client.completions.create(model="harbour", prompt="The toll is", max_tokens=3, logprobs=2)
    assert [len(top) for top in plain.choices[0].logprobs.top_logprobs] == [2, 2, 2]
    assert plain.choices[0].logprobs.text_offset[0] == 0


def test_a_seed_repeats_and_choices_differ(client):
    asked = {"model": "harbour", "messages": ASK, "max_tokens": 8, "temperature": 1.5, "n": 3}
    answers = [[choice.message.content for choice in made.choices]
               for made in (client.chat.completions.create(**asked, seed=seed) for seed in (5, 5, 6))]
    assert answers[0] == answers[1] != answers[2]
    assert len(set(answers[0])) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == answers[0]


def test_stop_ends_before_the_string(client):
    whole = client.completions.create(model="harbour", prompt="The", max_tokens=24).choices[0].text
    stop = whole[len(whole) // 2:][:4]
    cut = client.completions.create(model="harbour", prompt="The", max_tokens=24, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)] and cut.finish_reason == "stop"


def test_completions_take_several_prompts_and_token_ids(client, base):
    prompts = ["The toll", "The keeper"]
    both = client.completions.create(model="harbour", prompt=prompts, max_tokens=6)
    ids = base.tokenizer.encode(prompts[1], add_special_tokens=False)
    second = client.completions.create(model="harbour", prompt=ids, max_tokens=6)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == second.choices[0].text
    first = base.tokenizer.encode(prompts[0], add_special_tokens=False)
    for several in ([first, ids], [ids]):
        made = client.completions.create(model="harbour", prompt=several, max_tokens=6)
        assert [choice.text for choice in made.choices] == [choice.text for choice in both.choices][-len(several):]


def test_an_assistant_that_said_nothing_is_taken(client):
    silent = [ASK[0], {"role": "assistant", "content": None}, ASK[0]]
    assert client.chat.completions.create(model="harbour", messages=silent, max_tokens=2).choices


def test_a_system_message_opens_the_first_user_message(client):
    folded = [{"role": "user", "content": "Be brief.\n\nWhat is known?"}]
    answers = [client.chat.completions.create(model="harbour", messages=messages, max_tokens=8)
               for messages in ([{"role": "system", "content": "Be brief."}, *ASK], folded)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="before all others"):
        client.chat.completions.create(model="harbour", messages=[*ASK, {"role": "system", "content": "x"}])


def test_concurrent_requests_do_not_mix(url, base):
    async def ask(client, model, question):
        answer = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=8)
        return answer.choices[0].message.content

    async def run():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            asked = [(model, f"Question {i}?") for i in range(4) for model in ["base", *TEXTS]]
            alone = [await ask(client, *pair) for pair in asked]
            return alone, await asyncio.gather(*[ask(client, *pair) for pair in asked])

    alone, together = asyncio.run(run())
    assert alone == together and len(set(alone)) > 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(url, engine, service, stream):
    asked = {"model": "harbour", "messages": ASK, "max_tokens": 2000, "stream": stream}
    before = value_of(service.metrics, "cartridges_disconnects_total", model="harbour")

    async def leave():
        async with httpx.AsyncClient(timeout=60) as client:
            task = asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=asked))
            while not engine.num_active:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    deadline = time.monotonic() + 3  # a second is the promise; the test machine may be busy
    while engine.num_active and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.num_active == 0
    time.sleep(0.1)
    assert service.in_flight == 0
    assert value_of(service.metrics, "cartridges_disconnects_total", model="harbour") == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_cancelled_counts_as_a_client_that_left(base, engine, registry, tmp_path, stream):
    """Ray Serve tells of a disconnect by cancelling the request."""
    log = tmp_path / "audit.jsonl"
    service = make_service(base, registry, engine, audit_log=str(log))

    async def leave():
        transport = httpx.ASGITransport(app=create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = {"model": "harbour", "messages": ASK, "max_tokens": 2000, "stream": stream}
            task = asyncio.create_task(client.post("/v1/chat/completions", json=asked))
            while value_of(service.metrics, "cartridges_queued", model="harbour") or not engine.num_active:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(leave())
    assert service.in_flight == 0
    assert value_of(service.metrics, "cartridges_disconnects_total", model="harbour") == 1
    assert value_of(service.metrics, "cartridges_requests_total", model="harbour", status="499") == 1
    assert [json.loads(line)["status"] for line in log.read_text().splitlines()] == [200 if stream else 499]


GOOD = {"model": "harbour", "messages": ASK}


def saying(content) -> dict:
    return GOOD | {"messages": [{"role": "user", "content": content}]}


MISTAKES = [
    (GOOD | {"model": "harbor"}, 404, "near it: harbour", "model"),
    (GOOD | {"model": "../../etc/passwd"}, 404, "there is no model", "model"),
    (GOOD | {"model": "harbour@nope"}, 404, "there is no model", "model"),
    ({"messages": ASK}, 400, "model", "model"),
    ({"model": "harbour"}, 400, "messages", "messages"),
    (GOOD | {"messages": []}, 400, "messages", "messages"),
    (GOOD | {"temperature": 9}, 400, "temperature", "temperature"),
    (GOOD | {"max_tokens": 0}, 400, "max_tokens", "max_tokens"),
    (GOOD | {"max_tokens": 3000}, 400, "limit of 2048", "max_tokens"),
    (saying("a b c d " * 1200), 400, "window is 4096", None),
    (GOOD | {"kv_transfer_params": {"path": "/"}}, 400, "by the service only", None),
    (GOOD | {"cache_salt": "x"}, 400, "by the service only", None),
    (GOOD | {"no_such": 1}, 400, "not known here", "no_such"),
    (GOOD | {"tools": [{"type": "function"}]}, 400, "tools", "tools"),
    (saying("\ud800"), 400, "messages", "messages"),
    (saying(None), 400, "messages", "messages"),
    (saying("\ud800"), 400, "messages.0.content: the text holds half", "messages"),
    (saying([{"type": "image_url", "image_url": {"url": "x"}}]), 400, "messages.0.content.0.type: Input", "messages"),
    (saying({"a": 1}), 400, "messages.0.content: Input should be a valid string", "messages"),
    (GOOD | {"messages": [{"role": "user"}]}, 400, "messages.0: content is missing", "messages"),
    (GOOD | {"messages": [{"content": "x"}]}, 400, "messages.0.role: Field required", "messages"),
    ("{not json", 400, "not JSON", None),
    ("[1, 2]", 400, "", None),
    (b"\xff\xfe\x00", 400, "", None),
    ("[" * 9000, 400, "", None),
    (saying("x" * 30_000), 413, "above 20000 bytes", None),
]


@pytest.mark.parametrize(("body", "status", "message", "param"), MISTAKES)
def test_mistakes_have_openais_shape(url, body, status, message, param):
    if isinstance(body, dict):
        body = json.dumps(body)
    response = post(url, body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"].endswith("_error")
    assert message in error["message"] and "\n" not in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(("count", "read"), [(7, 7), (30, 9)])
def test_a_body_that_is_too_long_is_read_on_within_reason(count, read):
    """Ten bytes are allowed; the pieces are of five."""
    pieces, sent = iter(range(1, count + 1)), []

    async def receive():
        return {"type": "http.request", "body": b"x" * 5, "more_body": next(pieces) < count}

    async def send(message):
        sent.append(message)

    asyncio.run(BodyLimit(None, 10)({"type": "http", "headers": []}, receive, send))
    assert sent[0]["status"] == 413 and next(pieces, count + 1) == read + 1


def test_unknown_routes_and_methods_too(url):
    assert HTTP.get(f"{url}/v1/nothing").json()["error"]["message"] == "Not Found"
    refused = HTTP.get(f"{url}/v1/chat/completions")
    assert refused.status_code == 405 and refused.json()["error"]["type"] == "invalid_request_error"


def test_replicas_that_cannot_be_are_refused(url):
    refused = HTTP.put(f"{url}/v1/cartridges/harbour/replicas", json={"min_replicas": 3, "max_replicas": 1})
    assert refused.status_code == 400 and "min_replicas 3 is above" in refused.json()["error"]["message"]


def test_random_bodies_never_break_it(url):
    draw = random.Random(0)
    values = [None, True, -1, 0, 3, 1e308, "", "harbour", "x" * 99, [], [ASK[0]], {}, {"a": 1}, [[1]], ASK]
    fields = ["model", "messages", "n", "stop", "seed", "stream", "logprobs", "top_logprobs", "top_p",
              "prompt", "stream_options", "temperature", "cartridges", "full_context", "response_format"]
    for _ in range(120):
        body = {"model": "harbour", "messages": ASK, "max_tokens": 1}
        body |= {draw.choice(fields): draw.choice(values) for _ in range(draw.randint(1, 3))}
        path = draw.choice(["/v1/chat/completions", "/v1/completions"])
        response = post(url, json.dumps(body), path, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_too_many_requests_are_told_to_wait(base, engine, registry):
    service = make_service(base, registry, engine, max_queue=1)

    async def run():
        transport = httpx.ASGITransport(app=create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": "base", "messages": ASK, "max_tokens": 30}
            bodies = [*[body] * 3, body | {"n": 2}]
            return await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for body in bodies])

    *answers, never = asyncio.run(run())
    assert never.status_code == 400 and "at most 1 here" in never.json()["error"]["message"]
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1" and refused.json()["error"]["type"] == "rate_limit_error"
    assert service.in_flight == 0


def test_a_request_that_takes_too_long_is_ended(base, engine, registry):
    with listening(make_service(base, registry, engine, request_timeout_s=0.5)) as url:
        asked = {"model": "base", "messages": ASK, "max_tokens": 2000}
        assert post(url, asked).status_code == 504
        assert '"code":"timeout"' in post(url, asked | {"stream": True}).text
    assert engine.num_active == 0


def test_planning_is_behind_admission_and_has_the_time_limit(base, engine, registry, monkeypatch):
    """A registry that hangs lets no more in than the queue takes, and holds no client for ever."""
    service = make_service(base, registry, engine, request_timeout_s=0.5, max_queue=2)
    freed = threading.Event()
    monkeypatch.setattr(service.catalog, "resolve", lambda *_: freed.wait(60))

    async def run():
        transport = httpx.ASGITransport(app=create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"model": "harbour", "messages": ASK, "max_tokens": 1}
            answers = await asyncio.gather(*[client.post("/v1/chat/completions", json=body) for _ in range(3)])
            freed.set()
            return answers

    assert sorted(answer.status_code for answer in asyncio.run(run())) == [429, 504, 504]
    assert service.in_flight == 0


def test_metrics_are_those_of_the_table(url, client):
    client.chat.completions.create(model="harbour", messages=ASK, max_tokens=3)
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    told = {line.split()[2] for line in lines if line.startswith("# TYPE") and "_created" not in line}
    assert told == set(TABLE)
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}
    assert values['cartridges_requests_total{model="harbour",status="200"}'] > 0
    assert values['cartridges_ttft_seconds_count{model="harbour"}'] > 0
    assert values['cartridges_resident_bytes{model="harbour"}'] > 0
    assert values['cartridges_in_flight{model="harbour"}'] == 0
    assert values['cartridges_queued{model="harbour"}'] == 0


def test_health(url):
    assert HTTP.get(f"{url}/healthz").json()["status"] == "ok"


def test_draining_refuses_lets_finish_and_ends_what_is_late(base, engine, registry):
    service = make_service(base, registry, engine, drain_s=2)

    async def run():
        transport = httpx.ASGITransport(app=create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            def ask(tokens: int, stream: bool = False) -> asyncio.Task:
                body = {"model": "base", "messages": ASK, "max_tokens": tokens, "stream": stream}
                return asyncio.create_task(client.post("/v1/chat/completions", json=body))

            late, late_stream, quick = ask(2000), ask(2000, stream=True), ask(3)
            while service.in_flight < 3:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(service.drain())
            await asyncio.sleep(0)
            refused = [await client.get("/healthz"), await ask(1)]
            assert not draining.done()
            await draining
            return [*refused, await late], await late_stream, await quick

    refused, stream, quick = asyncio.run(run())
    assert quick.status_code == 200 and service.in_flight == engine.num_active == 0
    assert '"code":"draining"' in stream.text and "[DONE]" not in stream.text
    for response in refused:
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "draining"
