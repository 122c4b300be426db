"""What stands before a request, computed once: the KV of prefixes and of starts that requests share."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cartridges.engines.base import CartridgePrefix, Prefix, RawPrefix, Request, ScoreRequest, TextPrefix
from cartridges.engines.batching import common_starts
from cartridges.forward import PrefixKV, extend, prefill
from cartridges.models import BaseModel


@dataclass(frozen=True)
class Trimmed:
    """A request without its first tokens: `common`, shared with others, is part of its prefix."""

    prefix: Prefix
    common: tuple[int, ...]
    input_ids: tuple[int, ...]

    @property
    def key(self):
        return prefix_key(self.prefix), self.common


def trim(requests: Sequence[Request | ScoreRequest], limits: list[int]) -> list[Trimmed]:
    """The requests, each without the start that it shares with others: at most `limits` tokens of each."""
    starts = common_starts([prefix_key(r.prefix) for r in requests], [r.input_ids for r in requests], limits)
    return [Trimmed(r.prefix, tuple(r.input_ids[:start]), tuple(r.input_ids[start:]))
            for r, start in zip(requests, starts, strict=True)]


class PrefixCache:
    """KV of prefixes, least recently used out first once they exceed `max_bytes`.

    `computed_tokens` counts what was computed because it was not there.
    """

    def __init__(self, base: BaseModel, max_bytes: int):
        self.base, self.max_bytes = base, max_bytes
        self.computed_tokens = 0
        self.entries: OrderedDict[object, PrefixKV] = OrderedDict()

    def get(self, row: Trimmed) -> PrefixKV:
        """The KV of a row's prefix and of what it shares with other rows."""
        before = self._get(prefix_key(row.prefix), lambda: self._make(row.prefix))
        if not row.common:
            return before
        return self._get(row.key, lambda: extend(self.base.model, before, row.common), before.num_tokens)

    def num_tokens(self, row: Trimmed) -> int:
        return self.get(row).num_tokens

    def _get(self, key, make, known_tokens: int = 0) -> PrefixKV:
        if key not in self.entries:
            self.entries[key] = make()
            self.computed_tokens += self.entries[key].num_tokens - known_tokens
            while len(self.entries) > 1 and sum(kv.num_bytes for kv in self.entries.values()) > self.max_bytes:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.entries[key]

    def _make(self, prefix: Prefix) -> PrefixKV:
        if isinstance(prefix, CartridgePrefix):
            keys, values = prefix.cartridge.keys_values()
            to = dict(dtype=self.base.dtype, device=self.base.device)
            return PrefixKV(keys.detach().to(**to), values.detach().to(**to))
        ids = prefix_ids(self.base, prefix)
        if not ids:
            shape = self.base.shape
            empty = torch.zeros(shape.num_layers, shape.num_key_value_heads, 0, shape.head_dim,
                                dtype=self.base.dtype, device=self.base.device)
            return PrefixKV(empty, empty)
        return prefill(self.base.model, ids)


def prefix_ids(base: BaseModel, prefix: TextPrefix | RawPrefix | None) -> list[int]:
    """The tokens of a prefix that is text."""
    if isinstance(prefix, RawPrefix):
        return base.tokenizer.encode(prefix.text, add_special_tokens=False)
    return base.template.system_ids(prefix.text) if prefix else base.template.default_ids()


def prefix_key(prefix: Prefix):
    """What makes two prefixes the same: the text, or the digest of the cartridge's bytes."""
    return prefix.digest if isinstance(prefix, CartridgePrefix) else prefix
