"""`Backend` over Ray Serve handles: shared replicas, and those of cartridges that have their own."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle

from cartridges.config import BuildSettings, ReplicaSettings
from cartridges.engines.base import TokenEvent
from cartridges.errors import UserError
from workflows.serving.backend import EngineCall
from workflows.serving.catalog import PLUS
from workflows.serving.errors import ApiError
from workflows.serving.metrics import Family, add_up
from workflows.serving.replicas import DEDICATED, run_dedicated

POLL_S = 2.0
"""How often the ingress looks which cartridges have replicas of their own."""

BROADCAST_S = 60.0
"""Longest wait for all replicas to answer a management call (a load may be among them)."""


class RayBackend:
    """What a replica raised is raised here again; a replica that died is an `ApiError` 503."""

    def __init__(self, shared: DeploymentHandle, registry: str, settings: BuildSettings):
        self.shared, self.registry, self.settings = shared, registry, settings
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
        except (RayTaskError, RayActorError) as error:
            finished = True
            raise _original(error) from error
        finally:
            if not finished:
                events.cancel()

    async def hold(self, ref: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]:
        answers = await self._all("hold", ref, pinned, ttl_s, handles=[await self._pool(ref)])
        if not answers:
            raise ApiError(503, "no replica is running; send a request first", "no_replica", retry_after=5)
        return answers[0]

    async def release(self, ref: str) -> None:
        await self._all("release", ref, handles=[await self._pool(ref)])

    async def residents(self) -> dict[str, dict[str, Any]]:
        return {ref: told for answer in await self._all("residents") for ref, told in answer.items()}

    async def families(self) -> list[Family]:
        return add_up(await self._all("families"))

    async def dedicate(self, name: str, replicas: ReplicaSettings) -> None:
        # In the background: a replica may take minutes, and the shared ones serve meanwhile.
        await asyncio.to_thread(run_dedicated, name, self.registry, self.settings, replicas, wait=False)

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
                self._dedicated = await asyncio.to_thread(_dedicated_handles, self._dedicated)

    async def _all(self, method: str, *args: Any, handles: list[DeploymentHandle] | None = None) -> list[Any]:
        """What every running replica of `handles` (None: of all pools) answers."""
        await self._look()
        asked = [self.shared, *self._dedicated.values()] if handles is None else handles
        try:
            answers = await asyncio.gather(*[
                handle.broadcast(method, *args).results_async(timeout_s=BROADCAST_S) for handle in asked])
        except (RayTaskError, RayActorError) as error:
            raise _original(error) from error
        return [answer for pool in answers for answer in pool]


def _dedicated_handles(known: dict[str, DeploymentHandle]) -> dict[str, DeploymentHandle]:
    """Handles of the running dedicated applications by cartridge name; known ones are kept."""
    running = {app.removeprefix(DEDICATED) for app, told in serve.status().applications.items()
               if app.startswith(DEDICATED) and told.status == "RUNNING"}
    return {name: known.get(name) or serve.get_app_handle(DEDICATED + name) for name in running}


def _exists(name: str) -> bool:
    """Whether `name` has an application, be it still starting."""
    told = serve.status().applications.get(DEDICATED + name)
    return told is not None and told.status != "DELETING"


def _original(error: RayTaskError | RayActorError) -> Exception:
    """The refusal that a replica raised; a replica that died is a 503; else the error as it is."""
    if isinstance(error, RayActorError):
        return ApiError(503, "the replica that answered was lost; try again", "replica_lost", retry_after=1)
    return error.cause if isinstance(error.cause, ApiError | UserError) else error
