"""The student: a frozen base model with a trainable cartridge before every conversation."""

import torch
from torch import nn
from transformers import PreTrainedModel

from cartridges.attention import AttentionContext, install
from cartridges.cartridge import Cartridge
from cartridges.distill.losses import LossSums, distillation, next_token
from cartridges.distill.packing import Pack
from cartridges.forward import hidden_states


class Student(nn.Module):
    """One module over both, so that a distributed engine can partition the base and reduce only the
    cartridge's gradients. `parameters()` that require grad are the cartridge's trainable slots.

    `loss` is "distillation" or "next_token".
    """

    def __init__(self, model: PreTrainedModel, cartridge: Cartridge, loss: str = "distillation"):
        super().__init__()
        install(model)
        self.model = model.requires_grad_(False)
        self.cartridge = cartridge
        self.loss = loss

    def forward(self, pack: Pack) -> LossSums:
        """Sums over the pack's loss positions. Divide by the global number of loss tokens."""
        keys, values = (tensor.to(self.model.dtype).unsqueeze(1) for tensor in self.cartridge.keys_values())
        context = AttentionContext(list(keys), list(values))
        if len(pack.shared_ids):
            self._read_shared(pack.shared_ids, context)
        context.own_bias = segment_bias(pack.segment_ids, self.model.dtype)
        before = self.cartridge.num_tokens + len(pack.shared_ids)
        hidden = hidden_states(self.model, pack.input_ids, pack.position_ids + before, context)
        at_loss = hidden.flatten(0, 1)[pack.loss_positions]
        head = self.model.get_output_embeddings().weight
        if self.loss == "next_token":
            return next_token(at_loss, head, pack.targets)
        return distillation(at_loss, head, pack.topk_ids, pack.topk_logprobs)

    def _read_shared(self, shared_ids: torch.Tensor, context: AttentionContext) -> None:
        """Extend the prefix by the KV of the shared turns, once for all rows; gradients flow through."""
        positions = self.cartridge.num_tokens + torch.arange(len(shared_ids), device=shared_ids.device)
        context.collected = []
        hidden_states(self.model, shared_ids[None], positions[None], context)
        for layer, (key, value) in enumerate(context.collected):
            context.prefix_keys[layer] = torch.cat([context.prefix_keys[layer], key], dim=2)
            context.prefix_values[layer] = torch.cat([context.prefix_values[layer], value], dim=2)
        context.collected = None


def segment_bias(segment_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[R, T, T]`: 0 where a token may look (its own conversation, not ahead), -inf elsewhere."""
    T = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = same & torch.ones(T, T, dtype=torch.bool, device=segment_ids.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=segment_ids.device).masked_fill(~seen, float("-inf"))
