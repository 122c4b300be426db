"""The service on Ray Serve: an ingress that speaks HTTP, and replicas that hold engines.

Shims only: what they do is in `service.py` and `backend.py`, which know nothing of Ray.
"""

from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cartridges.config import BuildSettings
from cartridges.engines.base import TokenEvent
from cartridges.errors import UserError
from workflows.serving.app import create_app
from workflows.serving.backend import EngineCall
from workflows.serving.errors import ApiError
from workflows.serving.parts import build_backend, build_service

T = TypeVar("T")

HEADROOM = 64
"""Requests a deployment takes beyond `max_queue`, so that ours is the limit that answers (with 429)."""


def build_app(args: dict[str, Any]) -> serve.Application:
    """The Serve application: `args` has `registry` (a path or URL) and `settings` (`BuildSettings`).

    What `serve deploy` and a RayService import: `workflows.serving.deployments:build_app`.
    """
    registry, plain = args["registry"], args.get("settings", {})
    settings = BuildSettings.model_validate(plain)
    shared = {"max_ongoing_requests": settings.serve.max_queue + HEADROOM,
              "graceful_shutdown_timeout_s": settings.serve.drain_s + 1,
              "graceful_shutdown_wait_loop_s": 0.2,
              "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False)}
    gpus = 1 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0
    engine = serve.deployment(EngineReplica).options(
        name="engine", ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, **shared)
    ingress = serve.deployment(Ingress).options(
        name="ingress", ray_actor_options={"num_cpus": 0}, **shared)
    return ingress.bind(registry, plain, engine.bind(registry, plain))


class EngineReplica:
    """Holds a `LocalBackend`."""

    def __init__(self, registry: str, settings: dict[str, Any]):
        self.backend = build_backend(registry, BuildSettings.model_validate(settings))

    async def stream(self, call: EngineCall) -> AsyncIterator[TokenEvent]:
        async with aclosing(self.backend.stream(call)) as events:
            async for event in events:
                yield event

    async def hold(self, ref: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]:
        return await self.backend.hold(ref, pinned, ttl_s)

    async def release(self, ref: str) -> None:
        await self.backend.release(ref)

    async def residents(self) -> dict[str, dict[str, Any]]:
        return await self.backend.residents()

    async def exposition(self) -> bytes:
        return await self.backend.exposition()


@serve.ingress()
class Ingress:
    """Holds a `CartridgeService`; its app is built in the replica."""

    def __init__(self, registry: str, settings: dict[str, Any], engine: DeploymentHandle):
        self.service = build_service(registry, BuildSettings.model_validate(settings), RayBackend(engine))

    def __serve_build_asgi_app__(self):
        return create_app(self.service)


class RayBackend:
    """`Backend` over a Serve handle. What the replica raised is raised here again."""

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle

    async def stream(self, call: EngineCall) -> AsyncIterator[TokenEvent]:
        events = self.handle.options(stream=True).stream.remote(call)
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
        return await _unwrapped(self.handle.hold.remote(ref, pinned, ttl_s))

    async def release(self, ref: str) -> None:
        await _unwrapped(self.handle.release.remote(ref))

    async def residents(self) -> dict[str, dict[str, Any]]:
        return await _unwrapped(self.handle.residents.remote())

    async def exposition(self) -> bytes:
        return await _unwrapped(self.handle.exposition.remote())


async def _unwrapped(response: Awaitable[T]) -> T:
    try:
        return await response
    except (RayTaskError, RayActorError) as error:
        raise _original(error) from error


def _original(error: RayTaskError | RayActorError) -> Exception:
    """The refusal that a replica raised; a replica that died is a 503; else the error as it is."""
    if isinstance(error, RayActorError):
        return ApiError(503, "the replica that answered was lost; try again", "replica_lost", retry_after=1)
    return error.cause if isinstance(error.cause, ApiError | UserError) else error
