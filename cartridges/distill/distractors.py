"""Training with read-only distractor cartridges, so that the result still answers when composed with others.

Cartridges that were trained alone collapse when many are loaded, because each has learned as if its slots were the
only ones. So in a share of the packs, cartridges of other corpora are composed with the one in training. Gradients
flow only into its own slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from cartridges.cartridge import Cartridge
from cartridges.compose import compose, rotate
from cartridges.distill.lower_layers import LowerLayers

MAX_CACHED = 8


@dataclass(frozen=True)
class ComposedPrefix:
    """The prefix of a pack: `num_tokens` slots. `keys` and `values` `[trained layers, kv_heads, num_tokens, head_dim]`
    are those of the trained layers, differentiable; `lower` computes the layers below."""

    num_tokens: int
    keys: torch.Tensor
    values: torch.Tensor
    lower: LowerLayers


class DistractorPrefixes:
    """Composes `own` with some of `others`, each at the positions it was trained at: right before the first token.

    Caches the unchanging part of the last `MAX_CACHED` compositions. With `live`, `others` are still in training and
    nothing is cached. The frozen layers of `own` must not change.
    """

    def __init__(self, model: PreTrainedModel, own: Cartridge, others: Sequence[Cartridge], live: bool = False):
        self.model, self.own, self.others = model, own, tuple(others)
        self.frequencies = model.base_model.rotary_emb.inv_freq.float()
        self._composed = self._compose if live else lru_cache(maxsize=MAX_CACHED)(self._compose)

    def loaded(self, chosen: tuple[int, ...]) -> ComposedPrefix:
        """`own` followed by the `chosen` of `others`, by index."""
        others = self._composed(chosen)
        keys, values = self.own.upper_keys_values()
        moved = rotate(keys, self.frequencies, others.num_tokens - self.own.num_tokens)
        return ComposedPrefix(others.num_tokens, torch.cat([moved, others.keys], dim=2),
                              torch.cat([values, others.values], dim=2), others.lower)

    @torch.no_grad()
    def _compose(self, chosen: tuple[int, ...]) -> ComposedPrefix:
        """The composition, with `keys` and `values` of the others alone."""
        whole = compose([self.own, *(self.others[index] for index in chosen)], self.frequencies)
        whole = whole.with_frozen_layers(self.own.num_frozen_layers)
        keys, values = (tensor[:, :, self.own.num_tokens:].clone() for tensor in whole.upper_keys_values())
        return ComposedPrefix(whole.num_tokens, keys, values, LowerLayers(self.model, whole, most_bytes=0))
