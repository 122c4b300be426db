"""Training with other cartridges loaded beside one's own, so that it answers in their company.

Cartridges trained alone drown each other out when many are loaded: each one's slots have learned to be
the only ones that a query can look at. So in a share of the packs read-only cartridges of other corpora
stand beside the one in training, as `compose` would put them. Gradients flow into the own slots alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from cartridges.cartridge import Cartridge
from cartridges.compose import compose, rotate
from cartridges.distill.lower_layers import LowerLayers

MOST_MET = 8


@dataclass(frozen=True)
class Loaded:
    """What stands before a pack: `num_tokens` slots, of which the trained layers see `keys` and `values`
    `[trained layers, kv_heads, num_tokens, head_dim]`, differentiable, and `lower` has the rest."""

    num_tokens: int
    keys: torch.Tensor
    values: torch.Tensor
    lower: LowerLayers


class Company:
    """`others` beside `own`, each where it was trained to stand: right before the first token.

    Of the companies that were met last, what does not change is kept: of `live` others, which change, nothing. `own`
    must not change below its trained layers.
    """

    def __init__(self, model: PreTrainedModel, own: Cartridge, others: Sequence[Cartridge], live: bool = False):
        self.model, self.own, self.others = model, own, tuple(others)
        self.frequencies = model.base_model.rotary_emb.inv_freq.float()
        self._met = self._meet if live else lru_cache(maxsize=MOST_MET)(self._meet)

    def loaded(self, chosen: tuple[int, ...]) -> Loaded:
        """`own` and then those of `others`, by index."""
        met = self._met(chosen)
        keys, values = self.own.upper_keys_values()
        moved = rotate(keys, self.frequencies, met.num_tokens - self.own.num_tokens)
        return Loaded(met.num_tokens, torch.cat([moved, met.keys], dim=2), torch.cat([values, met.values], dim=2),
                      met.lower)

    @torch.no_grad()
    def _meet(self, chosen: tuple[int, ...]) -> Loaded:
        """`keys` and `values` are those of the others alone."""
        whole = compose([self.own, *(self.others[index] for index in chosen)], self.frequencies)
        whole = whole.with_frozen_layers(self.own.num_frozen_layers)
        keys, values = (tensor[:, :, self.own.num_tokens:].clone() for tensor in whole.upper_keys_values())
        return Loaded(whole.num_tokens, keys, values, LowerLayers(self.model, whole, most_bytes=0))
