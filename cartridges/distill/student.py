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
        keys, values = self.cartridge.keys_values()
        dtype = self.model.dtype
        context = AttentionContext(
            prefix_keys=keys.to(dtype).unsqueeze(1), prefix_values=values.to(dtype).unsqueeze(1),
            own_bias=segment_bias(pack.segment_ids, dtype))
        hidden = hidden_states(self.model, pack.input_ids,
                               pack.position_ids + self.cartridge.num_tokens, context)
        at_loss = hidden.flatten(0, 1)[pack.loss_positions]
        head = self.model.get_output_embeddings().weight
        if self.loss == "next_token":
            return next_token(at_loss, head, pack.targets)
        return distillation(at_loss, head, pack.topk_ids, pack.topk_logprobs)


def segment_bias(segment_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[R, T, T]`: 0 where a token may look (its own conversation, not ahead), -inf elsewhere."""
    T = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = same & torch.ones(T, T, dtype=torch.bool, device=segment_ids.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=segment_ids.device).masked_fill(~seen, float("-inf"))
