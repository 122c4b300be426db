"""Replicas that hold engines, on Ray Serve: shared ones, and those of a cartridge that has its own."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from cartridges.config import BuildSettings
from cartridges.engines.base import TokenEvent
from cartridges.engines.vllm_setup import gpus_of_an_engine
from cartridges.serve_config import ReplicaSettings
from workflows.serving.backend import EngineCall
from workflows.serving.factory import build_backend
from workflows.serving.metrics import Family

DEDICATED = "corpus-"
"""Beginning of the names of applications that serve one cartridge."""

HEADROOM = 64
"""Requests a deployment takes beyond `max_queue`, so that ours is the limit that answers (with 429)."""

HEALTH_S = 2.0
"""How often Ray asks a replica for its health. The third bad answer in a row has it replaced."""

HINTS = 1024
"""Cartridges that Ray remembers a replica to hold, for routing; the bytes are `Residency`'s to limit."""


def build_dedicated(args: dict[str, Any]) -> serve.Application:
    """Replicas for one cartridge: `build_app`'s args and `replicas` (`ReplicaSettings`).

    For an application named `corpus-<name>` with no route prefix.
    """
    settings = BuildSettings.model_validate(args.get("settings", {}))
    return engine_application(args["registry"], settings, ReplicaSettings.model_validate(args.get("replicas", {})))


def run_dedicated(name: str, registry: str, settings: BuildSettings, replicas: ReplicaSettings,
                  wait: bool = True) -> None:
    """Give the cartridge `name` replicas of its own; the ingress finds them by the application's name.

    `wait`: until they run. Otherwise they start in the background, and are used once they run.
    """
    args = {"registry": registry, "settings": settings.model_dump(mode="json"),
            "replicas": replicas.model_dump()}
    target = serve.RunTarget(build_dedicated(args), name=DEDICATED + name, route_prefix=None)
    serve.run_many([target], wait_for_ingress_deployment_creation=wait, wait_for_applications_running=wait)


def engine_application(registry: str, settings: BuildSettings, replicas: ReplicaSettings) -> serve.Application:
    has_gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    gpus = gpus_of_an_engine(settings.vllm, settings.serve.engine) if has_gpu else 0
    deployment = serve.deployment(EngineReplica).options(
        name="engine", ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, **_scaling(replicas),
        **shared_options(settings))
    return deployment.bind(registry, settings.model_dump(mode="json"), replicas.model_dump())


def _scaling(replicas: ReplicaSettings) -> dict[str, Any]:
    if replicas.min_replicas == replicas.max_replicas:
        return {"num_replicas": replicas.max_replicas}
    return {"autoscaling_config": {
        "min_replicas": replicas.min_replicas, "max_replicas": replicas.max_replicas,
        "target_ongoing_requests": replicas.target_ongoing, "downscale_delay_s": replicas.idle_s}}


def shared_options(settings: BuildSettings) -> dict[str, Any]:
    """Options of every deployment. Serve itself lets running requests finish: a replica that stops gets no new ones,
    and is ended once it is idle or after `drain_s`."""
    return {"max_ongoing_requests": settings.serve.max_queue + HEADROOM,
            "graceful_shutdown_timeout_s": settings.serve.drain_s + 1, "graceful_shutdown_wait_loop_s": 0.2,
            "health_check_period_s": HEALTH_S,
            "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False)}


class EngineReplica:
    """Holds a `LocalBackend`. `replicas` are the settings of its deployment."""

    def __init__(self, registry: str, settings: dict[str, Any], replicas: dict[str, Any]):
        self._given = settings, replicas
        self.backend = build_backend(registry, BuildSettings.model_validate(settings))
        self.backend.metrics.replica = serve.get_replica_context().replica_id.unique_id

    def check_health(self) -> None:
        """Ray's: a replica that raises here is replaced."""
        self.backend.check_health()

    def __del__(self):
        """Ray's: called as the replica stops, whose process then ends without Python's own clearing up."""
        if "backend" in vars(self):
            self.backend.close()

    @serve.multiplexed(max_num_models_per_replica=HINTS)
    async def _holds(self, ref: str) -> str:
        """Tells Ray's router that this replica has `ref`, so that it sends requests for it here."""
        return ref

    async def stream(self, call: EngineCall) -> AsyncIterator[TokenEvent]:
        if call.ref:
            await self._holds(call.ref)
        async with aclosing(self.backend.stream(call)) as events:
            async for event in events:
                yield event

    async def hold(self, ref: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]:
        return await self.backend.hold(ref, pinned, ttl_s)

    async def release(self, ref: str) -> bool:
        return await self.backend.release(ref)

    async def residents(self) -> dict[str, dict[str, Any]]:
        return await self.backend.residents()

    async def given(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What this was started with: settings, and those of its deployment."""
        return self._given

    async def families(self) -> list[Family]:
        return await self.backend.families()
