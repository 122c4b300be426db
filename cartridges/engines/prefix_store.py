"""KV of prefixes that a streaming engine keeps between requests."""

import threading
from collections import OrderedDict

import torch

from cartridges.engines.base import CartridgePrefix, Prefix

LayerKV = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer: keys (after RoPE) and values, both `[1, num_key_value_heads, tokens, head_dim]`."""


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


def prefix_key(prefix: Prefix) -> str:
    if isinstance(prefix, CartridgePrefix):
        return prefix.digest
    return "" if prefix is None else f"text:{prefix.text}"
