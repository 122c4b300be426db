"""Attention of a flat pack, on a GPU in training: one FlexAttention a layer over [cartridge; shared turns; rows].

A small pack's arithmetic was a tenth of a step on a GPU (docs/results.md), so a pack is one sequence there, which
starts fewer kernels: the turns that its conversations share go through the layers with the rows and not before them.
A block mask says who sees whom. Blocks in which no token sees any other (another conversation, what is ahead, padding)
are skipped, forwards and backwards. The kernels are compiled once for each shape of a pack.

What has run on a GPU, docs/results.md tells; elsewhere the same calls run unfused (`tests/test_train_memory.py`).
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.nn import functional

log = logging.getLogger(__name__)

MOST_SHAPES = 256
"""Compiled kernels kept at once, two for each shape of a pack: its tokens, its prefix and how many cartridges are read
together. Beyond torch's own limit of 8 it would go on unfused, with the whole scores in memory and only a warning."""

BLOCK = 128
"""Tokens of a block of the mask."""


def supports(prefix: torch.Tensor) -> bool:
    """Whether packs behind `prefix` are to be flat: on a GPU with Triton, where there is a gradient.

    Passes without one have prefixes of many lengths, and each would be a compilation.
    """
    return torch.is_grad_enabled() and prefix.is_cuda and _can_compile()


def owners(segment_ids: torch.Tensor, num_shared: int) -> torch.Tensor:
    """Whose each token of a flat pack is, int32 `[S + R*T]`: 0 for the shared turns, positive for conversations, and
    negative for padding. `segment_ids` `[R, T]` are the pack's, with 0 for padding."""
    R, T = segment_ids.shape
    row = torch.arange(R, device=segment_ids.device)[:, None]
    # Padding is its row's own, so that no block holds what rows apart have in common.
    found = torch.where(segment_ids > 0, row * T + segment_ids, -1 - row)
    return torch.cat([found.new_zeros(num_shared), found.flatten()]).int()


def flat_mask(owner: torch.Tensor, prefix_lengths: Sequence[int]):
    """FlexAttention's block mask for queries `[N, Q]` of these owners over keys [prefix; queries].

    The prefix has as many slots as the longest of `prefix_lengths`, and a group sees its own first ones.
    """
    from torch.nn.attention.flex_attention import BlockMask

    (N, Q), P = owner.shape, max(prefix_lengths)
    lengths = torch.tensor(prefix_lengths, device=owner.device)

    def sees(group, head, query, key):
        own = (key - P).clamp(min=0)
        seen = (owner[group, own] == 0) | (owner[group, own] == owner[group, query])
        return torch.where(key < P, key < lengths[group], (own <= query) & seen)

    # torch's `create_block_mask` asks `sees` of every pair, which took 10 ms a pack on an H100, whatever its size.
    own = ((owner == 0)[:, None] | (owner[:, None] == owner[:, :, None])).tril()
    of_prefix = torch.arange(P, device=owner.device) < lengths[:, None]
    some, every = _blocks(torch.cat([of_prefix[:, None].expand(N, Q, P), own], dim=2))
    return BlockMask.from_kv_blocks(*_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=sees,
                                    seq_lengths=(Q, P + Q))


def _blocks(seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `[N, Q, K]`, the blocks `[N, 1, q, k]` that hold a pair that sees, and those in which every pair does."""
    N, Q, K = seen.shape
    seen = functional.pad(seen, (0, -K % BLOCK, 0, -Q % BLOCK))
    blocks = seen.view(N, 1, -(-Q // BLOCK), BLOCK, -(-K // BLOCK), BLOCK)
    return blocks.any(dim=5).any(dim=3), blocks.all(dim=5).all(dim=3)


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of blocks in each row, and their indices before those of the others."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def flat_attention(query, key, value, prefix_key, prefix_value, mask, scaling: float,
                   attend: Callable | None = None):
    """query `[N, H*G, Q, D]`, key/value `[N, H, Q, D]`, prefix `[N, H, P, D]`. Returns `[N, Q, H*G, D]`.

    `mask` is of `flat_mask`. `attend`: torch's `flex_attention`, compiled unless given.
    """
    keys, values = (torch.cat([before.to(query.dtype), own], dim=2)
                    for before, own in ((prefix_key, key), (prefix_value, value)))
    heads = query.shape[1] // key.shape[1]
    if heads > 1:
        # In the backward pass one program sums a block of keys' gradient over all queries that see it. A short prefix
        # has few blocks, seen by all, so each head of a group gets a copy: 1.9 ms a layer against 2.8 (H100, p = 512).
        keys, values = (one.repeat_interleave(heads, dim=1) for one in (keys, values))
    attend = attend or _fused()
    return attend(query, keys, values, block_mask=mask, scale=scaling).transpose(1, 2)


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
