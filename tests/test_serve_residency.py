"""Loaded cartridges: within their bytes, one load for all who wait, pins, idle limits, moved aliases."""

import asyncio
import shutil
from pathlib import Path

import pytest

from tests.serve_support import TEXTS, load_stock, make_registry, make_service, publish, value_of
from workflows.serving.api import ChatRequest
from workflows.serving.errors import ApiError


@pytest.fixture
def registry(base, tmp_path):
    return make_registry(base, tmp_path / "registry", tmp_path)


def bytes_of(registry, name: str) -> int:
    manifest = registry.resolve(name).manifest
    layers, heads, tokens, head_dim = manifest.shape
    return 2 * layers * heads * tokens * head_dim * 4


async def ask(service, model: str, max_tokens: int = 4) -> str:
    body = ChatRequest(model=model, messages=[{"role": "user", "content": "What is known?"}],
                       max_tokens=max_tokens)
    _, events = await service.start(body)
    return "".join([event.text async for _, event in events])


async def loaded(service) -> list[str]:
    return [cartridge["id"] for cartridge in await service.describe() if cartridge["loaded"]]


def test_the_least_recently_used_goes_first(base, engine, registry):
    room = max(bytes_of(registry, name) for name in TEXTS)
    service = make_service(base, registry, engine, resident_bytes=room)

    async def run():
        answers = [await ask(service, "harbour"), await ask(service, "orchard")]
        assert await loaded(service) == ["orchard"]
        assert await ask(service, "harbour") == answers[0]

    asyncio.run(run())
    metrics = service.backend.metrics
    assert value_of(metrics, "cartridges_evictions_total", model="harbour", reason="lru") == 1
    assert value_of(metrics, "cartridges_loads_total", model="harbour", result="ok") == 2
    assert value_of(metrics, "cartridges_resident_bytes", model="orchard") == 0


def test_a_pinned_cartridge_stays(base, engine, registry):
    room = max(bytes_of(registry, name) for name in TEXTS)
    service = make_service(base, registry, engine, resident_bytes=room)

    async def run():
        assert (await service.hold("harbour", True, None))["loaded"]["pinned"]
        with pytest.raises(ApiError, match="pinned or in use") as refused:
            await ask(service, "orchard")
        assert refused.value.status == 503 and service.in_flight == 0
        await service.hold("harbour", False, None)
        await ask(service, "orchard")
        assert await loaded(service) == ["orchard"]

    asyncio.run(run())


def test_idle_limit_and_unload(base, engine, registry):
    service = make_service(base, registry, engine)

    async def run():
        await service.hold("harbour", None, 0.05)
        await service.hold("orchard", None, None)
        await asyncio.sleep(0.1)
        assert await loaded(service) == ["orchard"]
        assert (await service.release("orchard"))["loaded"] is None
        with pytest.raises(ApiError, match="not loaded"):
            await service.release("orchard")

    asyncio.run(run())


def test_clients_that_come_together_cause_one_load(base, engine, registry):
    service = make_service(base, registry, engine)

    async def run():
        return await asyncio.gather(*[ask(service, "harbour") for _ in range(6)])

    assert len(set(asyncio.run(run()))) == 1
    assert value_of(service.backend.metrics, "cartridges_loads_total", model="harbour", result="ok") == 1


def test_a_damaged_cartridge_is_refused_and_the_others_are_served(base, engine, registry, tmp_path):
    path = tmp_path / "registry" / "harbour" / registry.resolve("harbour").version / "cartridge.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    service = make_service(base, registry, engine)

    async def run():
        with pytest.raises(ApiError, match="harbour.*damaged") as refused:
            await ask(service, "harbour")
        assert refused.value.status == 409
        await ask(service, "orchard")

    asyncio.run(run())
    assert value_of(service.backend.metrics, "cartridges_loads_total", model="harbour", result="error") == 1


def test_a_cartridge_of_another_model_is_refused(engine, base, registry, tiny_qwen3_dir, tmp_path):
    publish(load_stock(tiny_qwen3_dir), registry, "foreign", TEXTS["harbour"], tmp_path)
    service = make_service(base, registry, engine)
    with pytest.raises(ApiError, match="model weights") as refused:
        asyncio.run(ask(service, "foreign"))
    assert refused.value.status == 409


def test_an_alias_that_moves_is_served_and_running_requests_go_on(
        base, engine, registry, tmp_path, monkeypatch):
    monkeypatch.setattr("workflows.serving.catalog.FRESH_S", 0.0)
    service = make_service(base, registry, engine)
    old = registry.resolve("harbour").version

    async def run():
        before = await ask(service, "harbour", 12)
        running = asyncio.create_task(ask(service, "harbour", 300))
        while not engine.num_active:
            await asyncio.sleep(0.01)
        new = publish(base, registry, "harbour", TEXTS["orchard"], tmp_path)
        after = await ask(service, "harbour", 12)
        assert new != old and after == await ask(service, "orchard", 12) != before
        assert (await running).startswith(before)
        assert await ask(service, f"harbour@{old}", 12) == before

    asyncio.run(run())


@pytest.mark.parametrize("away", ["connection", "file system"])
def test_what_is_known_is_served_while_the_registry_is_away(base, engine, registry, tmp_path, monkeypatch, away):
    monkeypatch.setattr("workflows.serving.catalog.FRESH_S", 0.0)
    service = make_service(base, registry, engine)

    def unreachable(*_):
        raise ConnectionError("no route")

    async def run():
        answer = await ask(service, "harbour")
        if away == "connection":
            monkeypatch.setattr(registry, "resolve", unreachable)
        else:
            Path(registry.root).rename(tmp_path / "unmounted")
        assert [entry.name for entry in service.catalog.entries()] == ["harbour"]
        assert await ask(service, "harbour") == answer
        with pytest.raises(ApiError, match="cannot be reached") as refused:
            await ask(service, "orchard")
        assert refused.value.status == 503 and refused.value.headers["Retry-After"]

    asyncio.run(run())


def test_only_what_is_offered_is_there(base, engine, registry, tmp_path):
    service = make_service(base, registry, engine, cartridges=("orchard",))
    assert [cartridge["id"] for cartridge in asyncio.run(service.describe())] == ["orchard"]
    with pytest.raises(ApiError, match="no model 'harbour'"):
        asyncio.run(ask(service, "harbour"))
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(ApiError):
        asyncio.run(ask(make_service(base, registry, engine), "orchard"))
