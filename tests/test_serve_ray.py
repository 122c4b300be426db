"""The service as users run it: `cartridges serve` on Ray Serve, from start to the last process gone."""

import asyncio
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from cartridges.registry import Registry
from tests.serve_support import (
    PATIENCE,
    TEXTS,
    load_stock,
    make_registry,
    metric,
    publish,
    serve_process,
    url_of,
)

pytestmark = pytest.mark.slow

ASK = [{"role": "user", "content": "What is known?"}]


@pytest.fixture(scope="module")
def registry(tiny_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("registry")
    make_registry(load_stock(tiny_model_dir), root, tmp_path_factory.mktemp("scratch"))
    return root


@pytest.fixture(scope="module")
def process(registry, tiny_model_dir, tmp_path_factory):
    with serve_process(registry, tiny_model_dir, tmp_path_factory.mktemp("serve") / "stderr", "--engine",
                       "transformers", "--set", "serve.max_queue=16", "--set", "serve.drain_s=30") as process:
        yield process


@pytest.fixture(scope="module")
def url(process):
    return url_of(process)


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def ask(client, model: str, max_tokens: int = 8) -> str:
    answer = client.chat.completions.create(model=model, messages=ASK, max_tokens=max_tokens)
    return answer.choices[0].message.content


def test_openais_client_streams_from_two_cartridges(client, url):
    answers = {name: ask(client, name, 16) for name in ["base", *TEXTS]}
    assert len(set(answers.values())) == 3
    for name, answer in answers.items():
        chunks = client.chat.completions.create(model=name, messages=ASK, max_tokens=16, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert metric(url, 'cartridges_loads_total{model="harbour",result="ok"}') == 1
    with pytest.raises(openai.NotFoundError, match="near it: harbour"):
        ask(client, "harbor")


def test_cartridges_are_managed_over_http(url):
    with httpx.Client(base_url=f"{url}/v1", timeout=PATIENCE) as http:
        made = http.post("/cartridges", json={"name": "orchard", "pin": True})
        assert made.status_code == 201 and made.json()["loaded"]["pinned"]
        listed = {cartridge["id"]: cartridge for cartridge in http.get("/cartridges").json()["data"]}
        assert listed["orchard"]["loaded"]["num_tokens"] == listed["orchard"]["num_tokens"]
        assert http.delete("/cartridges/orchard").json()["loaded"] is None
        refused = http.delete("/cartridges/orchard")
        assert refused.status_code == 404 and refused.json()["error"]["code"] == "cartridge_not_loaded"


def test_a_client_that_leaves_frees_the_engine(url):
    asked = {"model": "harbour", "messages": ASK, "max_tokens": 2000, "stream": True}

    async def leave() -> float:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            async with client.stream("POST", f"{url}/v1/chat/completions", json=asked) as response:
                await anext(response.aiter_lines())
            left = time.monotonic()
        while metric(url, "cartridges_engine_active"):
            assert time.monotonic() < left + 20
        return time.monotonic() - left

    async def leave_before_the_answer() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as client:
            task = asyncio.create_task(client.post(f"{url}/v1/chat/completions", json=asked | {"stream": False}))
            while not await asyncio.to_thread(metric, url, "cartridges_engine_active"):
                assert not task.done()
            task.cancel()

    left = 'cartridges_requests_total{model="harbour",status="499"}'
    before = metric(url, left)
    # A second on a machine that is not loaded; the way leads over two processes.
    assert asyncio.run(leave()) < 5
    asyncio.run(leave_before_the_answer())
    deadline = time.monotonic() + 20
    while metric(url, left) < before + 2:
        assert time.monotonic() < deadline
    assert not metric(url, 'cartridges_requests_total{model="harbour",status="500"}')


def test_a_cartridge_gets_replicas_of_its_own_while_others_are_served(client, url):
    expected = {name: ask(client, name) for name in TEXTS}
    answered = []

    async def traffic(stop: asyncio.Event):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0,
                                      timeout=PATIENCE) as client:
            while not stop.is_set():
                for name in TEXTS:
                    answer = await client.chat.completions.create(model=name, messages=ASK, max_tokens=8)
                    answered.append((name, answer.choices[0].message.content))

    async def change():
        stop = asyncio.Event()
        running = asyncio.create_task(traffic(stop))
        async with httpx.AsyncClient(base_url=f"{url}/v1/cartridges", timeout=PATIENCE) as http:
            loads = metric(url, 'cartridges_loads_total{model="harbour",result="ok"}')
            given = await http.put("/harbour/replicas", json={"min_replicas": 1, "max_replicas": 1})
            assert given.status_code == 202, given.text
            deadline = time.monotonic() + PATIENCE
            # Its own replica has loaded it too: requests go there.
            while metric(url, 'cartridges_loads_total{model="harbour",result="ok"}') == loads:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.5)
            own = replicas_with(url, "harbour")
            assert (await http.put("/harbour/replicas", json={"min_replicas": 1, "max_replicas": 1})).status_code == 202
            await asyncio.sleep(3)
            assert replicas_with(url, "harbour") == own, "restarted, though nothing has changed"
            taken = await http.delete("/harbour/replicas")
            assert taken.status_code == 202, taken.text
            # Taking away goes on behind the answer; once it is done there is nothing left to take.
            while (await http.delete("/harbour/replicas")).status_code != 404:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.5)
        await asyncio.sleep(1)
        stop.set()
        await running

    asyncio.run(change())
    assert len(answered) > 4 and all(answer == expected[name] for name, answer in answered)


