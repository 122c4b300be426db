"""Attention for a batch of unrelated rows, each with its own KV of its own length.

A decoding step reads all weights of the linear maps whatever the number of rows, while attention is cheap at one
token per row. So the rows share the linear maps and go through attention one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

GROWTH = 256
"""Slots added at a time to a full row: a copy at every token would cost more than the token itself."""

# Axis letters as in `attention`: B rows, T queries, S own slots, H key-value heads, G query heads each, D head_dim.


@dataclass
class RowKV:
    """The KV of one conversation: for each layer `[1, H, slots, D]`, of which the first `length` slots are filled."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    length: int = 0

    @classmethod
    def after(cls, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "RowKV":
        """A row that starts with a copy of `prefix`: keys and values `[1, H, P, D]` for each layer."""
        keys, values = ([functional.pad(tensor, (0, 0, 0, GROWTH)) for tensor in tensors]
                        for tensors in zip(*prefix, strict=True))
        return cls(keys, values, prefix[0][0].shape[2])

    def reserve(self, tokens: int) -> None:
        """Make sure that there are `tokens` free slots."""
        missing = self.length + tokens - self.keys[0].shape[2]
        if missing > 0:
            added = -(-missing // GROWTH) * GROWTH
            self.keys, self.values = ([functional.pad(tensor, (0, 0, 0, added)) for tensor in tensors]
                                      for tensors in (self.keys, self.values))

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `key` and `value` `[1, H, T, D]` after the filled slots of `layer`.

        Returns all keys and all values, `[1, H, length + T, D]` each. The next write overwrites these unless
        `length` has grown by then.
        """
        end = self.length + key.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.length:], values[:, :, self.length:] = key, value
        return keys, values


def attend_rows(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float,
                rows: Sequence[RowKV], bias: torch.Tensor | None) -> torch.Tensor:
    """query `[B, H*G, T, D]`, key and value `[B, H, T, D]`; `bias` `[T, S]` in query's dtype, None if each query
    sees everything. Returns `[B, T, H*G, D]`, with zeros for batch rows beyond `rows`.
    """
    (B, HG, T, D), H = query.shape, key.shape[1]
    output = query.new_zeros(B, T, HG, D)
    bias = None if bias is None else bias.repeat(HG // H, 1)
    for index, row in enumerate(rows):
        seen = row.write(layer, key[index:index + 1], value[index:index + 1])
        # Query heads that share keys are consecutive, so the keys need not be repeated.
        grouped = query[index].reshape(1, H, HG // H * T, D)
        attended = functional.scaled_dot_product_attention(grouped, *seen, attn_mask=bias, scale=scaling)
        # `reshape`, because some kernels return non-contiguous output.
        output[index] = attended.reshape(HG, T, D).transpose(0, 1)
    return output
