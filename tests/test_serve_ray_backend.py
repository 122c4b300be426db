"""What the ingress makes of its replicas' answers, and of those that do not come. Ray's handles are fakes here."""

import asyncio
import math

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from cartridges.config import BuildSettings
from cartridges.serve_config import ReplicaSettings
from workflows.serving.backend import EngineCall
from workflows.serving.errors import ApiError
from workflows.serving.metrics import Metrics, exposition
from workflows.serving.ray_backend import RayBackend
from workflows.serving.replicas import build_dedicated

ASLEEP = DeploymentUnavailableError(DeploymentID("engine"))
REF = "harbour@1"


class Pool:
    """A handle: a list of what each replica answers to a broadcast, or the error that the broadcast raises."""

    app_name = "pool"

    def __init__(self, answers):
        self.answers = answers
        self.stream = self

    def broadcast(self, method, *args):
        return self

    async def results_async(self, timeout_s, return_exceptions):
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    def options(self, **_):
        return self

    async def remote(self, call):
        raise self.answers
        yield

    def cancel(self):
        raise AssertionError("what failed needs no cancelling")


def make(shared, own=None, ingress=()) -> RayBackend:
    backend = RayBackend(Pool(shared), "registry", BuildSettings(), ("app", "ingress"), "me")
    backend._dedicated = {} if own is None else {"harbour": Pool(own)}
    backend._looked, backend._peers = math.inf, Pool(list(ingress))
    return backend


@pytest.mark.parametrize("gone", [ASLEEP, BackPressureError(1, 1), ActorDiedError(), [ActorDiedError()],
                                  TimeoutError()])
def test_replicas_that_are_not_there_have_nothing_to_tell(gone):
    backend = make(shared=[{"orchard@1": {}}], own=gone)
    assert asyncio.run(backend.residents()) == {"orchard@1": {}}


@pytest.mark.parametrize("gone", [ASLEEP, BackPressureError(1, 1), [ActorDiedError()]])
def test_a_pool_without_replicas_loads_nothing(gone):
    with pytest.raises(ApiError) as refused:
        asyncio.run(make([{}], gone).hold(REF, None, None))
    assert (refused.value.status, refused.value.code) == (503, "no_replica") and refused.value.headers["Retry-After"]


@pytest.mark.parametrize(("gone", "code"), [(ASLEEP, "no_replica"), (BackPressureError(1, 1), "no_replica"),
                                            (ActorDiedError(), "replica_lost")])
def test_an_answer_that_cannot_begin_is_a_503(gone, code):
    async def ask():
        return [event async for event in make([], gone).stream(EngineCall(REF, (1,), 1))]

    with pytest.raises(ApiError) as refused:
        asyncio.run(ask())
    assert (refused.value.status, refused.value.code) == (503, code) and refused.value.headers["Retry-After"]


@pytest.mark.parametrize(("held", "told"), [([False, True, False], True), ([False, False], False), (ASLEEP, False)])
def test_unloaded_is_what_any_replica_held(held, told):
    assert asyncio.run(make(held).release(REF)) is told


def test_replicas_are_made_anew_only_where_something_changes(monkeypatch):
    made, given = [], ReplicaSettings(max_replicas=2)
    monkeypatch.setattr("workflows.serving.ray_backend.run_dedicated", lambda *of, wait: made.append(of[-1]))
    args = {"registry": "registry", "settings": BuildSettings().model_dump(mode="json"), "replicas": given.model_dump()}
    running = build_dedicated(args)._bound_deployment.init_args[1:]
    backend = make([], own=[running, running])
    asyncio.run(backend.dedicate("harbour", given))
    assert not made and "harbour" in backend._dedicated
    other = ReplicaSettings(max_replicas=3)
    asyncio.run(backend.dedicate("harbour", other))
    assert made == [other]
    assert "harbour" not in backend._dedicated, "requests would wait for the replicas that restart"
    asleep = make([], own=ASLEEP)
    asyncio.run(asleep.dedicate("harbour", given))
    assert made == [other, given]


def test_a_refusal_of_one_replica_is_raised():
    with pytest.raises(ApiError, match="no room"):
        asyncio.run(make([{}, ApiError(503, "no room")]).hold(REF, None, None))


def counted(replica: str, source, name: str, count: int) -> list:
    metrics = Metrics(source)
    metrics.replica = replica
    metrics.add(name, count, model="harbour", **({"status": "200"} if source == "ingress" else {}))
    return metrics.families()


def test_a_scrape_has_every_replicas_own_counters():
    """Whichever ingress answers it; sums would fall with a replica that goes."""
    mine, other = (counted(replica, "ingress", "cartridges_requests_total", count)
                   for replica, count in (("me", 3), ("you", 4)))
    engines = [counted(replica, "engine", "cartridges_cache_hits_total", 5) for replica in ("e1", "e2")]
    backend = make(engines, ASLEEP, [("me", mine), ("you", other)])
    lines = exposition([*mine, *asyncio.run(backend.families())]).decode().splitlines()
    for replica, count in (("me", 3), ("you", 4)):
        assert f'cartridges_requests_total{{model="harbour",replica="{replica}",status="200"}} {count}.0' in lines
    for replica in ("e1", "e2"):
        assert f'cartridges_cache_hits_total{{model="harbour",replica="{replica}"}} 5.0' in lines
    assert sum(line.startswith("# TYPE cartridges_requests_total") for line in lines) == 1
