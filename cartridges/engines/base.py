"""The interface of an inference engine. `transformers` is the reference; `vllm` must match it.

An engine answers conversations that follow a *prefix* in the KV cache. Every arm of the report
card, every teacher and every served request consists of a prefix and a conversation:

    None                    the base model as its chat template opens (default system turn)
    TextPrefix(text)        a system turn that holds the text (a chunk, or the whole corpus)
    CartridgePrefix(...)    a trained KV cache in place of that system turn
    RawPrefix(text)         plain text, no template: few-shot completion by the asking side
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cartridges.cartridge import Cartridge


@dataclass(frozen=True)
class TextPrefix:
    """A system turn around `text`, rendered by `cartridges.template`.

    `shared` says that many requests use this text, so a service caches its KV. A text retrieved for one question is
    not shared and must not be cached: a faster answer would reveal to others what was asked.
    """

    text: str
    shared: bool = True


@dataclass(frozen=True)
class RawPrefix:
    """`text` tokenised without a chat template."""

    text: str


@dataclass(frozen=True)
class CartridgePrefix:
    """`cartridge` in place of a system turn. `digest` names its bytes (prefix-cache salt)."""

    cartridge: Cartridge
    digest: str


Prefix = TextPrefix | RawPrefix | CartridgePrefix | None


@dataclass(frozen=True)
class Request:
    """Generate after `prefix` + `input_ids`.

    `input_ids` comes from `template.conversation_ids(messages, generation_prompt=True)`.
    `topk > 0` asks for the top-k logprobs of every generated token, always of the T=1
    distribution whatever the sampling temperature. `seed` makes sampling repeatable. `ignore_end`
    continues past end-of-turn tokens to `max_tokens`, for measuring speed.
    """

    input_ids: tuple[int, ...]
    prefix: Prefix = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    topk: int = 0
    ignore_end: bool = False


@dataclass(frozen=True)
class Completion:
    """A generated answer. `output_ids` includes the end-of-turn token if there was one.

    `text` is `output_ids` decoded without special tokens and cut before a stop string.
    `finish_reason` is "stop" or "length". `logprobs` float32 `[n]` are those of the chosen tokens at T=1;
    `topk_ids` int32 and `topk_logprobs` float32 are `[n, topk]`, or None when `topk == 0`.
    """

    output_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Score a given conversation after `prefix`: row `i` predicts `input_ids[i + 1]`."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    prefix: Prefix = None
    topk: int = 0


@dataclass(frozen=True)
class Score:
    """`logprobs` float32 `[m]` of the given next tokens at the `m` loss positions, in order, and the
    top-k rows `[m, topk]` (None when `topk == 0`)."""

    logprobs: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One generated token of a stream. `text` is the text that became printable with it (may be empty).

    The last event of a stream has `finish_reason` "stop" or "length".
    """

    token_id: int
    text: str
    logprob: float
    topk_ids: tuple[int, ...] = ()
    topk_logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None


class Engine(Protocol):
    """Batch inference, in the order of the requests. Errors propagate."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]: ...


class EngineLost(RuntimeError):
    """The engine is gone and does not come back by itself: whoever made it must make another."""


class StreamingEngine(Protocol):
    """Serving. Closing the iterator (when a client leaves) frees the request's slot at once.

    Cached conversations are never shared between tenants: the speed of an answer must not reveal to one tenant
    what another has asked.
    """

    def stream(self, request: Request, tenant: str = "") -> AsyncIterator[TokenEvent]: ...

    def check_health(self) -> None:
        """Raises `EngineLost` once the engine can answer no request any more."""
        ...

    def close(self) -> None:
        """Stop, and remove what was written to disk."""
        ...
