"""Attention of a batch whose rows have nothing in common: each row has a KV of its own, of its own length.

The linear maps of a decoding step read all weights whatever the number of rows; attention is what differs, and
little at one token a row. So rows share the first and go one by one through the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

GROWTH = 256
"""Slots that a row gets when it needs more: copying at every token would cost more than the token."""

# Axis letters as in `attention`: B rows, T queries, S own slots, H key-value heads, G query heads each, D head_dim.


@dataclass
class RowKV:
    """The KV of one conversation: for each layer `[1, H, slots, D]`, of which the first `length` are read."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int = 0

    @classmethod
    def after(cls, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "RowKV":
        """Behind a copy of `prefix`, keys and values `[1, H, P, D]` for each layer, with room for more."""
        keys, values = ([functional.pad(tensor, (0, 0, 0, GROWTH)) for tensor in tensors]
                        for tensors in zip(*prefix, strict=True))
        return cls(keys, values, prefix[0][0].shape[2])

    def reserve(self, tokens: int) -> None:
        """Room for `tokens` more."""
        missing = self.length + tokens - self.keys[0].shape[2]
        if missing > 0:
            added = -(-missing // GROWTH) * GROWTH
            self.keys, self.values = ([functional.pad(tensor, (0, 0, 0, added)) for tensor in tensors]
                                      for tensors in (self.keys, self.values))

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `layer` has read, followed by `key` and `value` `[1, H, T, D]`: `[1, H, length + T, D]` each.

        They are kept when `length` moves on; until then the next ones take their place.
        """
        end = self.length + key.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.length:], values[:, :, self.length:] = key, value
        return keys, values


def attend_rows(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
                rows: Sequence[RowKV], bias: torch.Tensor | None) -> torch.Tensor:
    """query `[B, H*G, T, D]`, key and value `[B, H, T, D]`; `bias` `[T, S]` in query's dtype, None where each query
    sees everything. Returns `[B, T, H*G, D]`, zeros for the batch's rows beyond `rows`.
    """
    (B, HG, T, D), H = query.shape, key.shape[1]
    output = query.new_zeros(B, T, HG, D)
    bias = None if bias is None else bias.repeat(HG // H, 1)
    for index, row in enumerate(rows):
        seen = row.write(layer, key[index:index + 1], value[index:index + 1])
        # Queries of the heads that share keys stand one after the other: the keys are not repeated.
        grouped = query[index].reshape(1, H, HG // H * T, D)
        attended = functional.scaled_dot_product_attention(grouped, *seen, attn_mask=bias, scale=scaling)
        # Some of its kernels give what is not contiguous.
        output[index] = attended.reshape(HG, T, D).transpose(0, 1)
    return output
