"""Attention over [prefix + own tokens]: the operation that teacher, student and engine share.

A batch is `groups x rows x tokens`. The rows of a group share one prefix (a chunk's KV, a cartridge, the whole corpus'
KV). It is never copied per row: its scores are one matrix product with all queries of the group. A row attends to the
prefix and to itself, so each query costs `P + T` keys regardless of the number of rows.

It is registered with Hugging Face's attention interface, so the model is not forked, and every Llama- or Qwen3-type
model that supports attention backends can use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cartridges.flex_attention import flat_attention
from cartridges.merged_attention import merged_attention, supports
from cartridges.row_attention import RowKV, attend_rows

NAME = "cartridge"

# Axis letters: N groups, M rows a group, T query tokens, S own key slots, P prefix slots,
# H key-value heads, G query heads a key-value head, D head_dim, L layers.


@dataclass
class OwnKV:
    """Fixed-size buffers for the rows' own keys and values while decoding.

    `keys` and `values` are lists over layers of `[N*M, H, S, D]`; `cursor` is where the next token
    goes (the same for every row: rows are padded on the left).
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    cursor: int = 0

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.cursor + key.shape[2]
        self.keys[layer][:, :, self.cursor:end] = key
        self.values[layer][:, :, self.cursor:end] = value
        return self.keys[layer], self.values[layer]


@dataclass
class AttentionContext:
    """What a forward pass attends to besides its own tokens, and what it records.

    - `prefix_keys`, `prefix_values`: `[N, H, P, D]` for each layer (differentiable for a cartridge), or None.
    - `prefix_bias`: `[N, P]`, 0, or -inf where a shorter prefix is padded.
    - `own_bias`: `[N*M, T, S]`, 0 where a token may attend, -inf elsewhere. None is plain causal.
    - `own`: buffers for decoding.
    - `rows`: in place of all the above, each row's own KV. `own_bias` is then `[1, T, S]`, or None for one token per
      row. Rows of the batch beyond them are padding.
    - `collected`: a list that receives each layer's own (key, value), or None.
    - `observed`: likewise, each layer's (query `[B, H*G, T, D]`, output `[B, T, H*G, D]`).
    - `flat`: in place of the biases, FlexAttention's block mask for a batch in which each group is one sequence.
    """

    prefix_keys: list[torch.Tensor] | torch.Tensor | None = None
    prefix_values: list[torch.Tensor] | torch.Tensor | None = None
    prefix_bias: torch.Tensor | None = None
    own_bias: torch.Tensor | None = None
    own: OwnKV | None = None
    rows: Sequence[RowKV] | None = None
    collected: list[tuple[torch.Tensor, torch.Tensor]] | None = field(default=None)
    observed: list[tuple[torch.Tensor, torch.Tensor]] | None = field(default=None)
    flat: object | None = None


def cartridge_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, *,
                        context: AttentionContext | None = None, **_):
    """Hugging Face attention interface: query `[B, H*G, T, D]`, key and value `[B, H, T, D]`.

    Returns `([B, T, H*G, D], None)`.
    """
    if context is None:
        context = AttentionContext()
    if context.collected is not None:
        context.collected.append((key, value))
    if context.own is not None:
        key, value = context.own.write(module.layer_idx, key, value)
    output = _attend(module.layer_idx, query, key, value, scaling, context)
    if context.observed is not None:
        context.observed.append((query, output))
    return output, None


def _attend(layer: int, query, key, value, scaling: float, context: AttentionContext) -> torch.Tensor:
    if context.rows is not None:
        bias = None if context.own_bias is None else context.own_bias[0].to(query.dtype)
        return attend_rows(layer, query, key, value, scaling, context.rows, bias)
    if context.prefix_keys is None:
        bias = None if context.own_bias is None else context.own_bias[:, None].to(query.dtype)
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=bias is None, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2)
    prefix = context.prefix_keys[layer], context.prefix_values[layer]
    if context.flat is not None:
        return flat_attention(query, key, value, *prefix, context.flat, scaling)
    own_bias = context.own_bias
    if own_bias is None:
        own_bias = causal_bias(query.shape[2], key.shape[2], query.dtype, query.device).expand(len(query), -1, -1)
    attend = merged_attention if supports(query) else prefix_attention
    return attend(query, key, value, *prefix, context.prefix_bias, own_bias.to(query.dtype), scaling)


def prefix_attention(query, key, value, prefix_key, prefix_value, prefix_bias, own_bias, scaling: float):
    """softmax([q Kp^T, q K^T]) [Vp; V] without repeating the prefix: the definition, on any device.

    query `[B, H*G, T, D]`, key/value `[B, H, S, D]`, prefix `[N, H, P, D]` with `B = N*M`; `prefix_bias`
    `[N, P]` or None, `own_bias` `[B, T, S]`. Returns `[B, T, H*G, D]`.
    """
    query = query * scaling
    B, HG, T, D = query.shape
    N, H, P, _ = prefix_key.shape
    S, M, G = key.shape[2], B // N, HG // H
    # [N, H, M, G, T, D]: one contiguous order that serves both products as plain views.
    query = query.view(N, M, H, G, T, D).permute(0, 2, 1, 3, 4, 5).contiguous()
    key = key.view(N, M, H, S, D).transpose(1, 2).reshape(N * H * M, S, D)
    value = value.view(N, M, H, S, D).transpose(1, 2).reshape(N * H * M, S, D)
    to_prefix = torch.bmm(query.view(N * H, M * G * T, D), prefix_key.reshape(N * H, P, D).transpose(1, 2))
    to_own = torch.bmm(query.view(N * H * M, G * T, D), key.transpose(1, 2))
    to_own = to_own.view(N, H, M, G, T, S)
    to_own = to_own + own_bias.to(query.dtype).view(N, 1, M, 1, T, S)
    to_prefix = to_prefix.view(N, H, M, G, T, P)
    if prefix_bias is not None:
        to_prefix = to_prefix + prefix_bias.to(query.dtype).view(N, 1, 1, 1, 1, P)
    weights = torch.cat([to_prefix, to_own], dim=-1).softmax(dim=-1)
    of_prefix, of_own = weights.split([P, S], dim=-1)
    output = torch.bmm(of_prefix.reshape(N * H, M * G * T, P), prefix_value.reshape(N * H, P, D))
    own = torch.bmm(of_own.reshape(N * H * M, G * T, S), value)
    output = output.view(N, H, M, G, T, D) + own.view(N, H, M, G, T, D)
    return output.permute(0, 2, 4, 1, 3, 5).reshape(B, T, HG, D)


def causal_bias(T: int, S: int, dtype: torch.dtype, device) -> torch.Tensor:
    """`[T, S]`: query t sits at key slot `S - T + t` and sees itself and what is before."""
    bias = torch.full((T, S), float("-inf"), dtype=dtype, device=device)
    return torch.triu(bias, diagonal=S - T + 1)


def install(model: PreTrainedModel) -> None:
    """Make `model` use `cartridge_attention`. Without a context it is plain causal attention."""
    if model.config._attn_implementation != NAME:
        ALL_ATTENTION_FUNCTIONS.register(NAME, cartridge_attention)
        model.set_attn_implementation(NAME)
