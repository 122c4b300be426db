"""A start from the corpus' own KV: the keys that self-study looks at, of chunks read separately.

In the spirit of attention matching (arXiv 2602.16284), in closed form and without per-key biases, so
that any engine can serve it. Chunks are read each by itself, because a small model reads a short
text right and a long one not; their keys are re-rotated so that every chunk ends where the cartridge
ends, which keeps each key at the distance from the question at which it was read.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from cartridges.cartridge import Cartridge
from cartridges.forward import PrefixKV, hidden_states, prefill, row_bias, stack_prefixes
from cartridges.models import BaseModel
from cartridges.records import Chunk, Conversation

CONVERSATIONS_PER_CHUNK = 16
ROW_TOKENS = 64


@torch.inference_mode()
def compact(base: BaseModel, chunks: Sequence[Chunk], conversations: Sequence[Conversation], p: int,
            num_frozen_tokens: int, seed: int) -> Cartridge:
    """A cartridge of `p` slots: the sink, and for each layer and KV head the most attended keys.

    Chunks share the slots by length. A key's worth is the largest attention weight that any token of
    its chunk's conversations gives it. Chunks without conversations keep evenly spaced keys.
    """
    by_chunk = _sample(conversations, seed)
    quotas = _quotas([len(chunk.text) for chunk in chunks], p - 1)
    sink: PrefixKV | None = None
    keys, values = [], []
    for chunk, quota in zip(chunks, quotas, strict=True):
        kv = prefill(base.model, base.template.system_ids(chunk.text))
        sink = sink or PrefixKV(kv.keys[:, :, :1], kv.values[:, :, :1])
        worth = _worth(base, kv, by_chunk.get(chunk.chunk_id, []))
        quota = min(quota, kv.num_tokens - 1)
        kept = worth[:, :, 1:].topk(quota, dim=-1).indices.sort(dim=-1).values + 1
        index = kept[..., None].expand(-1, -1, -1, kv.keys.shape[3])
        keys.append(rotate(base.model, kv.keys.gather(2, index).float(), p - kv.num_tokens))
        values.append(kv.values.gather(2, index).float())
    assert sink is not None
    return _assemble(sink, keys, values, p, num_frozen_tokens)


def rotate(model: PreTrainedModel, keys: torch.Tensor, positions: int) -> torch.Tensor:
    """Keys after RoPE (`[..., D]`), moved by `positions`: as if read that much later."""
    frequencies = model.base_model.rotary_emb.inv_freq.to(keys)
    angles = torch.cat([frequencies, frequencies]) * positions
    first, second = keys.chunk(2, dim=-1)
    return keys * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _assemble(sink: PrefixKV, keys, values, p: int, num_frozen_tokens: int) -> Cartridge:
    joined = [torch.cat([start.float(), *parts], dim=2) for start, parts in
              ((sink.keys, keys), (sink.values, values))]
    # Chunks shorter than their quota leave slots over: repeat from the end, and let training use them.
    missing = p - joined[0].shape[2]
    if missing > 0:
        joined = [torch.cat([part, part[:, :, -missing:]], dim=2) for part in joined]
    return Cartridge(joined[0].clone(), joined[1].clone(), num_frozen_tokens)


def _sample(conversations: Sequence[Conversation], seed: int) -> Mapping[str, list[Conversation]]:
    chosen: dict[str, list[Conversation]] = {}
    for index in np.random.default_rng(seed).permutation(len(conversations)):
        of_chunk = chosen.setdefault(conversations[index].chunk_id, [])
        if len(of_chunk) < CONVERSATIONS_PER_CHUNK:
            of_chunk.append(conversations[index])
    return chosen


def _quotas(lengths: Sequence[int], total: int) -> list[int]:
    """`total` shared in proportion to `lengths`, by largest remainder."""
    exact = np.array(lengths, float) * total / sum(lengths)
    quotas = np.floor(exact).astype(int)
    for index in np.argsort(quotas - exact)[: total - quotas.sum()]:
        quotas[index] += 1
    return quotas.tolist()


def _worth(base: BaseModel, kv: PrefixKV, conversations: Sequence[Conversation]) -> torch.Tensor:
    """`[layers, kv_heads, P]`: the largest weight on each key over the conversations' own tokens."""
    layers, heads, length, _ = kv.keys.shape
    worth = torch.zeros(layers, heads, length)
    if not conversations:
        worth[:, :, :: max(1, length // 16)] = 1.0
        return worth
    rows = [c.input_ids[c.shared_tokens:][-ROW_TOKENS:].tolist() for c in conversations]
    ids = torch.zeros(len(rows), ROW_TOKENS, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, ROW_TOKENS - len(tokens):] = torch.as_tensor(tokens)
    lengths = torch.as_tensor([len(tokens) for tokens in rows])
    real = torch.arange(ROW_TOKENS)[None] >= ROW_TOKENS - lengths[:, None]
    positions = (length + torch.arange(ROW_TOKENS)[None] - (ROW_TOKENS - lengths)[:, None]).clamp(min=0)
    context = stack_prefixes([kv])
    context.own_bias = row_bias(lengths.tolist(), ROW_TOKENS, base.dtype, base.device)
    mask = real.to(base.device)[None, None, :, None, :, None]

    def observe(layer: int, weights: torch.Tensor) -> None:
        worth[layer] = (weights * mask)[..., :length].amax(dim=(0, 2, 3, 4)).float().cpu()

    context.observe = observe
    hidden_states(base.model, ids.to(base.device), positions.to(base.device), context)
    return worth
