"""Streaming on stock transformers: several clients at once on one model, one token at a time.

The reference that a faster serving engine must match. One worker thread gives the active requests
turns, one forward pass each; a turn is a piece of prefill or one decoded token. Arithmetic is the
model's own dtype.
"""

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Generator, Iterator

import torch
from transformers import DynamicCache

from cartridges.attention import NAME
from cartridges.engines.base import CartridgePrefix, Prefix, Request, TextPrefix, TokenEvent
from cartridges.engines.decoding import stop_token_ids
from cartridges.engines.detokenize import TextStream
from cartridges.engines.sampling import Draws, sample
from cartridges.errors import UserError
from cartridges.models import BaseModel

PREFILL_TOKENS = 512
"""Longest piece of prefill in one turn, so that a long prompt does not hold up the other streams."""

LayerKV = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer: keys (after RoPE) and values, both `[1, num_key_value_heads, tokens, head_dim]`."""


class TransformersStreamingEngine:
    """`StreamingEngine` over `base`. At most `max_active` requests decode at once, the rest wait.

    The KV of prefixes (cartridges, texts, the default system turn) is kept, least recently used out
    first, up to `prefix_bytes` bytes.
    """

    def __init__(self, base: BaseModel, max_active: int = 16, prefix_bytes: int = 1 << 30):
        self.base = base
        self.max_active = max_active
        self.prefixes = PrefixStore(prefix_bytes)
        self._end_ids = stop_token_ids(base)
        self._waiting: deque[_Stream] = deque()
        self._active: list[_Stream] = []
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="streaming-engine", daemon=True)
        self._worker.start()

    async def stream(self, request: Request, tenant: str = "") -> AsyncIterator[TokenEvent]:
        """Raises `UserError` when prefix, prompt and answer do not fit the model's window.

        Shared prefixes are the only thing cached here, never conversations, so `tenant` parts nothing.
        """
        stream = _Stream(self._generate(request), asyncio.get_running_loop())
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(stream)
            self._changed.notify()
        try:
            while True:
                event = await stream.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if event.finish_reason:
                    return
        finally:
            stream.cancelled = True

    @property
    def num_active(self) -> int:
        """Requests waiting or decoding."""
        with self._changed:
            return sum(not stream.cancelled for stream in [*self._waiting, *self._active])

    def forget(self, digest: str) -> None:
        """Drop a cartridge's KV; requests that run keep their own copy."""
        self.prefixes.drop(digest)

    def close(self) -> None:
        """Stop the worker. Requests that run end with `RuntimeError`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    # The worker thread.

    def _work(self) -> None:
        while self._admit():
            for stream in self._active:
                stream.step()
            self._active = [stream for stream in self._active if not (stream.done or stream.cancelled)]
        for stream in [*self._waiting, *self._active]:
            stream.send(RuntimeError("the engine was closed"))

    def _admit(self) -> bool:
        """Fill free slots from the queue; sleep while there is nothing to do. False: closed."""
        with self._changed:
            while not (self._waiting or self._active or self._closed):
                self._changed.wait()
            while self._waiting and len(self._active) < self.max_active:
                self._active.append(self._waiting.popleft())
            return not self._closed

    def _generate(self, request: Request) -> Iterator[TokenEvent | None]:
        """Every `next` is one turn: None for prefill, an event for a token."""
        if self.base.model.config._attn_implementation == NAME:
            # Its attention does not read a DynamicCache's past as this path needs it.
            raise ValueError("the batch engine's attention is installed in this model; load another copy")
        prefix_kv = yield from self._prefix_kv(request)
        start = prefix_kv[0][0].shape[2] if prefix_kv else 0
        self._check_window(start, request)
        # The cache's own first update copies the prefix: what is stored is never written to.
        cache = DynamicCache(prefix_kv or None, config=self.base.model.config)
        logits = yield from self._prefill(list(request.input_ids), cache, start)
        draws = Draws(request.seed)
        text = TextStream(self.base.tokenizer, request.stop)
        for count in range(1, request.max_tokens + 1):
            event = self._choose(logits, request, draws, text, last=count == request.max_tokens)
            yield event
            if event.finish_reason:
                return
            logits = self._forward([event.token_id], cache, start + len(request.input_ids) + count - 1)

    def _choose(self, logits, request: Request, draws: Draws, text: TextStream, last: bool) -> TokenEvent:
        logprobs = torch.log_softmax(logits, dim=-1)
        token_id = int(sample(logprobs[None], torch.tensor([request.temperature]), [request.top_p],
                              torch.tensor([draws.next()])))
        topk = torch.topk(logprobs, request.topk) if request.topk else None
        ended = token_id in self._end_ids and not request.ignore_end
        piece = "" if ended else text.push(token_id)
        finish_reason = "stop" if ended or text.stopped else "length" if last else None
        return TokenEvent(
            token_id, piece + (text.finish() if finish_reason else ""), float(logprobs[token_id]),
            tuple(topk.indices.tolist()) if topk else (), tuple(topk.values.tolist()) if topk else (),
            finish_reason)

    def _prefix_kv(self, request: Request) -> Generator[None, None, LayerKV]:
        key = _key(request.prefix)
        found = self.prefixes.get(key)
        if found is None:
            found = yield from self._compute_prefix(request)
            if not isinstance(request.prefix, TextPrefix) or request.prefix.shared:
                self.prefixes.put(key, found)
        return found

    def _compute_prefix(self, request: Request) -> Generator[None, None, LayerKV]:
        prefix = request.prefix
        if isinstance(prefix, CartridgePrefix):
            keys, values = prefix.cartridge.keys_values()
            place = {"device": self.base.device, "dtype": self.base.dtype}
            return [(k[None].to(**place), v[None].to(**place)) for k, v in zip(keys, values, strict=True)]
        template = self.base.template
        ids = template.default_ids() if prefix is None else template.system_ids(prefix.text)
        self._check_window(len(ids), request)
        if not ids:  # Some templates (Qwen3's) open a conversation with nothing.
            return []
        cache = DynamicCache(config=self.base.model.config)
        yield from self._prefill(ids, cache, 0)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _prefill(self, ids: list[int], cache: DynamicCache,
                 start: int) -> Generator[None, None, torch.Tensor]:
        for done in range(0, len(ids), PREFILL_TOKENS):
            logits = self._forward(ids[done: done + PREFILL_TOKENS], cache, start + done)
            yield None
        return logits

    def _forward(self, ids: list[int], cache: DynamicCache, start: int) -> torch.Tensor:
        """float32 logits `[vocab_size]` after the last of `ids`, which take positions `start`..."""
        output = self.base.model(
            input_ids=torch.tensor([ids], device=self.base.device), past_key_values=cache, use_cache=True,
            position_ids=torch.arange(start, start + len(ids), device=self.base.device)[None],
            logits_to_keep=1)
        return output.logits[0, -1].float().cpu()

    def _check_window(self, prefix_tokens: int, request: Request) -> None:
        window = self.base.identity.max_position_embeddings
        needed = prefix_tokens + len(request.input_ids) + request.max_tokens
        if needed > window:
            raise UserError(f"prefix ({prefix_tokens}), prompt ({len(request.input_ids)}) and answer "
                            f"({request.max_tokens}) exceed the model's window of {window} tokens")
        if not request.input_ids:
            raise UserError("the prompt has no tokens; send at least one")


class _Stream:
    """One request: its turns on the worker's side, its events on the client's."""

    def __init__(self, turns: Iterator[TokenEvent | None], loop: asyncio.AbstractEventLoop):
        self.turns = turns
        self.loop = loop
        self.events: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()
        self.cancelled = False
        self.done = False

    def step(self) -> None:
        if self.cancelled:
            return
        try:
            with torch.inference_mode():
                event = next(self.turns)
        except Exception as error:  # noqa: BLE001  It is raised again where the stream is read.
            event = error
        if event is not None:
            self.send(event)

    def send(self, event: TokenEvent | BaseException) -> None:
        self.done = isinstance(event, BaseException) or event.finish_reason is not None
        if self.loop.is_closed():
            self.cancelled = True
            return
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class PrefixStore:
    """KV of prefixes by key, least recently used out first, at most `limit` bytes (one always fits)."""

    def __init__(self, limit: int):
        self.limit = limit
        self._entries: OrderedDict[str, LayerKV] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return sum(kv_bytes(kv) for kv in self._entries.values())

    def get(self, key: str) -> LayerKV | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: str, kv: LayerKV) -> None:
        with self._lock:
            self._entries[key] = kv
            while self.num_bytes > self.limit and len(self._entries) > 1:
                self._entries.popitem(last=False)

    def drop(self, key: str) -> None:
        with self._lock:
            self._entries.pop(key, None)


def kv_bytes(kv: LayerKV) -> int:
    return sum(k.nbytes + v.nbytes for k, v in kv)


def _key(prefix: Prefix) -> str:
    if isinstance(prefix, CartridgePrefix):
        return prefix.digest
    return "" if prefix is None else f"text:{prefix.text}"
