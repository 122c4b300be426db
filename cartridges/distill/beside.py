"""Training with other cartridges loaded beside one's own, so that it answers in their company.

Cartridges trained alone drown each other out when many are loaded: each one's slots have learned to be
the only ones that a query can look at. So in a share of the packs read-only cartridges of other corpora
stand beside the one in training, as `compose` would put them (others restored most of what twenty
partners take that way). Gradients flow into the own slots alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cartridges.cartridge import Cartridge
from cartridges.compose import compose, rotate
from cartridges.distill.lower_layers import LowerLayers


@dataclass(frozen=True)
class Loaded:
    """What stands before a pack: `num_tokens` slots, of which the trained layers see `keys` and `values`
    `[trained layers, kv_heads, num_tokens, head_dim]`, differentiable, and `lower` has the rest."""

    num_tokens: int
    keys: torch.Tensor
    values: torch.Tensor
    lower: LowerLayers


def beside(model: PreTrainedModel, own: Cartridge, others: Sequence[Cartridge]) -> Loaded:
    """`own` and then `others`, each where it was trained to stand: right before the first token."""
    frequencies = model.base_model.rotary_emb.inv_freq.float()
    with torch.no_grad():
        whole = compose([own, *others], frequencies).with_frozen_layers(own.num_frozen_layers)
    keys, values = own.upper_keys_values()
    rest = [tensor[:, :, own.num_tokens:] for tensor in whole.upper_keys_values()]
    moved = rotate(keys, frequencies, whole.num_tokens - own.num_tokens)
    return Loaded(whole.num_tokens, torch.cat([moved, rest[0].detach()], dim=2),
                  torch.cat([values, rest[1].detach()], dim=2), LowerLayers(model, whole, most_bytes=0))
