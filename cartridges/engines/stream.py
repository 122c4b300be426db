"""Streaming on a Hugging Face model: several clients at once, whose next tokens are decoded together.

The reference that a faster serving engine must match. One worker thread takes turns: in each, every request
that is still read gets one piece of prefill, and all that are being answered get a token in one forward pass
(continuous batching: requests join and leave at any turn). Arithmetic is the model's own dtype.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator, Sequence

import torch

from cartridges.attention import AttentionContext, causal_bias
from cartridges.engines.base import CartridgePrefix, EngineLost, Request, TextPrefix, TokenEvent
from cartridges.engines.batching import power_of_two
from cartridges.engines.decoding import stop_token_ids
from cartridges.engines.detokenize import TextStream
from cartridges.engines.prefix_store import LayerKV, PrefixStore, prefix_key
from cartridges.engines.sampling import Draws, sample
from cartridges.errors import UserError
from cartridges.forward import hidden_states, round_up
from cartridges.models import BaseModel
from cartridges.row_attention import RowKV

PREFILL_TOKENS = 512
"""Longest piece of prefill in one turn, so that a long prompt does not hold up the other streams."""
PREFILL_MULTIPLE = 16
"""Pieces are padded to multiples of this: on a CPU every new bfloat16 shape costs a kernel build."""

Turns = Generator[None, None, None]


class TransformersStreamingEngine:
    """`StreamingEngine` over `base`. At most `max_active` requests decode at once, the rest wait.

    The KV of prefixes (cartridges, texts, the default system turn) is kept, least recently used out
    first, up to `prefix_bytes` bytes.
    """

    def __init__(self, base: BaseModel, max_active: int = 16, prefix_bytes: int = 1 << 30):
        self.base = base
        self.max_active = max_active
        self.prefixes = PrefixStore(prefix_bytes)
        self._head = base.model.get_output_embeddings()
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
        with torch.inference_mode():
            while self._admit():
                writing = [stream for stream in self._active if stream.answer and not stream.over]
                self._attempt(writing, lambda: self._write(writing))  # noqa: B023  It is called at once.
                for stream in self._active:
                    if not (stream.answer or stream.over):
                        self._attempt([stream], lambda: next(stream.turns, None))  # noqa: B023
                for stream in self._active:
                    if stream.over:
                        stream.turns.close()  # With it goes the KV of one that was still being read.
                self._active = [stream for stream in self._active if not stream.over]
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

    @staticmethod
    def _attempt(streams: Sequence["_Stream"], turn) -> None:
        try:
            turn()
        except Exception as error:  # noqa: BLE001  It is raised again where the streams are read.
            if len(streams) == 1:
                streams[0].send(error)
                return
            for stream in streams:
                stream.send(RuntimeError(f"decoding failed: {type(error).__name__}: {error}"))

    def _write(self, streams: Sequence["_Stream"]) -> None:
        """The next token of each, by one pass over all."""
        if not streams:
            return
        answers = [stream.answer for stream in streams]
        ids = torch.zeros(power_of_two(len(streams)), 1, dtype=torch.long)
        positions = torch.zeros_like(ids)
        for index, answer in enumerate(answers):
            ids[index], positions[index] = answer.last, answer.row.length
            answer.row.reserve(1)
        hidden = self._hidden(ids, positions, AttentionContext(rows=[answer.row for answer in answers]))
        for answer in answers:
            answer.row.length += 1
        self._choose(streams, self._head(hidden[:, -1])[:len(streams)])

    def _choose(self, streams: Sequence["_Stream"], logits: torch.Tensor) -> None:
        """Send each of `streams` its token of `logits` `[streams, vocab_size]`."""
        logprobs = logits.float().cpu().log_softmax(-1)
        requests = [stream.request for stream in streams]
        tokens = sample(logprobs, torch.tensor([request.temperature for request in requests]),
                        [request.top_p for request in requests],
                        torch.tensor([stream.answer.draws.next() for stream in streams]))
        for stream, token_id, row in zip(streams, tokens.tolist(), logprobs, strict=True):
            self._attempt([stream], lambda: stream.send(stream.answer.take(token_id, row)))  # noqa: B023

    def _read(self, stream: "_Stream") -> Turns:
        """Prefix and prompt, a piece each turn, and the first token of the answer."""
        request = stream.request
        row = yield from self._after_prefix(request)
        self._check_window(row.length, request)
        hidden = yield from self._prefill(request.input_ids, row)
        stream.answer = _Answer(request, row, Draws(request.seed), TextStream(self.base.tokenizer, request.stop),
                                self._end_ids)
        self._choose([stream], self._head(hidden))

    def _after_prefix(self, request: Request) -> Generator[None, None, RowKV]:
        prefix, key = request.prefix, prefix_key(request.prefix)
        found = self.prefixes.get(key)
        if found is None and isinstance(prefix, CartridgePrefix):
            found = self._cartridge_kv(prefix)
            self.prefixes.put(key, found)
        if found is not None:
            return RowKV.after(found)
        row = yield from self._read_text(request)
        yield None
        if not isinstance(prefix, TextPrefix) or prefix.shared:
            self.prefixes.put(key, [(keys[:, :, :row.length].clone(), values[:, :, :row.length].clone())
                                    for keys, values in zip(row.keys, row.values, strict=True)])
        return row

    def _cartridge_kv(self, prefix: CartridgePrefix) -> LayerKV:
        place = {"device": self.base.device, "dtype": self.base.dtype}
        return [(keys[None].to(**place), values[None].to(**place))
                for keys, values in zip(*prefix.cartridge.keys_values(), strict=True)]

    def _read_text(self, request: Request) -> Generator[None, None, RowKV]:
        template, shape = self.base.template, self.base.shape
        ids = template.default_ids() if request.prefix is None else template.system_ids(request.prefix.text)
        self._check_window(len(ids), request)
        size = (1, shape.num_key_value_heads, 0, shape.head_dim)
        empty = [torch.zeros(size, dtype=self.base.dtype, device=self.base.device)] * shape.num_layers
        row = RowKV(empty, list(empty))
        if ids:  # Some templates (Qwen3's) open a conversation with nothing.
            yield from self._prefill(ids, row)
        return row

    def _prefill(self, ids: Sequence[int], row: RowKV) -> Generator[None, None, torch.Tensor]:
        """Last hidden state `[1, hidden]`, after `ids` have been read into `row`."""
        for done in range(0, len(ids), PREFILL_TOKENS):
            if done:
                yield None
            hidden = self._read_piece(ids[done:done + PREFILL_TOKENS], row)
        return hidden

    def _read_piece(self, ids: Sequence[int], row: RowKV) -> torch.Tensor:
        # Causal, so padding on the right changes nothing of what stands before it.
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


class _Answer:
    """What has been answered to one request, and the KV it goes on from."""

    def __init__(self, request: Request, row: RowKV, draws: Draws, text: TextStream, end_ids: frozenset[int]):
        self.request, self.row, self.draws, self.text, self.end_ids = request, row, draws, text, end_ids
        self.last = -1
        self.count = 0

    def take(self, token_id: int, logprobs: torch.Tensor) -> TokenEvent:
        """The event of the next token; `logprobs` `[vocab_size]` of T=1."""
        self.last, self.count = token_id, self.count + 1
        request = self.request
        topk = logprobs.topk(request.topk) if request.topk else None
        ended = token_id in self.end_ids and not request.ignore_end
        piece = "" if ended else self.text.push(token_id)
        stopped = ended or self.text.stopped
        finish_reason = "stop" if stopped else "length" if self.count >= request.max_tokens else None
        return TokenEvent(
            token_id, piece + (self.text.finish() if finish_reason else ""), float(logprobs[token_id]),
            tuple(topk.indices.tolist()) if topk else (), tuple(topk.values.tolist()) if topk else (),
            finish_reason)


class _Stream:
    """One request: its turns on the worker's side, its events on the client's."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop):
        self.request = request
        self.loop = loop
        self.events: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()
        self.turns: Turns | None = None
        self.answer: _Answer | None = None
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
