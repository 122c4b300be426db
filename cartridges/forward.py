"""Forward passes of a frozen base model with a prefix in its KV cache, as pure functions of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cartridges.attention import AttentionContext, install

MULTIPLE = 64
"""Lengths are padded to multiples of this: on a CPU every new bfloat16 shape costs a kernel build."""


@dataclass(frozen=True)
class PrefixKV:
    """The KV of one prefix: `keys` and `values` are `[layers, kv_heads, P, head_dim]`."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()


def round_up(length: int, multiple: int = MULTIPLE) -> int:
    return -(-length // multiple) * multiple


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor,
                  context: AttentionContext) -> torch.Tensor:
    """Last hidden states `[B, T, hidden]` of `input_ids` `[B, T]` at `position_ids` `[B, T]`."""
    hidden = model.base_model.embed_tokens(input_ids)
    return model.base_model.norm(through_layers(model, hidden, position_ids, context))


def through_layers(model: PreTrainedModel, hidden: torch.Tensor, position_ids: torch.Tensor,
                   context: AttentionContext, first: int = 0, last: int | None = None,
                   recompute: bool = False) -> torch.Tensor:
    """Run `hidden` `[B, T, hidden]` through decoder layers `first` to `last` (exclusive; None: to the end).

    The supported model types are plain stacks: embedding, these layers, a norm, the head. `recompute` keeps only each
    layer's input for the backward pass (gradient checkpointing).
    """
    install(model)
    body = model.base_model
    rotation = body.rotary_emb(hidden, position_ids)
    if recompute:  # as it is now: what follows may extend it before the backward pass comes
        context = replace(context, prefix_keys=list(context.prefix_keys), prefix_values=list(context.prefix_values))
    for layer in body.layers[first:last]:
        run = partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False) if recompute else layer
        hidden = run(hidden, position_embeddings=rotation, position_ids=position_ids, use_cache=False,
                     context=context)
    return hidden


def extend_prefix(model: PreTrainedModel, hidden: torch.Tensor, position_ids: torch.Tensor,
               context: AttentionContext, first: int = 0, last: int | None = None,
               recompute: bool = False) -> torch.Tensor:
    """`through_layers` for one row per group, whose keys and values then extend the group's prefix in `context`."""
    context.collected = []
    hidden = through_layers(model, hidden, position_ids, context, first, last, recompute)
    for layer, (key, value) in enumerate(context.collected, start=first):
        context.prefix_keys[layer] = torch.cat([context.prefix_keys[layer], key], dim=2)
        context.prefix_values[layer] = torch.cat([context.prefix_values[layer], value], dim=2)
    context.collected = None
    if context.prefix_bias is not None:
        context.prefix_bias = functional.pad(context.prefix_bias, (0, hidden.shape[1]))
    return hidden


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Sequence[int]) -> PrefixKV:
    """The exact KV of `input_ids`, read as one text from position 0."""
    length = len(input_ids)
    # Causal, so padding on the right changes nothing of what stands before it.
    padded = torch.zeros(1, round_up(length), dtype=torch.long, device=model.device)
    padded[0, :length] = torch.as_tensor(list(input_ids), device=model.device)
    positions = torch.arange(padded.shape[1], device=model.device)[None]
    context = AttentionContext(collected=[])
    hidden_states(model, padded, positions, context)
    keys = torch.stack([key[0, :, :length] for key, _ in context.collected])
    values = torch.stack([value[0, :, :length] for _, value in context.collected])
    return PrefixKV(keys, values)


@torch.no_grad()
def extend(model: PreTrainedModel, before: PrefixKV, input_ids: Sequence[int]) -> PrefixKV:
    """`before` followed by the KV of `input_ids`, read after it."""
    length = len(input_ids)
    padded = torch.zeros(1, round_up(length, 16), dtype=torch.long, device=model.device)
    padded[0, :length] = torch.as_tensor(list(input_ids), device=model.device)
    positions = before.num_tokens + torch.arange(padded.shape[1], device=model.device)[None]
    context = stack_prefixes([before])
    context.collected = []
    hidden_states(model, padded, positions, context)
    keys = torch.stack([key[0, :, :length] for key, _ in context.collected])
    values = torch.stack([value[0, :, :length] for _, value in context.collected])
    return PrefixKV(torch.cat([before.keys, keys], dim=2), torch.cat([before.values, values], dim=2))


def stack_prefixes(prefixes: Sequence[PrefixKV]) -> AttentionContext:
    """One context with a group for every prefix, padded to a common length and masked."""
    longest = max(prefix.num_tokens for prefix in prefixes)
    if longest == 0:
        return AttentionContext()
    slots = round_up(longest)
    first = prefixes[0].keys
    shape = (first.shape[0], len(prefixes), first.shape[1], slots, first.shape[3])
    keys, values = first.new_zeros(shape), first.new_zeros(shape)
    bias = first.new_full((len(prefixes), slots), float("-inf"))
    for n, prefix in enumerate(prefixes):
        keys[:, n, :, : prefix.num_tokens] = prefix.keys
        values[:, n, :, : prefix.num_tokens] = prefix.values
        bias[n, : prefix.num_tokens] = 0
    return AttentionContext(prefix_keys=keys, prefix_values=values, prefix_bias=bias)


def row_bias(lengths: Sequence[int], slots: int, dtype: torch.dtype, device) -> torch.Tensor:
    """`[B, slots, slots]` causal bias for rows padded on the left to `slots`.

    A padded query sees every padded slot, so that its softmax is never over nothing.
    """
    index = torch.arange(slots, device=device)
    starts = slots - torch.as_tensor(list(lengths), device=device)
    real = index[None] >= starts[:, None]
    causal = index[None, :] <= index[:, None]
    seen = (real[:, :, None] == real[:, None, :]) & causal[None]
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
