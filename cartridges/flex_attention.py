"""Prefix attention on a GPU in training: FlexAttention over either part, merged by the log-sum-exps.

As in `merged_attention`, neither scores nor a joined set of keys are written to memory, and the rows of a group share
their prefix. Blocks in which no token may look at any other (another conversation, what is ahead, padding) are
skipped, forwards and backwards; the kernels are compiled once for each shape of a pack.

`tests/test_cuda.py` compares the fused kernels with the definition on a GPU; elsewhere the same calls run unfused.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch

log = logging.getLogger(__name__)

Blocks = tuple[object | None, object]
"""FlexAttention's block masks over prefix (None: all of it is seen) and own part."""


MOST_SHAPES = 256
"""Compiled kernels kept at once. A pack's shape is its rows, its prefix and how many cartridges are read together;
beyond torch's own limit of 8 it would go on unfused, with the whole scores in memory and only a warning."""


def supports(query: torch.Tensor, prefix_key: torch.Tensor) -> bool:
    """Whether to take these kernels: on a GPU with Triton, where there is a gradient.

    Passes without one have prefixes of many lengths, and each would be a compilation.
    """
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or prefix_key.requires_grad)
    return needs_gradient and query.is_cuda and _can_compile()


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
def _can_compile() -> bool:
    from torch.utils._triton import has_triton

    if not has_triton():
        log.warning("Triton is not usable here: attention in training keeps whole score matrices, which is slower and "
                    "takes more memory; install the triton that belongs to this torch")
    return has_triton()


@cache
def _fused() -> Callable:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention as unfused

    config.recompile_limit = max(config.recompile_limit, MOST_SHAPES)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, MOST_SHAPES)
    return torch.compile(unfused, dynamic=False)
