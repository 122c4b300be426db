"""The layers below the trained ones: what they make of a conversation never changes, so it is kept."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cartridges.attention import AttentionContext
from cartridges.cartridge import Cartridge
from cartridges.distill.packing import Pack, segment_bias
from cartridges.forward import read_after, through_layers

MOST_BYTES = 2 * 2**30
"""Hidden states kept in memory; conversations beyond are computed anew each time."""


@dataclass(frozen=True)
class Shared:
    """The turns that begin a pack's conversations: `states` `[1, S, hidden]` where the trained layers
    begin, and what their `positions` `[1, S]` are; `context` has their keys and values in the layers below."""

    states: torch.Tensor
    positions: torch.Tensor
    context: AttentionContext


class LowerLayers:
    """The first `cartridge.num_frozen_layers` layers of `model` after a cartridge: their slots are frozen,
    so a conversation's hidden states behind them depend on its tokens alone, whatever else is in its pack.
    """

    def __init__(self, model: PreTrainedModel, cartridge: Cartridge):
        self.model, self.cartridge = model, cartridge
        self.count = cartridge.num_frozen_layers
        self._shared: dict[bytes, Shared] = {}
        self._states: dict[bytes, torch.Tensor] = {}
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
        if self.count == 0:
            return self.model.base_model.embed_tokens(pack.input_ids)
        segments = _segments(pack)
        if all(key in self._states for key in segments):
            return self._recalled(pack, segments)
        context = AttentionContext(shared.context.prefix_keys, shared.context.prefix_values,
                                   own_bias=segment_bias(pack.segment_ids, self.model.dtype))
        hidden = self.model.base_model.embed_tokens(pack.input_ids)
        hidden = through_layers(self.model, hidden, position_ids, context, last=self.count)
        self._keep(hidden, segments)
        return hidden

    def _read_shared(self, ids: torch.Tensor) -> Shared:
        keys, values = (tensor.to(self.model.dtype).unsqueeze(1)
                        for tensor in (self.cartridge.lower_keys, self.cartridge.lower_values))
        context = AttentionContext(list(keys), list(values))
        positions = self.cartridge.num_tokens + torch.arange(len(ids), device=ids.device)[None]
        hidden = self.model.base_model.embed_tokens(ids[None])
        if self.count and len(ids):
            hidden = read_after(self.model, hidden, positions, context, last=self.count)
        return Shared(hidden, positions, context)

    def _recalled(self, pack: Pack, segments: dict[bytes, tuple[int, slice]]) -> torch.Tensor:
        hidden = torch.zeros(*pack.input_ids.shape, self.model.config.hidden_size, dtype=self.model.dtype)
        for key, (row, at) in segments.items():
            hidden[row, at] = self._states[key]
        return hidden.to(pack.input_ids.device)

    def _keep(self, hidden: torch.Tensor, segments: dict[bytes, tuple[int, slice]]) -> None:
        hidden = hidden.cpu()
        for key, (row, at) in segments.items():
            states = hidden[row, at]
            size = states.numel() * states.element_size()
            if key not in self._states and self._bytes + size <= MOST_BYTES:
                self._states[key] = states.clone()
                self._bytes += size


def _segments(pack: Pack) -> dict[bytes, tuple[int, slice]]:
    """Row and place of each conversation, by its tokens (those it shares included)."""
    start = pack.shared_ids.cpu().numpy().tobytes()
    ids, owners = pack.input_ids.cpu().numpy(), pack.segment_ids.cpu().numpy()
    found = {}
    for row, owner in enumerate(owners):
        ends = [0, *((owner[1:] != owner[:-1]).nonzero()[0] + 1).tolist(), len(owner)]
        for first, last in zip(ends[:-1], ends[1:], strict=True):
            if owner[first]:
                found[start + b"|" + ids[row, first:last].tobytes()] = row, slice(first, last)
    return found
