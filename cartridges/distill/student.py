"""The student: a frozen base model with a trainable cartridge before every conversation."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from cartridges.attention import AttentionContext, install
from cartridges.cartridge import Cartridge
from cartridges.distill.beside import Company, Loaded
from cartridges.distill.losses import LossSums, distillation, next_token
from cartridges.distill.lower_layers import LowerLayers
from cartridges.distill.packing import Pack, segment_bias
from cartridges.forward import read_after, through_layers


class Student(nn.Module):
    """One module over both. `parameters()` that require grad are the cartridge's trainable slots.

    `loss` is "distillation" or "next_token". `distractors` are read-only cartridges; those that a pack
    names stand beside the trained one while it is read.
    """

    def __init__(self, model: PreTrainedModel, cartridge: Cartridge, loss: str = "distillation",
                 distractors: Sequence[Cartridge] = ()):
        super().__init__()
        install(model)
        self.model = model.requires_grad_(False)
        self.cartridge = cartridge
        self.loss = loss
        self.company = Company(self.model, cartridge, distractors)  # no submodule: nobody trains or saves them
        self.lower = LowerLayers(self.model, cartridge)

    def forward(self, pack: Pack) -> LossSums:
        """Sums over the pack's loss positions. Divide by the global number of loss tokens."""
        at_loss = self._hidden_states(pack).flatten(0, 1)[pack.loss_positions]
        head = self.model.get_output_embeddings().weight
        if self.loss == "next_token":
            return next_token(at_loss, head, pack.targets)
        return distillation(at_loss, head, pack.topk_ids, pack.topk_logprobs)

    def _hidden_states(self, pack: Pack) -> torch.Tensor:
        """`[R, T, hidden]`, differentiable in the cartridge."""
        loaded = self._loaded(pack)
        first = loaded.lower.count
        keys, values = (tensor.to(self.model.dtype).unsqueeze(1) for tensor in (loaded.keys, loaded.values))
        context = AttentionContext([None] * first + list(keys), [None] * first + list(values))
        shared = loaded.lower.shared(pack)
        if len(pack.shared_ids):  # once for all rows; gradients flow through
            read_after(self.model, shared.states, shared.positions, context, first)
        positions = pack.position_ids + loaded.num_tokens + len(pack.shared_ids)
        context.own_bias = segment_bias(pack.segment_ids, self.model.dtype)
        hidden = loaded.lower.states(pack, shared, positions)
        return self.model.base_model.norm(through_layers(self.model, hidden, positions, context, first))

    def _loaded(self, pack: Pack) -> Loaded:
        if len(pack.beside):
            return self.company.loaded(tuple(pack.beside.tolist()))
        return Loaded(self.cartridge.num_tokens, *self.cartridge.upper_keys_values(), self.lower)
