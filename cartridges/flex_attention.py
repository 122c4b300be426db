"""Prefix attention on a GPU in training: FlexAttention over either part, merged by the log-sum-exps.

As in `merged_attention`, neither scores nor a joined set of keys are written to memory, and the rows of a group share
their prefix. Blocks in which no token may look at any other (another conversation, what is ahead, padding) are
skipped, forwards and backwards; the kernels are compiled once for each shape of a pack.

The fused kernels have not been run, for want of a GPU: tests run the same calls unfused.
"""

from collections.abc import Callable
from functools import cache

import torch

Blocks = tuple[object | None, object]
"""FlexAttention's block masks over prefix (None: all of it is seen) and own part."""


def supports(query: torch.Tensor, prefix_key: torch.Tensor) -> bool:
    """On a GPU, where there is a gradient: what only reads has shapes of many lengths, each a compilation."""
    return query.is_cuda and torch.is_grad_enabled() and (query.requires_grad or prefix_key.requires_grad)


def flex_attention(query, key, value, prefix_key, prefix_value, blocks: Blocks, scaling: float,
                   attend: Callable | None = None):
    """query `[B, H*G, T, D]`, key/value `[B, H, S, D]`, prefix `[N, H, P, D]` with `B = N*M`. Returns `[B, T, H*G, D]`.

    `attend`: torch's `flex_attention`, compiled unless given.
    """
    (B, HG, T, D), N = query.shape, len(prefix_key)
    attend = attend or _fused()
    grouped = query.view(N, B // N, HG, T, D).transpose(1, 2).reshape(N, HG, -1, D)
    of_prefix, prefix_mass = _part(attend, grouped, prefix_key, prefix_value, blocks[0], scaling)
    of_own, own_mass = _part(attend, query, key, value, blocks[1], scaling)
    of_prefix, prefix_mass = (part.view(N, HG, B // N, T, -1).transpose(1, 2).reshape(B, HG, T, -1)
                              for part in (of_prefix, prefix_mass))
    share = torch.sigmoid(prefix_mass - own_mass).to(of_own.dtype)
    return torch.lerp(of_own, of_prefix, share).transpose(1, 2)


def _part(attend: Callable, query, key, value, block_mask, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, H*G, T, D]`, and `[B, H*G, T, 1]` the log of the softmax's denominator."""
    from torch.nn.attention.flex_attention import AuxRequest

    output, aux = attend(query, key.to(query.dtype), value.to(query.dtype), block_mask=block_mask, scale=scaling,
                         enable_gqa=True, return_aux=AuxRequest(lse=True))
    return output, aux.lse[..., None]


def block_masks(prefix_bias: torch.Tensor | None, own_bias: torch.Tensor, rows: int) -> Blocks:
    """Of biases that are 0 where a token may look and -inf elsewhere: `prefix_bias` `[N, P]`, `own_bias` `[B, T, S]`.
    `rows`: those of a group."""
    return None if prefix_bias is None else _over_prefix(prefix_bias, rows * own_bias.shape[1]), _over_own(own_bias)


def _over_prefix(bias: torch.Tensor, queries: int):
    from torch.nn.attention.flex_attention import create_block_mask

    seen = bias == 0
    return create_block_mask(lambda n, head, query, slot: seen[n, slot], len(bias), None, queries, bias.shape[1],
                             device=bias.device)


def _over_own(bias: torch.Tensor):
    from torch.nn.attention.flex_attention import create_block_mask

    seen = bias == 0
    return create_block_mask(lambda row, head, query, slot: seen[row, query, slot], len(bias), None, *bias.shape[1:],
                             device=bias.device)


@cache
def _fused() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention as unfused

    return torch.compile(unfused, dynamic=False)
