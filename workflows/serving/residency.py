"""Which cartridges a replica holds in memory: least recently used out first, pins and idle limits."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from cartridges.artifact import Artifact
from cartridges.engines.base import CartridgePrefix
from cartridges.errors import UserError
from workflows.serving.catalog import PLUS, SEVERAL
from workflows.serving.errors import ApiError
from workflows.serving.metrics import Metrics


@dataclass
class Resident:
    """One loaded cartridge. `ttl_s`: idle seconds after which it goes; `users`: requests that run on it."""

    ref: str
    prefix: CartridgePrefix
    num_bytes: int
    pinned: bool = False
    ttl_s: float | None = None
    users: int = 0
    loaded: float = field(default_factory=time.time)
    used: float = field(default_factory=time.monotonic)

    def describe(self) -> dict[str, Any]:
        return {"digest": self.prefix.digest, "num_tokens": self.prefix.cartridge.num_tokens,
                "bytes": self.num_bytes, "pinned": self.pinned, "ttl_s": self.ttl_s, "users": self.users,
                "loaded_at": int(self.loaded), "idle_s": round(time.monotonic() - self.used, 3)}


class Residency:
    """Loaded cartridges by `name@version`, within `limit_bytes`. Used from one event loop.

    `load(ref)` reads and verifies an artifact (in a thread). `forget(digest)` frees what the engine
    keeps of it.
    """

    def __init__(self, load: Callable[[str], Artifact], limit_bytes: int, metrics: Metrics,
                 forget: Callable[[str], None]):
        self._load, self._forget = load, forget
        self._limit, self._metrics = limit_bytes, metrics
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, asyncio.Task[Resident]] = {}
        metrics.put("cartridges_resident_limit_bytes", limit_bytes)

    @asynccontextmanager
    async def use(self, ref: str) -> AsyncIterator[CartridgePrefix]:
        """The cartridge, loaded if need be; it is not put out while the block runs."""
        hit = ref in self._residents
        self._metrics.add("cartridges_cache_hits_total" if hit else "cartridges_cache_misses_total",
                          model=_name(ref))
        resident = await self._get(ref)
        resident.users += 1
        try:
            yield resident.prefix
        finally:
            resident.users -= 1
            resident.used = time.monotonic()

    async def hold(self, ref: str, pinned: bool | None = None, ttl_s: float | None = None) -> dict[str, Any]:
        """Load if need be, and set the pin and the idle limit where they are given."""
        resident = await self._get(ref)
        resident.pinned = resident.pinned if pinned is None else pinned
        resident.ttl_s = resident.ttl_s if ttl_s is None else ttl_s
        resident.used = time.monotonic()
        return resident.describe()

    def release(self, ref: str) -> bool:
        """Put a cartridge out. Requests that run on it keep their copy. False: it was not loaded."""
        held = ref in self._residents
        if held:
            self._evict(ref, "unload")
        return held

    def list(self) -> dict[str, dict[str, Any]]:
        self._expire()
        return {ref: resident.describe() for ref, resident in self._residents.items()}

    async def _get(self, ref: str) -> Resident:
        self._expire()
        if ref in self._residents:
            return self._residents[ref]
        if ref not in self._loading:  # The clients that come meanwhile wait for the one load.
            self._loading[ref] = asyncio.create_task(self._admit(ref))
        # Shielded: a client that leaves does not end the load for the others.
        return await asyncio.shield(self._loading[ref])

    async def _admit(self, ref: str) -> Resident:
        began = time.monotonic()
        try:
            artifact = await asyncio.to_thread(self._load, ref)
            resident = Resident(ref, CartridgePrefix(artifact.cartridge, artifact.digest), _bytes(artifact))
            self._make_room(resident)
        except UserError as error:
            self._count_load(ref, "error", began)
            raise ApiError(409, f"{ref} cannot be loaded: {error}", "cartridge_damaged", "model") from error
        except BaseException:
            self._count_load(ref, "error", began)
            raise
        finally:
            del self._loading[ref]
        self._residents[ref] = resident
        self._count_load(ref, "ok", began)
        self._show_bytes(ref)
        return resident

    def _make_room(self, newcomer: Resident) -> None:
        idle = [r for r in self._residents.values() if not (r.pinned or r.users)]
        idle.sort(key=lambda resident: resident.used)
        free = self._limit - sum(r.num_bytes for r in self._residents.values())
        if free + sum(r.num_bytes for r in idle) < newcomer.num_bytes:
            raise ApiError(503, f"{newcomer.ref} needs {newcomer.num_bytes} bytes, and what is loaded is "
                           "pinned or in use; unpin a cartridge or raise serve.resident_bytes",
                           "no_room", retry_after=1)
        while free < newcomer.num_bytes:
            free += idle[0].num_bytes
            self._evict(idle.pop(0).ref, "lru")

    def _expire(self) -> None:
        now = time.monotonic()
        for resident in list(self._residents.values()):
            idle = resident.ttl_s is not None and not (resident.users or resident.pinned)
            if idle and now - resident.used > resident.ttl_s:
                self._evict(resident.ref, "ttl")

    def _evict(self, ref: str, reason: str) -> None:
        resident = self._residents.pop(ref)
        self._forget(resident.prefix.digest)
        self._metrics.add("cartridges_evictions_total", model=_name(ref), reason=reason)
        self._show_bytes(ref)

    def _show_bytes(self, ref: str) -> None:
        name = _name(ref)
        held = sum(r.num_bytes for r in self._residents.values() if _name(r.ref) == name)
        if held:
            self._metrics.put("cartridges_resident_bytes", held, model=name)
        else:
            self._metrics.forget("cartridges_resident_bytes", model=name)

    def _count_load(self, ref: str, result: str, began: float) -> None:
        self._metrics.add("cartridges_loads_total", model=_name(ref), result=result)
        self._metrics.observe("cartridges_load_seconds", time.monotonic() - began, model=_name(ref))


def _bytes(artifact: Artifact) -> int:
    """float32 keys and values, as they are held."""
    return artifact.cartridge.shape.bytes_per_token(4) * artifact.cartridge.num_tokens


def _name(ref: str) -> str:
    """`model` of the metrics."""
    return SEVERAL if PLUS in ref else ref.partition("@")[0]
