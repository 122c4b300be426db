"""The KV before each request of a batch: its prefix, and the leading tokens it shares with other requests."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from cartridges.engines.base import CartridgePrefix, Prefix, Request, ScoreRequest
from cartridges.engines.batching import common_starts
from cartridges.engines.prefix_cache import PrefixCache, cartridge_kv, prefix_ids, prefix_key
from cartridges.forward import PrefixKV, extend, prefill
from cartridges.models import BaseModel


@dataclass(frozen=True)
class Trimmed:
    """A request without its first tokens: `common`, shared with other requests, counts to its prefix."""

    prefix: Prefix
    common: tuple[int, ...]
    input_ids: tuple[int, ...]

    @property
    def key(self) -> Hashable:
        return prefix_key(self.prefix), self.common


def trim(requests: Sequence[Request | ScoreRequest], limits: list[int]) -> list[Trimmed]:
    """Split off the start that each request shares with others, at most `limits` tokens of each."""
    starts = common_starts([prefix_key(r.prefix) for r in requests], [r.input_ids for r in requests], limits)
    return [Trimmed(r.prefix, tuple(r.input_ids[:start]), tuple(r.input_ids[start:]))
            for r, start in zip(requests, starts, strict=True)]


class SharedPrefixes:
    """Computes the KV of prefixes and shared starts, and caches up to `max_bytes` bytes of it.

    `computed_tokens` counts the tokens that were not in the cache.
    """

    def __init__(self, base: BaseModel, max_bytes: int):
        self.base = base
        self.cache = PrefixCache(max_bytes)
        self.computed_tokens = 0

    def get(self, request: Trimmed) -> PrefixKV:
        """The KV of a request's prefix, followed by that of the start it shares."""
        before = self._cached((prefix_key(request.prefix), ()), lambda: self._compute(request.prefix))
        if not request.common:
            return before
        return self._cached(request.key, lambda: extend(self.base.model, before, request.common), before.num_tokens)

    def _cached(self, key: Hashable, compute: Callable[[], PrefixKV], known_tokens: int = 0) -> PrefixKV:
        found = self.cache.get(key)
        if found is None:
            found = compute()
            self.computed_tokens += found.num_tokens - known_tokens
            self.cache.put(key, found)
        return found

    def _compute(self, prefix: Prefix) -> PrefixKV:
        if isinstance(prefix, CartridgePrefix):
            return cartridge_kv(self.base, prefix)
        ids = prefix_ids(self.base.template, prefix)
        return prefill(self.base.model, ids) if ids else self._empty()

    def _empty(self) -> PrefixKV:
        shape = self.base.shape
        empty = torch.zeros(shape.num_layers, shape.num_key_value_heads, 0, shape.head_dim,
                            dtype=self.base.dtype, device=self.base.device)
        return PrefixKV(empty, empty)
