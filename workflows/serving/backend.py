"""What stands behind the HTTP service: in this process, or behind a Ray handle."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from cartridges.artifact import Artifact, check_compatible, load
from cartridges.compose import compose, composed_digest
from cartridges.engines.base import EngineLost, Prefix, Request, StreamingEngine, TextPrefix, TokenEvent
from cartridges.models import ModelIdentity, rope_frequencies
from cartridges.registry import Registry
from cartridges.serve_config import ReplicaSettings
from workflows.serving.catalog import PLUS
from workflows.serving.errors import ApiError, replica_lost
from workflows.serving.metrics import Family, Metrics
from workflows.serving.residency import Residency


@dataclass(frozen=True)
class EngineCall:
    """One answer to generate. `ref` is `name@version`, several joined by `+`; None is the base model.

    `text`: a system turn around it instead of a cartridge; `shared`: other requests have the same, as with
    the whole corpus, so it is worth caching. `tenant`: whose request it is; nothing that an engine caches of
    prompts is shared between tenants. The other fields are those
    of `cartridges.engines.base.Request`.
    """

    ref: str | None
    input_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    topk: int = 0
    text: str | None = None
    shared: bool = True
    tenant: str = ""

    def request(self, prefix: Prefix) -> Request:
        return Request(self.input_ids, prefix, self.max_tokens, self.temperature, self.top_p, self.seed,
                       self.stop, self.topk)


class Backend(Protocol):
    """Engine and residency. Closing a stream frees its slot. Errors: `ApiError`, `UserError`.

    `release`: whether any replica had it. `residents` maps `name@version` to what `Resident.describe` says (of one of
    the replicas).
    """

    def stream(self, call: EngineCall) -> AsyncIterator[TokenEvent]: ...

    async def hold(self, ref: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]: ...

    async def release(self, ref: str) -> bool: ...

    async def residents(self) -> dict[str, dict[str, Any]]: ...

    async def families(self) -> list[Family]: ...

    async def dedicate(self, name: str, replicas: ReplicaSettings) -> None: ...

    async def share(self, name: str) -> None: ...


class LocalBackend:
    """`Backend` in this process, over any streaming engine.

    `forget(digest)` frees what the engine keeps of a cartridge that is put out.
    """

    def __init__(self, engine: StreamingEngine, registry: Registry, identity: ModelIdentity,
                 resident_bytes: int, forget: Callable[[str], None]):
        self.engine, self.registry, self.identity = engine, registry, identity
        self.metrics = Metrics("engine")
        self.residency = Residency(self._load, resident_bytes, self.metrics, forget)

    async def stream(self, call: EngineCall) -> AsyncIterator[TokenEvent]:
        async with AsyncExitStack() as stack:
            self.metrics.add("cartridges_engine_active")
            stack.callback(self.metrics.add, "cartridges_engine_active", -1)
            prefix = await self._prefix(call, stack)
            stream = self.engine.stream(call.request(prefix), call.tenant)
            events = await stack.enter_async_context(aclosing(stream))
            try:
                async for event in events:
                    yield event
            except EngineLost as error:
                raise replica_lost() from error

    def check_health(self) -> None:
        """Raises `EngineLost` when nothing can be answered here any more."""
        self.engine.check_health()

    def close(self) -> None:
        self.engine.close()

    async def _prefix(self, call: EngineCall, stack: AsyncExitStack) -> Prefix:
        if call.text is not None:
            return TextPrefix(call.text, call.shared)
        if call.ref is None:
            return None
        return await stack.enter_async_context(self.residency.use(call.ref))

    async def hold(self, ref: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]:
        return await self.residency.hold(ref, pinned, ttl_s)

    async def release(self, ref: str) -> bool:
        return self.residency.release(ref)

    async def residents(self) -> dict[str, dict[str, Any]]:
        return self.residency.list()

    async def families(self) -> list[Family]:
        self.residency.list()  # So that what is past its idle limit is not shown.
        return self.metrics.families()

    async def dedicate(self, name: str, replicas: ReplicaSettings) -> None:
        raise ApiError(409, "this service runs in one process; replicas need Ray Serve", "not_supported")

    async def share(self, name: str) -> None:
        raise ApiError(404, f"{name} has no replicas of its own", "not_dedicated")

    def _load(self, ref: str) -> Artifact:
        parts = [load(self.registry.get(part)) for part in ref.split(PLUS)]
        for part in parts:
            check_compatible(part.manifest, self.identity)
        return parts[0] if len(parts) == 1 else self._composed(parts)

    def _composed(self, parts: list[Artifact]) -> Artifact:
        """Held, put out and counted like one cartridge, under a digest of its own."""
        cartridge = compose([part.cartridge for part in parts], rope_frequencies(self.identity))
        return Artifact(cartridge, parts[0].manifest, composed_digest([part.digest for part in parts]))