def test_replicas_that_sleep_take_nothing_down_and_wake_for_a_request(client, url):
    expected = ask(client, "harbour")
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        asleep = {"min_replicas": 0, "max_replicas": 1, "idle_s": 1}
        assert http.put("/v1/cartridges/harbour/replicas", json=asleep).status_code == 202
        pool = http.post("/v1/cartridges", json={"name": "harbour"})
        deadline = time.monotonic() + PATIENCE

        def everything_answers() -> None:
            assert time.monotonic() < deadline
            for path in ("/metrics", "/v1/models", "/v1/cartridges", "/v1/cartridges/harbour", "/healthz"):
                response = http.get(path)
                assert response.status_code == 200, (path, response.text)
            assert 'cartridges_requests_total{' in http.get("/metrics").text

        while pool.status_code != 503:  # Its own replicas are in charge, and none of them runs.
            assert pool.status_code == 201
            everything_answers()
            time.sleep(0.3)
            pool = http.post("/v1/cartridges", json={"name": "harbour"})
        assert pool.json()["error"]["code"] == "no_replica" and pool.headers["retry-after"]
        began = time.monotonic()
        assert ask(client, "harbour") == expected
        print(f"from no replica to an answer: {time.monotonic() - began:.1f} s")  # pytest -s shows it
        everything_answers()
        while http.post("/v1/cartridges", json={"name": "harbour"}).status_code != 503:
            everything_answers()
            time.sleep(1)
        everything_answers()
        assert ask(client, "harbour") == expected
        assert http.delete("/v1/cartridges/harbour/replicas").status_code == 202
        assert ask(client, "harbour") == expected


