"""The service without HTTP: which cartridge, which tokens, whether there is room, what was measured."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from cartridges.engines.base import TokenEvent
from cartridges.models import ModelIdentity
from cartridges.serve_config import ReplicaSettings, ServeSettings
from cartridges.template import ChatTemplate
from workflows.serving.access import ANYONE, Caller
from workflows.serving.api import Generation
from workflows.serving.backend import Backend
from workflows.serving.catalog import AUTO, Catalog, Target
from workflows.serving.errors import ApiError, draining
from workflows.serving.metrics import Metrics, exposition
from workflows.serving.plans import Plan, Planner
from workflows.serving.streams import merge
from workflows.serving.uncertainty import mean_entropy

log = logging.getLogger(__name__)
T = TypeVar("T")
Events = AsyncGenerator[tuple[int, TokenEvent], None]
"""(choice, event) as they come."""


LINGER_S = 1.0
"""Seconds that a drained service goes on refusing, so that clients hear its 503 and not a route that is gone."""


class CartridgeService:
    """Everything the HTTP app does, over a `Catalog` and a `Backend`. Refusals are `ApiError`.

    `window`: tokens that the engine takes (0: the model's window).
    """

    def __init__(self, catalog: Catalog, backend: Backend, template: ChatTemplate, settings: ServeSettings,
                 window: int = 0):
        self.catalog, self.backend, self.template, self.settings = catalog, backend, template, settings
        self.metrics = Metrics("ingress")
        self.in_flight = 0
        self._ends = math.inf  # On time.monotonic's clock; finite while draining.
        self.planner = Planner(catalog, template, settings, window)
        self._search_threads = ThreadPoolExecutor(2, "search")
        if settings.search_at_start:
            self._search_threads.submit(self.planner.search.warm)

    @property
    def draining(self) -> bool:
        """Whether the service is being stopped: nothing new is accepted."""
        return self._ends < math.inf

    @property
    def identity(self) -> ModelIdentity:
        return self.catalog.identity

    async def start(self, body: Generation, caller: Caller = ANYONE) -> tuple[Plan, Events]:
        """The plan that is followed, and (choice, event) as they come. Close the events to stop at once.

        ApiError 429 when too much is in flight, 503 while draining, 504 after the time limit, and what the
        planner refuses. Where the plan asks for a fallback and the first tokens are too unsure, these are thrown
        away and the answer comes from the corpus' text. So nothing that was sent is taken back. Where the text
        cannot be had, the cartridge's answer stands.
        """
        events = self._admit(body, caller)
        return await anext(events), events

    async def plan(self, body: Generation, caller: Caller = ANYONE) -> Plan:
        """Check `body` and render its prompts. In a thread: the registry and the tokenizer take time."""
        if body.model == AUTO:
            return await self._in_search(self.planner.plan, body, caller)
        return await asyncio.to_thread(self.planner.plan, body, caller)

    async def _in_search(self, work: Callable[..., T], *arguments: Any) -> T:
        """In threads of its own: the first search reads every corpus, and other requests must not wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self._search_threads, work, *arguments)

    async def _admit(self, body: Generation, caller: Caller) -> AsyncGenerator[Any, None]:
        """First the plan that is followed, then its events. Admitted once, for whatever it takes."""
        with self._admitted(body.choices):
            arrived = time.monotonic()
            plan = await self._in_time(arrived, self.plan(body, caller))
            plan = replace(plan, arrived=arrived)
            items = self._follow(plan) if plan.fallback is None else self._with_fallback(plan, body, caller)
            async with aclosing(items):
                async for item in items:
                    yield item

    async def _follow(self, plan: Plan) -> AsyncGenerator[Any, None]:
        yield plan
        with RequestTimer(self.metrics, plan) as timer:
            async with aclosing(self._events(plan, timer)) as events:
                async for item in events:
                    yield item

    async def _with_fallback(self, plan: Plan, body: Generation, caller: Caller) -> AsyncGenerator[Any, None]:
        assert plan.fallback
        with RequestTimer(self.metrics, plan) as timer:
            async with aclosing(self._events(plan, timer)) as events:
                first = await _take(events, plan.fallback.tokens)
                entropy = mean_entropy([event for _, event in first])
                plan = replace(plan, fallback=replace(plan.fallback, entropy=entropy))
                other = await self._fallback_plan(plan, body, caller) if entropy > plan.fallback.threshold else None
                if other is None:
                    yield plan
                    for item in first:
                        yield item
                    async for item in events:
                        yield item
                    return
            timer.discarded = True
        self.metrics.add("cartridges_fallbacks_total", model=plan.label)
        async with aclosing(self._follow(other)) as items:
            async for item in items:
                yield item

    async def _fallback_plan(self, plan: Plan, body: Generation, caller: Caller) -> Plan | None:
        """The plan to fall back to, if there is one."""
        try:
            return await self._in_search(self.planner.fall_back, body, caller, plan)
        except ApiError as error:
            log.warning("no fallback for %s: %s", plan.label, error)
            return None

    async def _events(self, plan: Plan, timer: "RequestTimer") -> Events:
        async with aclosing(merge([self.backend.stream(call) for call in plan.calls])) as events:
            while True:
                try:
                    item = await self._in_time(plan.arrived, events.__anext__())
                except StopAsyncIteration:
                    return
                timer.token()
                yield item

    async def _in_time(self, arrived: float, work: Awaitable[T]) -> T:
        """`work`'s result within the time that a request has, or that a service has which is being stopped."""
        try:
            deadline = min(arrived + self.settings.request_timeout_s, self._ends)
            return await asyncio.wait_for(work, deadline - time.monotonic())
        except TimeoutError:
            if time.monotonic() >= self._ends:
                raise draining() from None
            raise ApiError(504, f"not finished after {self.settings.request_timeout_s:g} s; ask for fewer tokens",
                           "timeout") from None

    @contextmanager
    def _admitted(self, choices: int) -> Iterator[None]:
        if self.draining:
            self.metrics.add("cartridges_rejected_total", reason="draining")
            raise draining()
        if choices > self.settings.max_queue:
            raise ApiError(400, f"prompts times n must be at most {self.settings.max_queue} here (serve.max_queue)",
                           param="n")
        if self.in_flight + choices > self.settings.max_queue:
            self.metrics.add("cartridges_rejected_total", reason="queue_full")
            raise ApiError(429, f"{self.in_flight} requests are in flight; try again in a moment",
                           "queue_full", retry_after=1)
        self.in_flight += choices
        try:
            yield
        finally:
            self.in_flight -= choices

    async def drain(self) -> None:
        """Refuse new requests and wait, at most `drain_s` seconds, for those that run; then these are ended.

        It waits `LINGER_S` more, for what was answered to reach its client.
        """
        if not self.draining:
            self._ends = time.monotonic() + self.settings.drain_s
        while self.in_flight and time.monotonic() < self._ends + LINGER_S:
            await asyncio.sleep(0.05)
        await asyncio.sleep(LINGER_S)

    async def exposition(self) -> bytes:
        """Prometheus text of this process and of the engine behind it."""
        return exposition([*self.metrics.families(), *await self.backend.families()])

    async def describe(self, caller: Caller = ANYONE) -> list[dict[str, Any]]:
        """Every cartridge on offer, and where it is loaded, how."""
        entries = await asyncio.to_thread(self.catalog.entries, caller.may_use)
        residents = await self.backend.residents()
        return [self._describe(Target(entry.name, (entry,)), residents) for entry in entries]

    async def find(self, name: str, caller: Caller = ANYONE) -> dict[str, Any]:
        """One cartridge, with its report card and what the composition test found."""
        target = await self.cartridge(name, caller)
        manifest = target.entries[0].manifest
        return self._describe(target, await self.backend.residents()) | {
            "report_card": manifest.report_card, "composition_card": manifest.composition_card}

    async def hold(self, name: str, pinned: bool | None, ttl_s: float | None,
                   caller: Caller = ANYONE) -> dict[str, Any]:
        """Load a cartridge and set its pin and idle limit."""
        target = await self.managed(name, caller)
        return self._describe(target, {target.ref: await self.backend.hold(target.ref, pinned, ttl_s)})

    async def release(self, name: str, caller: Caller = ANYONE) -> dict[str, Any]:
        target = await self.managed(name, caller)
        if not await self.backend.release(target.ref):
            raise ApiError(404, f"{target.ref} is not loaded", "cartridge_not_loaded")
        return self._describe(target, {})

    async def dedicate(self, name: str, replicas: ReplicaSettings, caller: Caller = ANYONE) -> dict[str, Any]:
        """Give a cartridge replicas of its own; the other cartridges' requests go on."""
        target = await self.managed(name, caller)
        await self.backend.dedicate(target.label, replicas)
        return {"id": target.label, "object": "cartridge.replicas", **replicas.model_dump()}

    async def share(self, name: str, caller: Caller = ANYONE) -> dict[str, Any]:
        """Back to the shared replicas."""
        target = await self.managed(name, caller)
        await self.backend.share(target.label)
        return {"id": target.label, "object": "cartridge.replicas", "deleted": True}

    async def managed(self, name: str, caller: Caller) -> Target:
        """The cartridge, for a caller who may manage it. ApiError 403 for others."""
        caller.check_manage()
        return await self.cartridge(name, caller)

    async def cartridge(self, name: str, caller: Caller = ANYONE) -> Target:
        target = await asyncio.to_thread(self.catalog.resolve, name, (), caller.may_use)
        if len(target.entries) != 1:
            raise ApiError(404, f"{name[:100]!r} is not one cartridge", "model_not_found")
        return target

    def _describe(self, target: Target, residents: dict[str, dict[str, Any]]) -> dict[str, Any]:
        (entry,) = target.entries
        manifest = entry.manifest
        return {"id": entry.name, "object": "cartridge", "version": entry.version,
                "aliases": list(entry.aliases), "num_tokens": manifest.num_tokens,
                "corpus": manifest.corpus.model_dump(mode="json"), "loaded": residents.get(target.ref),
                "full_context": manifest.corpus_text is not None and self.settings.full_context,
                "composition": manifest.composition}


