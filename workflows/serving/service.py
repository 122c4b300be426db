"""The service without HTTP: which cartridge, which tokens, whether there is room, what was measured."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from cartridges.config import ReplicaSettings, ServeSettings
from cartridges.engines.base import TokenEvent
from cartridges.models import ModelIdentity
from cartridges.template import ChatTemplate
from workflows.serving.api import MAX_CHOICES, ChatRequest, CompletionRequest, Generation
from workflows.serving.backend import Backend, EngineCall
from workflows.serving.catalog import Catalog, Target
from workflows.serving.errors import ApiError
from workflows.serving.metrics import Metrics, exposition
from workflows.serving.prompts import chat_ids, raw_ids


@dataclass(frozen=True)
class Plan:
    """A checked request: one `EngineCall` for every choice of the answer.

    `prompt_tokens` counts prefix and prompts, `cached_tokens` the cartridge's part of it.
    """

    target: Target
    calls: tuple[EngineCall, ...]
    prompt_tokens: int
    cached_tokens: int
    arrived: float = field(default_factory=time.monotonic)


class CartridgeService:
    """Everything the HTTP app does, over a `Catalog` and a `Backend`. Refusals are `ApiError`."""

    def __init__(self, catalog: Catalog, backend: Backend, template: ChatTemplate, settings: ServeSettings):
        self.catalog, self.backend, self.template, self.settings = catalog, backend, template, settings
        self.metrics = Metrics("ingress")
        self.in_flight = 0
        self.draining = False
        self._default_tokens = len(template.default_ids())

    @property
    def identity(self) -> ModelIdentity:
        return self.catalog.identity

    async def plan(self, body: Generation) -> Plan:
        """Check `body` and render its prompts. In a thread: the registry and the tokenizer take time."""
        return await asyncio.to_thread(self._plan, body)

    def _plan(self, body: Generation) -> Plan:
        target = self.catalog.resolve(body.model)
        if body.cartridges:
            raise ApiError(400, "cartridges: several in one request are not offered; name one as the model",
                           "composition_not_tested", "cartridges")
        if body.full_context:
            raise ApiError(400, "full_context: this service does not hold the corpus's text",
                           "corpus_not_available", "full_context")
        prompts = self._prompts(body)
        if len(prompts) * body.n > MAX_CHOICES:
            raise ApiError(400, f"prompts times n must be at most {MAX_CHOICES}", param="n")
        prefix_tokens = target.num_tokens if target.entry else self._default_tokens
        calls = tuple(self._call(body, target, ids, prefix_tokens, choice)
                      for ids in prompts for choice in range(body.n))
        prompt_tokens = sum(prefix_tokens + len(ids) for ids in prompts)
        return Plan(target, calls, prompt_tokens, target.num_tokens * len(prompts))

    def _prompts(self, body: Generation) -> list[tuple[int, ...]]:
        if isinstance(body, ChatRequest):
            return [chat_ids(self.template, body.messages)]
        assert isinstance(body, CompletionRequest)
        return [raw_ids(self.template, prompt, self.identity.vocab_size) for prompt in body.prompts]

    def _call(self, body: Generation, target: Target, ids: tuple[int, ...], prefix_tokens: int,
              choice: int) -> EngineCall:
        temperature = self.settings.default_temperature if body.temperature is None else body.temperature
        seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
        return EngineCall(target.ref, ids, self._max_tokens(body, prefix_tokens, len(ids)), temperature,
                          body.top_p, seed + choice, body.stops, body.topk or 0)

    def _max_tokens(self, body: Generation, prefix_tokens: int, prompt_tokens: int) -> int:
        window = self.identity.max_position_embeddings
        room = window - prefix_tokens - prompt_tokens
        limit, asked = self.settings.max_tokens_limit, body.answer_tokens
        if prompt_tokens == 0:
            raise ApiError(400, "the prompt is empty; send at least one token", param="prompt")
        if room < (asked or 1):
            raise ApiError(400, f"the model's window is {window} tokens: cartridge or system turn "
                           f"{prefix_tokens}, prompt {prompt_tokens}, answer {asked or 1}",
                           "context_length_exceeded")
        if asked and asked > limit:
            raise ApiError(400, f"max_tokens {asked} is above this service's limit of {limit}",
                           "max_tokens_exceeded", "max_tokens")
        return asked or min(limit, room)

    async def generate(self, plan: Plan) -> AsyncIterator[tuple[int, TokenEvent]]:
        """(choice, event) as they come. Close it to stop at once.

        ApiError 429 when too much is in flight, 503 while draining, 504 after the time limit.
        """
        with self._admitted(plan) as watch:
            deadline = plan.arrived + self.settings.request_timeout_s
            async with aclosing(merge([self.backend.stream(call) for call in plan.calls])) as events:
                while True:
                    try:
                        item = await asyncio.wait_for(events.__anext__(), deadline - time.monotonic())
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        raise ApiError(504, f"not finished after {self.settings.request_timeout_s:g} s; "
                                       "ask for fewer tokens", "timeout") from None
                    watch.token()
                    yield item

    @contextmanager
    def _admitted(self, plan: Plan) -> Iterator["Watch"]:
        if self.draining:
            self.metrics.add("cartridges_rejected_total", reason="draining")
            raise ApiError(503, "the service is shutting down", "draining", retry_after=5)
        if self.in_flight + len(plan.calls) > self.settings.max_queue:
            self.metrics.add("cartridges_rejected_total", reason="queue_full")
            raise ApiError(429, f"{self.in_flight} requests are in flight; try again in a moment",
                           "queue_full", retry_after=1)
        self.in_flight += len(plan.calls)
        watch = Watch(self.metrics, plan)
        try:
            yield watch
        finally:
            self.in_flight -= len(plan.calls)
            watch.end()

    async def drain(self) -> None:
        """Refuse new requests and wait, at most `drain_s` seconds, for those that run."""
        self.draining = True
        deadline = time.monotonic() + self.settings.drain_s
        while self.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def exposition(self) -> bytes:
        """Prometheus text of this process and of the engine behind it."""
        return exposition([*self.metrics.families(), *await self.backend.families()])

    async def describe(self) -> list[dict[str, Any]]:
        """Every cartridge on offer, and where it is loaded, how."""
        entries = await asyncio.to_thread(self.catalog.entries)
        residents = await self.backend.residents()
        return [self._describe(Target(entry.name, entry), residents) for entry in entries]

    async def find(self, name: str) -> dict[str, Any]:
        target = await self.cartridge(name)
        return self._describe(target, await self.backend.residents())

    async def hold(self, name: str, pinned: bool | None, ttl_s: float | None) -> dict[str, Any]:
        """Load a cartridge and set its pin and idle limit."""
        target = await self.cartridge(name)
        return self._describe(target, {target.ref: await self.backend.hold(target.ref, pinned, ttl_s)})

    async def release(self, name: str) -> dict[str, Any]:
        target = await self.cartridge(name)
        await self.backend.release(target.ref)
        return self._describe(target, {})

    async def dedicate(self, name: str, replicas: ReplicaSettings) -> dict[str, Any]:
        """Give a cartridge replicas of its own; the other cartridges' requests go on."""
        target = await self.cartridge(name)
        await self.backend.dedicate(target.label, replicas)
        return {"id": target.label, "object": "cartridge.replicas", **replicas.model_dump()}

    async def share(self, name: str) -> dict[str, Any]:
        """Back to the shared replicas."""
        target = await self.cartridge(name)
        await self.backend.share(target.label)
        return {"id": target.label, "object": "cartridge.replicas", "deleted": True}

    async def cartridge(self, name: str) -> Target:
        target = await asyncio.to_thread(self.catalog.resolve, name)
        if target.entry is None:
            raise ApiError(404, f"{name[:100]!r} is the base model, not a cartridge", "model_not_found")
        return target

    def _describe(self, target: Target, residents: dict[str, dict[str, Any]]) -> dict[str, Any]:
        manifest = target.entry.manifest
        return {"id": target.entry.name, "object": "cartridge", "version": target.entry.version,
                "aliases": list(target.entry.aliases), "num_tokens": manifest.num_tokens,
                "corpus": manifest.corpus.model_dump(mode="json"), "loaded": residents.get(target.ref)}


