"""The layers below the trained ones: what they make of a conversation never changes, so it is kept."""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from cartridges.attention import AttentionContext
from cartridges.cartridge import Cartridge
from cartridges.distill.packing import Pack, segment_bias
from cartridges.forward import read_after, through_layers

MOST_BYTES = 2 * 2**30
"""Hidden states kept in memory. Rows with a conversation beyond are computed anew each time."""

Place = tuple[bytes, int, slice]
"""A conversation's own tokens, its row, and where in the row it stands."""


@dataclass(frozen=True)
class Shared:
    """The turns that begin a pack's conversations: `states` `[1, S, hidden]` where the trained layers
    begin, and their `positions` `[1, S]`; `context` has their keys and values in the layers below.
    `kept` are the states of conversations after these turns, by their own tokens."""

    states: torch.Tensor
    positions: torch.Tensor
    context: AttentionContext
    kept: dict[bytes, torch.Tensor] = field(default_factory=dict)


class LowerLayers:
    """The first `cartridge.num_frozen_layers` layers of `model` after a cartridge: their slots are frozen,
    so a conversation's hidden states behind them depend on its tokens alone (up to the rounding of its
    place in a pack), and each is computed once while memory lasts. The cartridge must not change there.
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
        unknown = sorted({row for tokens, row, _ in places if tokens not in shared.kept})
        if unknown:
            context = AttentionContext(shared.context.prefix_keys, shared.context.prefix_values,
                                       own_bias=segment_bias(pack.segment_ids[unknown], self.model.dtype))
            hidden[unknown] = through_layers(self.model, hidden[unknown], position_ids[unknown], context,
                                             last=self.count)
        for tokens, row, at in places:
            if row not in unknown:
                hidden[row, at] = shared.kept[tokens].to(hidden.device)
            elif tokens not in shared.kept:
                self._keep(shared, tokens, hidden[row, at])
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
            hidden = read_after(self.model, hidden, positions, context, last=self.count)
        return Shared(hidden, positions, context)

    def _keep(self, shared: Shared, tokens: bytes, states: torch.Tensor) -> None:
        size = states.numel() * states.element_size()
        if self._bytes + size <= self.most_bytes:
            shared.kept[tokens] = states.to("cpu", copy=True)
            self._bytes += size


def _places(pack: Pack) -> list[Place]:
    """Of every conversation in the pack; two may be of the same tokens."""
    ids, owners = pack.input_ids.cpu().numpy(), pack.segment_ids.cpu().numpy()
    found = []
    for row, owner in enumerate(owners):
        ends = [0, *((owner[1:] != owner[:-1]).nonzero()[0] + 1).tolist(), len(owner)]
        found += [(ids[row, first:last].tobytes(), row, slice(first, last))
                  for first, last in zip(ends[:-1], ends[1:], strict=True) if owner[first]]
    return found
