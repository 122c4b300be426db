"""Conversations as other trainers take them: a padded batch, logits of all its positions, plain autograd."""

from collections.abc import Sequence

import numpy as np
import torch

from cartridges.distill.losses import TINY
from cartridges.distill.packing import with_label
from cartridges.forward import round_up
from cartridges.records import Conversation


def pad(conversations: Sequence[Conversation], multiple: int, label_share: float) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `[B, T]`, padded on the right to the longest, rounded up to
    `multiple`; `loss_positions` `[m]` of the flattened batch; `topk_ids`, `topk_logprobs` `[m, k]`.

    Rounded up because a new shape costs a CPU seconds in bfloat16: to the peers' advantage.
    """
    slots = round_up(max(len(conversation.input_ids) for conversation in conversations), multiple)
    ids = np.zeros((len(conversations), slots), np.int64)
    mask = np.zeros_like(ids)
    positions, topk_ids, topk_logprobs = [], [], []
    for row, conversation in enumerate(conversations):
        n = len(conversation.input_ids)
        ids[row, :n], mask[row, :n] = conversation.input_ids, 1
        predicting = np.flatnonzero(conversation.loss_mask)
        share = label_share if conversation.info.get("known") else 0.0
        top = with_label(conversation.topk_ids, conversation.topk_logprobs,
                         conversation.input_ids[predicting + 1], share)
        positions.append(row * slots + predicting)
        topk_ids.append(top[0])
        topk_logprobs.append(top[1])
    arrays = {"input_ids": ids, "attention_mask": mask, "loss_positions": np.concatenate(positions),
              "topk_ids": np.concatenate(topk_ids).astype(np.int64),
              "topk_logprobs": np.concatenate(topk_logprobs).astype(np.float32)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def full_logits_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `distill.losses.distillation` a loss token, from `logits` `[B, T, V]`."""
    logprobs = logits.flatten(0, 1)[batch["loss_positions"]].float().log_softmax(-1)
    chosen = logprobs.gather(1, batch["topk_ids"])
    teacher = batch["topk_logprobs"].exp()
    tail = (1 - teacher.sum(-1)).clamp(min=0)
    student_tail = (1 - chosen.exp().sum(-1)).clamp(min=TINY)
    return (-(teacher * chosen).sum() - (tail * student_tail.log()).sum()) / len(chosen)
