"""The layers below the trained ones. Their outputs for a conversation never change, so they are cached."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from cartridges.attention import AttentionContext
from cartridges.cartridge import Cartridge
from cartridges.distill.packing import Pack, segment_bias
from cartridges.forward import extend_prefix, through_layers

MOST_BYTES = 2 * 2**30
"""Most bytes of cached hidden states. Rows with a conversation that does not fit are computed each time."""


class Place(NamedTuple):
    """A conversation's own tokens, its row, and where it begins and ends there."""

    tokens: bytes
    row: int
    first: int
    last: int


@dataclass(frozen=True)
class Shared:
    """The turns with which a pack's conversations begin: `states` `[1, S, hidden]` before the first trained layer, and
    their `positions` `[1, S]`. `context` holds their keys and values in the layers below, `kept` the cached states of
    conversations after these turns, by the conversation's own tokens."""

    states: torch.Tensor
    positions: torch.Tensor
    context: AttentionContext
    kept: dict[bytes, torch.Tensor] = field(default_factory=dict)


class LowerLayers:
    """The first `cartridge.num_frozen_layers` layers of `model` after a cartridge.

    Their slots are frozen, so the hidden states above them depend only on a conversation's tokens (up to rounding, by
    its place in a pack), and each conversation is computed once while the cache has room.
    """

    def __init__(self, model: PreTrainedModel, cartridge: Cartridge, most_bytes: int = MOST_BYTES):
        self.model, self.cartridge, self.most_bytes = model, cartridge, most_bytes
        self.count = cartridge.num_frozen_layers
        self._shared: dict[bytes, Shared] = {}
        self._bytes = 0

    @torch.no_grad()
    def shared(self, pack: Pack) -> Shared:
        key = pack.shared_ids.cpu().numpy().tobytes()
        if key not in self._shared:
            self._shared[key] = self._read_shared(pack.shared_ids)
        return self._shared[key]

    @torch.no_grad()
    def states(self, pack: Pack, shared: Shared, position_ids: torch.Tensor) -> torch.Tensor:
        """`[R, T, hidden]` of the pack's rows, which stand at `position_ids` after the `shared` turns."""
        hidden = self.model.base_model.embed_tokens(pack.input_ids)
        if self.count == 0:
            return hidden
        places = _places(pack)
        unknown = sorted({place.row for place in places if place.tokens not in shared.kept})
        if unknown:
            context = AttentionContext(shared.context.prefix_keys, shared.context.prefix_values,
                                       own_bias=segment_bias(pack.segment_ids[unknown], self.model.dtype))
            hidden[unknown] = through_layers(self.model, hidden[unknown], position_ids[unknown], context,
                                             last=self.count)
            self._keep(shared, [place for place in places if place.tokens not in shared.kept], hidden)
        known = [place for place in places if place.row not in unknown]
        if known:
            slots = torch.cat([torch.arange(place.first, place.last) + place.row * hidden.shape[1] for place in known])
            states = torch.cat([shared.kept[place.tokens] for place in known])
            hidden.flatten(0, 1)[slots.to(hidden.device)] = states.to(hidden.device)
        return hidden

    def _read_shared(self, ids: torch.Tensor) -> Shared:
        keys, values = (tensor.to(self.model.dtype).unsqueeze(1)
                        for tensor in (self.cartridge.lower_keys, self.cartridge.lower_values))
        context = AttentionContext(list(keys), list(values))
        positions = self.cartridge.num_tokens + torch.arange(len(ids), device=ids.device)[None]
        if not len(ids):  # where weights are spread over workers, even to embed nothing would be a collective
            return Shared(keys.new_zeros(1, 0, self.model.config.hidden_size), positions, context)
        hidden = self.model.base_model.embed_tokens(ids[None])
        if self.count:
            hidden = extend_prefix(self.model, hidden, positions, context, last=self.count)
        return Shared(hidden, positions, context)

    def _keep(self, shared: Shared, places: Sequence[Place], hidden: torch.Tensor) -> None:
        """Those of `places` that still fit, each text once."""
        fitting: dict[bytes, Place] = {}
        for place in places:
            size = (place.last - place.first) * hidden.shape[2] * hidden.element_size()
            if place.tokens not in fitting and self._bytes + size <= self.most_bytes:
                fitting[place.tokens] = place
                self._bytes += size
        rows = sorted({place.row for place in fitting.values()})
        states = dict(zip(rows, hidden[rows].cpu(), strict=True))  # at once: each copy from a GPU is a wait
        for tokens, place in fitting.items():
            shared.kept[tokens] = states[place.row][place.first:place.last].clone()


def _places(pack: Pack) -> list[Place]:
    """Of every conversation in the pack; two may be of the same tokens."""
    ids, owners = pack.input_ids.cpu().numpy(), pack.segment_ids.cpu().numpy()
    found = []
    for row, owner in enumerate(owners):
        ends = [0, *((owner[1:] != owner[:-1]).nonzero()[0] + 1).tolist(), len(owner)]
        found += [Place(ids[row, first:last].tobytes(), row, first, last)
                  for first, last in zip(ends[:-1], ends[1:], strict=True) if owner[first]]
    return found
