"""KV of prefixes that an engine keeps between requests, and the key by which it finds them again."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

from cartridges.engines.base import CartridgePrefix, Prefix, RawPrefix, TextPrefix
from cartridges.forward import PrefixKV
from cartridges.models import BaseModel
from cartridges.template import ChatTemplate


class PrefixCache:
    """KV by key, up to `max_bytes` bytes; the least recently used entry is evicted first. Thread-safe.

    The newest entry stays even where it alone exceeds `max_bytes`.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, PrefixKV] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        return sum(kv.num_bytes for kv in self._entries.values())

    def get(self, key: Hashable) -> PrefixKV | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, kv: PrefixKV) -> None:
        with self._lock:
            self._entries[key] = kv
            self._entries.move_to_end(key)
            while self.num_bytes > self.max_bytes and len(self._entries) > 1:
                self._entries.popitem(last=False)

    def drop(self, key: Hashable) -> None:
        with self._lock:
            self._entries.pop(key, None)


def prefix_key(prefix: Prefix) -> Hashable:
    """Equal for two prefixes exactly when their KV is: by a cartridge's digest, by a text and how it is rendered."""
    if isinstance(prefix, CartridgePrefix):
        return prefix.digest
    return None if prefix is None else (type(prefix).__name__, prefix.text)


def prefix_ids(template: ChatTemplate, prefix: TextPrefix | RawPrefix | None) -> list[int]:
    """The tokens of a prefix that is text."""
    if isinstance(prefix, RawPrefix):
        return template.tokenizer.encode(prefix.text, add_special_tokens=False)
    return template.default_ids() if prefix is None else template.system_ids(prefix.text)


def cartridge_kv(base: BaseModel, prefix: CartridgePrefix) -> PrefixKV:
    """The cartridge's keys and values on the device and in the dtype of `base`."""
    keys, values = (tensor.detach().to(device=base.device, dtype=base.dtype)
                    for tensor in prefix.cartridge.keys_values())
    return PrefixKV(keys, values)
