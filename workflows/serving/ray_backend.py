"""`Backend` over Ray Serve handles: shared replicas, and those of cartridges that have their own."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from cartridges.config import BuildSettings
from cartridges.engines.base import TokenEvent
from cartridges.errors import UserError
from cartridges.serve_config import ReplicaSettings
from workflows.serving.backend import EngineCall
from workflows.serving.catalog import PLUS
from workflows.serving.errors import ApiError, replica_lost
from workflows.serving.metrics import Family, add_up
from workflows.serving.replicas import DEDICATED, run_dedicated

log = logging.getLogger(__name__)

POLL_S = 2.0
"""How often the ingress looks which cartridges have replicas of their own."""

BROADCAST_S = 60.0
"""Longest wait for all replicas to answer a management call (a load may be among them)."""

TELL_S = 5.0
"""Longest wait for what replicas tell of themselves. Prometheus gives a scrape ten seconds."""

NO_REPLICA = (DeploymentUnavailableError, BackPressureError)
FAILURES = (RayTaskError, RayActorError, *NO_REPLICA)


class RayBackend:
    """What a replica raised is raised here again; a replica that died is an `ApiError` 503.

    `ingress` is the application and deployment of which this is the replica `replica`.
    A request to a pool that sleeps (or restarts) waits for its replica; replicas that are not there have nothing
    to tell.
    """

    def __init__(self, shared: DeploymentHandle, registry: str, settings: BuildSettings, ingress: tuple[str, str],
                 replica: str):
        self.shared, self.registry, self.settings = shared, registry, settings
        self._ingress, self._replica = ingress, replica
        self._peers: DeploymentHandle | None = None
        self._dedicated: dict[str, DeploymentHandle] = {}
        self._looked = 0.0
        self._changing = asyncio.Lock()

    async def stream(self, call: EngineCall) -> AsyncIterator[TokenEvent]:
        handle = await self._handle(call.ref)
        events = handle.stream.remote(call)
        finished = False
        try:
            async for event in events:
                finished = event.finish_reason is not None
                yield event
        except FAILURES as error:
            finished = True
            raise _original(error) from error
        finally:
            if not finished:
                events.cancel()

    async def hold(self, ref: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]:
        answers = await self._ask(await self._pool(ref), "hold", ref, pinned, ttl_s)
        if not answers:
            raise _no_replica("send a request first, which starts one that sleeps")
        return answers[0]

    async def release(self, ref: str) -> bool:
        return any(await self._ask(await self._pool(ref), "release", ref))

    async def residents(self) -> dict[str, dict[str, Any]]:
        return {ref: told for answer in await self._all("residents") for ref, told in answer.items()}

    async def families(self) -> list[Family]:
        """Of all engines, and of the other replicas of the ingress."""
        if self._peers is None:
            app, deployment = self._ingress
            self._peers = await asyncio.to_thread(serve.get_deployment_handle, deployment, app)
        engines, ingresses = await asyncio.gather(self._all("families"), self._told(self._peers, "tell"))
        return add_up([*engines, *(families for replica, families in ingresses if replica != self._replica)])

    async def dedicate(self, name: str, replicas: ReplicaSettings) -> None:
        if await self._has(name, replicas):
            return
        async with self._changing:
            # Out of the table until they run: replicas that are there already are restarted with the new settings.
            self._dedicated = {other: handle for other, handle in self._dedicated.items() if other != name}
            # In the background: a replica may take minutes, and the shared ones serve meanwhile.
            await asyncio.to_thread(run_dedicated, name, self.registry, self.settings, replicas, wait=False)

    async def _has(self, name: str, replicas: ReplicaSettings) -> bool:
        """Whether all this is so already. Replicas that sleep cannot say, and lose nothing by being made anew."""
        await self._look()
        if name not in self._dedicated:
            return False
        wanted = self.settings.model_dump(mode="json"), replicas.model_dump()
        running = await self._ask(self._dedicated[name], "given")
        return bool(running) and all(given == wanted for given in running)

    async def share(self, name: str) -> None:
        if not await asyncio.to_thread(_exists, name):
            raise ApiError(404, f"{name} has no replicas of its own", "not_dedicated")
        async with self._changing:
            # First out of the table, so that new requests go elsewhere while the running ones finish.
            self._dedicated = {other: handle for other, handle in self._dedicated.items() if other != name}
            await asyncio.to_thread(serve.delete, DEDICATED + name, _blocking=False)

    async def _handle(self, ref: str | None) -> DeploymentHandle:
        """For one streamed request: with several replicas, one that holds the cartridge is preferred."""
        pool = await self._pool(ref)
        many = self.settings.serve.shared.max_replicas > 1 and pool is self.shared
        return pool.options(stream=True, multiplexed_model_id=ref if many and ref else "")

    async def _pool(self, ref: str | None) -> DeploymentHandle:
        await self._look()
        # Several cartridges at once are the shared replicas' work.
        alone = ref is not None and PLUS not in ref
        return self._dedicated.get(ref.partition("@")[0], self.shared) if alone else self.shared

    async def _look(self) -> None:
        if time.monotonic() - self._looked > POLL_S:
            self._looked = time.monotonic()
            # One at a time: an old answer must not bring back what has just been taken away.
            async with self._changing:
                try:
                    self._dedicated = await asyncio.to_thread(_dedicated_handles, self._dedicated)
                except (RayActorError, RayServeException) as error:
                    log.warning("Ray Serve does not say which cartridges have replicas of their own: %s", error)

    async def _all(self, method: str) -> list[Any]:
        """What the running replicas of all pools tell. Who does not answer in time is left out."""
        await self._look()
        pools = [self.shared, *self._dedicated.values()]
        told = await asyncio.gather(*[self._told(pool, method) for pool in pools])
        return [answer for pool in told for answer in pool]

    async def _told(self, pool: DeploymentHandle, method: str) -> list[Any]:
        try:
            return await self._ask(pool, method, patience_s=TELL_S)
        except TimeoutError:
            log.warning("the replicas of %s did not tell their %s in time", pool.app_name, method)
            return []

    async def _ask(self, pool: DeploymentHandle, method: str, *args: Any, patience_s: float = BROADCAST_S) -> list[Any]:
        """What every running replica of `pool` answers: nothing if none runs, and nothing from one that is lost."""
        try:
            answers = await pool.broadcast(method, *args).results_async(timeout_s=patience_s, return_exceptions=True)
        except (RayActorError, *NO_REPLICA):
            return []
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
                raise _original(answer) from answer
        return [answer for answer in answers if not isinstance(answer, RayActorError)]


def _dedicated_handles(known: dict[str, DeploymentHandle]) -> dict[str, DeploymentHandle]:
    """Handles of the running dedicated applications by cartridge name; known ones are kept."""
    running = {app.removeprefix(DEDICATED) for app, told in serve.status().applications.items()
               if app.startswith(DEDICATED) and told.status == "RUNNING"}
    return {name: known.get(name) or serve.get_app_handle(DEDICATED + name) for name in running}


def _exists(name: str) -> bool:
    """Whether `name` has an application, be it still starting."""
    told = serve.status().applications.get(DEDICATED + name)
    return told is not None and told.status != "DELETING"


def _original(error: BaseException) -> BaseException:
    """The refusal that a replica raised; a replica that died or is not there is a 503; else the error as it is."""
    if isinstance(error, RayActorError):
        return replica_lost()
    if isinstance(error, NO_REPLICA):
        return _no_replica("try again in a moment")
    refused = isinstance(error, RayTaskError) and isinstance(error.cause, ApiError | UserError)
    return error.cause if refused else error


def _no_replica(advice: str) -> ApiError:
    return ApiError(503, f"no replica is running; {advice}", "no_replica", retry_after=5)