class Watch:
    """Times and tokens of one request, into the metrics."""

    def __init__(self, metrics: Metrics, plan: Plan):
        self.metrics, self.plan, self.model = metrics, plan, plan.target.label
        self.tokens = 0
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
            self.metrics.observe("cartridges_ttft_seconds", self.first - self.plan.arrived, model=self.model)
        self.tokens += 1

    def end(self) -> None:
        self.metrics.add("cartridges_in_flight", -1, model=self.model)
        if not self.tokens:
            self.metrics.add("cartridges_queued", -1, model=self.model)
        if self.tokens > 1:
            self.metrics.observe("cartridges_tpot_seconds", (self.last - self.first) / (self.tokens - 1),
                                 model=self.model)
        self.metrics.add("cartridges_generation_tokens_total", self.tokens, model=self.model)
        self.metrics.observe("cartridges_request_seconds", time.monotonic() - self.plan.arrived,
                             model=self.model)


async def merge(streams: list[AsyncIterator[TokenEvent]]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """(index, event) of several streams as they come. An error in one ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        for index, stream in enumerate(streams):
            task = asyncio.create_task(_pump(index, stream, queue))
            stack.push_async_callback(_stop, task)
        for _ in streams:
            while (item := await queue.get())[1] is not None:
                if isinstance(item[1], BaseException):
                    raise item[1]
                yield item


async def _pump(index: int, stream: AsyncIterator[TokenEvent], queue: asyncio.Queue) -> None:
    try:
        async with aclosing(stream) as events:
            async for event in events:
                queue.put_nowait((index, event))
    except Exception as error:  # noqa: BLE001  It is raised again in `merge`.
        queue.put_nowait((index, error))
    queue.put_nowait((index, None))


async def _stop(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