async def _take(events: Events, count: int) -> list[tuple[int, TokenEvent]]:
    """The first `count`, or all if there are fewer. `events` stays open."""
    taken = []
    while len(taken) < count and (item := await anext(events, None)) is not None:
        taken.append(item)
    return taken


class RequestTimer:
    """Records the times and tokens of one request as metrics. `discarded`: nothing of it was sent to the client."""

    def __init__(self, metrics: Metrics, plan: Plan):
        self.metrics, self.plan, self.model = metrics, plan, plan.label
        self.tokens = 0
        self.discarded = False
        self.first = self.last = 0.0
        metrics.add("cartridges_in_flight", model=self.model)
        metrics.add("cartridges_queued", model=self.model)
        metrics.add("cartridges_prompt_tokens_total", plan.prompt_tokens, model=self.model)
        metrics.add("cartridges_cached_tokens_total", plan.cached_tokens, model=self.model)

    def token(self) -> None:
        self.last = time.monotonic()
        if not self.tokens:
            self.first = self.last
            self.metrics.add("cartridges_queued", -1, model=self.model)
        self.tokens += 1

    def __enter__(self) -> "RequestTimer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.metrics.add("cartridges_in_flight", -1, model=self.model)
        if not self.tokens:
            self.metrics.add("cartridges_queued", -1, model=self.model)
        self.metrics.add("cartridges_generation_tokens_total", self.tokens, model=self.model)
        if self.discarded:
            return
        if self.tokens:
            self.metrics.observe("cartridges_ttft_seconds", self.first - self.plan.arrived, model=self.model)
        if self.tokens > 1:
            self.metrics.observe("cartridges_tpot_seconds", (self.last - self.first) / (self.tokens - 1),
                                 model=self.model)
        self.metrics.observe("cartridges_request_seconds", time.monotonic() - self.plan.arrived,
                             model=self.model)

