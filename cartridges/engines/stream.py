"""Streaming on a Hugging Face model: the next tokens of all active requests are decoded together.

This is the reference for faster serving engines. One worker thread runs in turns (continuous batching: requests
join and leave at any turn). In each turn, every request still in prefill advances by one piece, and every request
in decoding gets a token in one shared forward pass. Arithmetic is in the model's dtype.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator, Sequence

import torch

from cartridges.attention import AttentionContext, causal_bias
from cartridges.engines.answer import Answer, stop_token_ids
from cartridges.engines.base import CartridgePrefix, EngineLost, Request, TextPrefix, TokenEvent
from cartridges.engines.batching import power_of_two
from cartridges.engines.prefix_cache import PrefixCache, cartridge_kv, prefix_ids, prefix_key
from cartridges.engines.sampling import Draws, sample
from cartridges.errors import UserError
from cartridges.forward import PrefixKV, hidden_states, round_up
from cartridges.models import BaseModel
from cartridges.row_attention import RowKV

PREFILL_TOKENS = 512
"""Longest piece of prefill in one turn, so that a long prompt does not block the other streams."""
PREFILL_MULTIPLE = 16
"""Pieces are padded to multiples of this: on a CPU every new bfloat16 shape costs a kernel build."""

Turns = Generator[None, None, None]


class TransformersStreamingEngine:
    """`StreamingEngine` over `base`. At most `max_active` requests run at once; the others wait.

    The KV of prefixes (cartridges, texts, the default system turn) is cached up to `prefix_bytes` bytes.
    """

    def __init__(self, base: BaseModel, max_active: int = 16, prefix_bytes: int = 1 << 30):
        self.base = base
        self.max_active = max_active
        self.prefixes = PrefixCache(prefix_bytes)
        self._head = base.model.get_output_embeddings()
        self._stop_ids = stop_token_ids(base.model.generation_config, base.tokenizer)
        self._waiting: deque[_Stream] = deque()
        self._active: list[_Stream] = []
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work, name="streaming-engine", daemon=True)
        self._worker.start()

    async def stream(self, request: Request, tenant: str = "") -> AsyncIterator[TokenEvent]:
        """Raises `UserError` when prefix, prompt and answer do not fit the model's window.

        Only shared prefixes are cached, never conversations, so `tenant` makes no difference.
        """
        stream = _Stream(request, asyncio.get_running_loop())
        stream.turns = self._read(stream)
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

    def check_health(self) -> None:
        """Raises `EngineLost` once the worker thread has ended."""
        if not self._worker.is_alive():
            raise EngineLost("the engine's thread has ended")

    def forget(self, digest: str) -> None:
        """Drop a cartridge's KV. Running requests keep their own copy."""
        self.prefixes.drop(digest)

    def close(self) -> None:
        """Stop the worker. Running requests end with `RuntimeError`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._worker.join()

    # The worker thread.

    def _work(self) -> None:
        with torch.inference_mode():
            while self._admit():
                writing = [stream for stream in self._active if stream.decoded and not stream.over]
                self._attempt(writing, lambda: self._write(writing))  # noqa: B023  called immediately
                for stream in self._active:
                    if not (stream.decoded or stream.over):
                        self._attempt([stream], lambda: next(stream.turns, None))  # noqa: B023
                for stream in self._active:
                    if stream.over:
                        stream.turns.close()  # frees the KV of a request that was still in prefill
                self._active = [stream for stream in self._active if not stream.over]
        for stream in [*self._waiting, *self._active]:
            stream.send(RuntimeError("the engine was closed"))

    def _admit(self) -> bool:
        """Fill free slots from the queue; sleep while there is nothing to do. False once closed."""
        with self._changed:
            while not (self._waiting or self._active or self._closed):
                self._changed.wait()
            while self._waiting and len(self._active) < self.max_active:
                self._active.append(self._waiting.popleft())
            return not self._closed

    @staticmethod
    def _attempt(streams: Sequence["_Stream"], turn) -> None:
        try:
            turn()
        except Exception as error:  # noqa: BLE001  raised again in `stream`
            if len(streams) == 1:
                streams[0].send(error)
                return
            for stream in streams:
                stream.send(RuntimeError(f"decoding failed: {type(error).__name__}: {error}"))

    def _write(self, streams: Sequence["_Stream"]) -> None:
        """Decode the next token of each stream in one forward pass."""
        if not streams:
            return
        decoded = [stream.decoded for stream in streams]
        ids = torch.zeros(power_of_two(len(streams)), 1, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for index, one in enumerate(decoded):
            ids[index], positions[index] = one.answer.token_ids[-1], one.row.length
            one.row.reserve(1)
        hidden = self._hidden(ids, positions, AttentionContext(rows=[one.row for one in decoded]))
        for one in decoded:
            one.row.length += 1
        self._choose(streams, self._head(hidden[:, -1])[:len(streams)])

    def _choose(self, streams: Sequence["_Stream"], logits: torch.Tensor) -> None:
        """Sample a token for each of `streams` from `logits` `[streams, vocab_size]` and send it."""
        logprobs = logits.float().cpu().log_softmax(-1)
        requests = [stream.request for stream in streams]
        tokens = sample(logprobs, torch.tensor([request.temperature for request in requests]),
                        [request.top_p for request in requests],
                        torch.tensor([stream.decoded.draws.next() for stream in streams]))
        for stream, token_id, row in zip(streams, tokens.tolist(), logprobs, strict=True):
            self._attempt([stream], lambda: stream.send(stream.decoded.take(token_id, row)))  # noqa: B023

    def _read(self, stream: "_Stream") -> Turns:
        """Prefill prefix and prompt, one piece each turn, then send the first token of the answer."""
        request = stream.request
        row = yield from self._after_prefix(request)
        self._check_window(row.length, request)
        hidden = yield from self._prefill(request.input_ids, row)
        stream.decoded = _Decoded(row, Draws(request.seed), Answer(request, self.base.tokenizer, self._stop_ids))
        self._choose([stream], self._head(hidden))

    def _after_prefix(self, request: Request) -> Generator[None, None, RowKV]:
        prefix, key = request.prefix, prefix_key(request.prefix)
        found = self.prefixes.get(key)
        if found is None and isinstance(prefix, CartridgePrefix):
            found = cartridge_kv(self.base, prefix)
            self.prefixes.put(key, found)
        if found is not None:
            return RowKV.after(list(zip(found.keys[:, None], found.values[:, None], strict=True)))
        row = yield from self._read_text(request)
        yield None
        if not isinstance(prefix, TextPrefix) or prefix.shared:
            self.prefixes.put(key, PrefixKV(*(torch.stack([layer[0, :, :row.length] for layer in layers])
                                              for layers in (row.keys, row.values))))
        return row

    def _read_text(self, request: Request) -> Generator[None, None, RowKV]:
        shape = self.base.shape
        ids = prefix_ids(self.base.template, request.prefix)
        self._check_window(len(ids), request)
        size = (1, shape.num_key_value_heads, 0, shape.head_dim)
        empty = [torch.zeros(size, dtype=self.base.dtype, device=self.base.device)] * shape.num_layers
        row = RowKV(empty, list(empty))
        if ids:  # some templates (Qwen3's) put nothing before a conversation
            yield from self._prefill(ids, row)
        return row

    def _prefill(self, ids: Sequence[int], row: RowKV) -> Generator[None, None, torch.Tensor]:
        """Append the KV of `ids` to `row`; the last hidden state `[1, hidden]`."""
        for done in range(0, len(ids), PREFILL_TOKENS):
            if done:
                yield None
            hidden = self._read_piece(ids[done:done + PREFILL_TOKENS], row)
        return hidden

    def _read_piece(self, ids: Sequence[int], row: RowKV) -> torch.Tensor:
        # Attention is causal, so padding on the right does not affect the tokens before it.
        padded = torch.zeros(1, round_up(len(ids), PREFILL_MULTIPLE), dtype=torch.long)
        padded[0, :len(ids)] = torch.tensor(ids)
        tokens = padded.shape[1]
        row.reserve(tokens)
        bias = causal_bias(tokens, row.length + tokens, self.base.dtype, self.base.device)
        hidden = self._hidden(padded, row.length + torch.arange(tokens)[None],
                              AttentionContext(rows=[row], own_bias=bias[None]))
        row.length += len(ids)
        return hidden[:, len(ids) - 1]

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        return hidden_states(self.base.model, ids.to(self.base.device), positions.to(self.base.device), context)

    def _check_window(self, prefix_tokens: int, request: Request) -> None:
        window = self.base.identity.max_position_embeddings
        needed = prefix_tokens + len(request.input_ids) + request.max_tokens
        if needed > window:
            raise UserError(f"prefix ({prefix_tokens}), prompt ({len(request.input_ids)}) and answer "
                            f"({request.max_tokens}) exceed the model's window of {window} tokens")
        if not request.input_ids:
            raise UserError("the prompt has no tokens; send at least one")


class _Decoded:
    """A request in decoding: its KV, its random draws and its answer so far."""

    def __init__(self, row: RowKV, draws: Draws, answer: Answer):
        self.row, self.draws, self.answer = row, draws, answer

    def take(self, token_id: int, logprobs: torch.Tensor) -> TokenEvent:
        """The event of the next token; `logprobs` `[vocab_size]` of T=1."""
        k = self.answer.request.topk
        topk_logprobs, topk_ids = logprobs.topk(k) if k else (None, None)
        return self.answer.event(token_id, logprobs[token_id], topk_ids, topk_logprobs)


class _Stream:
    """One request: its turns for the worker thread, its events for the client."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop):
        self.request = request
        self.loop = loop
        self.events: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()
        self.turns: Turns | None = None
        self.decoded: _Decoded | None = None
        self.cancelled = False
        self.done = False

    @property
    def over(self) -> bool:
        return self.done or self.cancelled

    def send(self, event: TokenEvent | BaseException) -> None:
        self.done = isinstance(event, BaseException) or event.finish_reason is not None
        if self.loop.is_closed():
            self.cancelled = True
            return
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)
