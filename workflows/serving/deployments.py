"""The service on Ray Serve: an ingress that speaks HTTP, and replicas that hold engines.

Shims only: what they do is in `service.py` and `backend.py`, which know nothing of Ray. The
application `cartridges` has the ingress and the shared replicas; a hot cartridge has replicas of its
own in an application `corpus-<name>`, which can come and go while the others serve.
"""

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from cartridges.config import BuildSettings
from workflows.serving.app import create_app
from workflows.serving.factory import build_service
from workflows.serving.metrics import Family
from workflows.serving.ray_backend import RayBackend
from workflows.serving.replicas import (
    DEDICATED,
    build_dedicated,
    engine_application,
    run_dedicated,
    shared_options,
)

__all__ = ["DEDICATED", "Ingress", "build_app", "build_dedicated", "run_dedicated"]


def build_app(args: dict[str, Any]) -> serve.Application:
    """Ingress and shared replicas: `args` has `registry` (a path or URL) and `settings` (`BuildSettings`).

    What `serve deploy` and a RayService import: `workflows.serving.deployments:build_app`.
    """
    settings = BuildSettings.model_validate(args.get("settings", {}))
    ingress = serve.deployment(Ingress).options(
        name="ingress", ray_actor_options={"num_cpus": 0}, **shared_options(settings))
    engine = engine_application(args["registry"], settings, settings.serve.shared)
    return ingress.bind(args["registry"], settings.model_dump(mode="json"), engine)


@serve.ingress()
class Ingress:
    """Holds a `CartridgeService`; its app is built in the replica."""

    def __init__(self, registry: str, settings: dict[str, Any], engine: DeploymentHandle):
        parsed, me = BuildSettings.model_validate(settings), serve.get_replica_context()
        backend = RayBackend(engine, registry, parsed, (me.app_name, me.deployment), me.replica_id.unique_id)
        self.service = build_service(registry, parsed, backend)
        self.service.metrics.replica = me.replica_id.unique_id

    def __serve_build_asgi_app__(self):
        return create_app(self.service)

    async def tell(self) -> tuple[str, list[Family]]:
        """Which replica this is, and what it has counted."""
        return self.service.metrics.replica, self.service.metrics.families()

    async def drain(self) -> None:
        """Returns once nothing runs any more (`CartridgeService.drain`)."""
        await self.service.drain()