def replicas_with(url: str, name: str) -> set[str]:
    """The replicas that have ever loaded the cartridge."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    return set(re.findall(rf'cartridges_loads_total{{model="{name}",replica="(\w+)"', text))


class Crowd:
    """Clients that ask on until `stop`: good ones, ones that ask badly, and one that never reads its answer."""

    def __init__(self, url: str, models: list[str]):
        self.url, self.models, self.stop = url, models, asyncio.Event()
        self.answered: list[tuple[str, str, float]] = []
        self.lost: list[str] = []
        self.refused = 0

    async def ask(self) -> None:
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0,
                                      timeout=PATIENCE) as client:
            while not self.stop.is_set():
                for name in self.models:
                    try:
                        answer = await client.chat.completions.create(model=name, messages=ASK, max_tokens=8)
                    except openai.APIStatusError as error:
                        assert error.status_code == 503 and error.body["code"] == "replica_lost", error
                        self.lost.append(name)
                    else:
                        self.answered.append((name, answer.choices[0].message.content, time.monotonic()))

    async def ask_badly(self) -> None:
        bad = {b"{": 400, b"[]": 400, b'{"model": "nobody", "messages": []}': 400, b" " * (5 << 20): 413}
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as http:
            while not self.stop.is_set():
                for body, status in bad.items():
                    response = await http.post("/v1/chat/completions", content=body)
                    assert response.status_code == status and response.json()["error"]["message"], response.text
                await asyncio.sleep(0.2)

    async def ask_the_damaged(self, name: str) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as http:
            while not self.stop.is_set():
                response = await http.post("/v1/chat/completions", json={"model": name, "messages": ASK})
                assert response.status_code == 409 and "damaged" in response.json()["error"]["message"], response.text
                self.refused += 1
                await asyncio.sleep(0.1)

    async def never_read(self) -> None:
        asked = {"model": "harbour", "messages": ASK, "max_tokens": 64, "stream": True}
        async with (httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as http,
                    http.stream("POST", "/v1/chat/completions", json=asked)):
            await self.stop.wait()

    def told(self, since: int = 0) -> list[tuple[str, str]]:
        """Model and answer of each, from number `since` on."""
        return [(name, answer) for name, answer, _ in self.answered[since:]]

    async def more(self, count: int) -> None:
        """Until so many more are answered."""
        wanted = len(self.answered) + count
        await self.until(lambda: len(self.answered) >= wanted)

    async def until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


def test_under_load_a_damaged_cartridge_and_a_moved_alias_cost_no_request(
        client, url, registry, tiny_model_dir, tmp_path):
    base, published = load_stock(tiny_model_dir), Registry(registry)
    version = publish(base, published, "ruined", TEXTS["orchard"], tmp_path)
    weights = registry / "ruined" / version / "cartridge.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    publish(base, published, "moving", TEXTS["harbour"], tmp_path)
    expected = {name: ask(client, name) for name in ["base", *TEXTS]}
    before, after = expected["harbour"], expected["orchard"]

    async def go_through_it() -> tuple[Crowd, int]:
        crowd = Crowd(url, [*expected, "moving"])
        async with asyncio.TaskGroup() as tasks:
            for one in (*[crowd.ask] * 4, crowd.never_read):
                tasks.create_task(one())
            tasks.create_task(crowd.ask_the_damaged("ruined"))
            await crowd.until(lambda: ("moving", before) in crowd.told())
            moved = len(crowd.answered)
            await asyncio.to_thread(publish, base, published, "moving", TEXTS["orchard"], tmp_path)
            await crowd.until(lambda: ("moving", after) in crowd.told(moved))
            await crowd.more(16)  # what ran on the old version when the first asked the new one is answered by then
            settled = len(crowd.answered)
            await crowd.more(16)
            await crowd.until(lambda: crowd.refused > 3)
            crowd.stop.set()
        return crowd, settled

    crowd, settled = asyncio.run(go_through_it())
    assert not crowd.lost
    assert {(name, answer) for name, answer in crowd.told() if name != "moving"} == set(expected.items())
    assert {answer for name, answer in crowd.told() if name == "moving"} == {before, after}
    assert {answer for name, answer in crowd.told(settled) if name == "moving"} == {after}
    assert metric(url, 'cartridges_loads_total{model="ruined",result="error"}') > 0


def test_under_load_a_lost_replica_costs_its_own_requests_alone(process, client, url, registry):
    """Beside malformed bodies, bodies that are too long, a client that does not read, and a registry that goes away."""
    expected = {name: ask(client, name) for name in ["base", *TEXTS]}
    clients = 4

    async def go_through_it() -> tuple[Crowd, float]:
        crowd = Crowd(url, list(expected))
        async with asyncio.TaskGroup() as tasks:
            for one in (*[crowd.ask] * clients, crowd.ask_badly, crowd.never_read):
                tasks.create_task(one())
            await crowd.more(6)
            away = registry.rename(registry.with_name("away"))
            await crowd.more(12)
            away.rename(registry)
            (replica,) = [child for child in psutil.Process(process.pid).children(recursive=True)
                          if any("ServeReplica" in part and "engine" in part for part in child.cmdline())]
            replica.kill()
            killed = time.monotonic()
            await crowd.more(12)
            crowd.stop.set()
        return crowd, killed

    crowd, killed = asyncio.run(go_through_it())
    assert all(answer == expected[name] for name, answer, _ in crowd.answered)
    assert {name for name, _, _ in crowd.answered} == set(expected)
    assert len(crowd.lost) <= clients, "no more than it was answering"
    again = next(at for _, _, at in crowd.answered if at > killed + 1) - killed  # pytest -s shows it
    print(f"answered {len(crowd.answered)}, lost {len(crowd.lost)}, again after {again:.1f} s")


def test_stopping_finishes_what_runs_and_leaves_no_process(process, url):
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    told = process.told.with_suffix(".out")
    before = len(told.read_text())
    asked = {"model": "orchard", "messages": ASK, "max_tokens": 60, "stream": True}
    with (ThreadPoolExecutor() as threads,
          httpx.stream("POST", f"{url}/v1/chat/completions", json=asked, timeout=PATIENCE) as response):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        knocking = threads.submit(knock, url)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        heard = knocking.result()
    assert heard <= {(200, ""), (503, "draining")} and (503, "draining") in heard
    assert process.wait(PATIENCE) == 0
    gone, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, [child.cmdline() for child in alive]
    assert "Traceback" not in process.told.read_text()
    assert not told.read_text()[before:], "Ray's farewell"


def knock(url: str) -> set[tuple[int, str]]:
    """(status, code) of what a service says that is being stopped, until it does not listen any more."""
    heard = set()
    while True:
        for ask in (lambda: httpx.get(f"{url}/healthz", timeout=PATIENCE),
                    lambda: httpx.post(f"{url}/v1/chat/completions", timeout=PATIENCE,
                                       json={"model": "base", "messages": ASK, "max_tokens": 1})):
            try:
                response = ask()
            except httpx.TransportError:
                return heard
            code = response.json()["error"]["code"] if response.is_error else ""
            heard.add((response.status_code, code))
