"""The student: a frozen base model with a trainable cartridge as the prefix of every conversation.

Several students of one base model, each with its own cartridge, can run their packs in one pass (`forward_joint`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from cartridges import flex_attention
from cartridges.attention import AttentionContext, install
from cartridges.cartridge import Cartridge
from cartridges.distill.distractors import ComposedPrefix, DistractorPrefixes
from cartridges.distill.losses import LossSums, distillation, next_token
from cartridges.distill.lower_layers import MOST_BYTES, LowerLayers
from cartridges.distill.packing import Pack, segment_bias
from cartridges.forward import extend_prefix, through_layers


class Student(nn.Module):
    """One module over base model and cartridge. Only the cartridge's trainable slots require grad.

    `loss`: "distillation" or "next_token". `distractors`: read-only cartridges, composed with the trained one in the
    packs that name them; `live` if they are in training themselves. `gathered` is set under ZeRO-3: a context manager
    within which the head is whole. Workers must then run the same layers in the same order, so nothing is cached and
    conversations share no tokens (`packing.unshared`). Otherwise up to `kept_bytes` of hidden states are cached.
    `recompute`: gradient checkpointing.
    """

    def __init__(self, model: PreTrainedModel, cartridge: Cartridge, loss: str = "distillation",
                 distractors: Sequence[Cartridge] = (),
                 gathered: Callable[[torch.Tensor], AbstractContextManager] | None = None, live: bool = False,
                 kept_bytes: int = MOST_BYTES, recompute: bool = False):
        super().__init__()
        install(model)
        self.model = model.requires_grad_(False)
        self.cartridge = cartridge
        self.loss, self.recompute = loss, recompute
        self.gathered, self.lockstep = gathered or nullcontext, gathered is not None
        # Not a submodule: distractors are neither trained nor saved.
        self.distractor_prefixes = DistractorPrefixes(self.model, cartridge, distractors, live)
        self.lower = LowerLayers(self.model, cartridge, kept_bytes if gathered is None else 0)

    def forward(self, pack: Pack) -> LossSums:
        """Sums over the pack's loss positions. Divide by the global number of loss tokens."""
        return forward_joint([self], [pack])[0]

    def loaded(self, pack: Pack) -> ComposedPrefix:
        """The prefix of the pack."""
        if len(pack.distractors):
            return self.distractor_prefixes.loaded(tuple(pack.distractors.tolist()))
        return ComposedPrefix(self.cartridge.num_tokens, *self.cartridge.upper_keys_values(), self.lower)

    def losses(self, hidden: torch.Tensor, pack: Pack) -> LossSums:
        """Losses from the pack's last hidden states, `[R, T, hidden]` or flat."""
        at_loss = hidden.flatten(0, 1)[pack.loss_positions]
        head = self.model.get_output_embeddings().weight
        with self.gathered(head):  # the loss takes its gradient with it: the backward pass asks for no head
            if self.loss == "next_token":
                return next_token(at_loss, head, pack.targets)
            return distillation(at_loss, head, pack.topk_ids, pack.topk_logprobs)


def forward_joint(students: Sequence[Student], packs: Sequence[Pack]) -> list[LossSums]:
    """Each student's losses on its pack, in one pass through the trained layers.

    The packs must have the same `pack_shape`, the students the same base model and number of trained layers.
    Cartridges may differ in length.
    """
    loaded = [student.loaded(pack) for student, pack in zip(students, packs, strict=True)]
    hidden = _hidden_states(students[0].model, loaded, packs, students[0].recompute)
    return [student.losses(states, pack) for student, states, pack in zip(students, hidden, packs, strict=True)]


def pack_shape(pack: Pack) -> tuple[int, ...]:
    """Packs of the same shape can run in one pass."""
    return (*pack.input_ids.shape, len(pack.shared_ids))


def _hidden_states(model: PreTrainedModel, loaded: Sequence[ComposedPrefix], packs: Sequence[Pack],
                   recompute: bool) -> Sequence[torch.Tensor]:
    """`[R, T, hidden]` or `[1, R*T, hidden]` of each pack, differentiable in its cartridge."""
    first, num_shared = loaded[0].lower.count, len(packs[0].shared_ids)
    context = _prefixes(loaded, first, model.dtype)
    shared = [one.lower.shared(pack) for one, pack in zip(loaded, packs, strict=True)]
    positions = [pack.position_ids + one.num_tokens + num_shared for one, pack in zip(loaded, packs, strict=True)]
    states = [one.lower.states(*of) for one, *of in zip(loaded, packs, shared, positions, strict=True)]
    run = partial(through_layers, model, context=context, first=first, recompute=recompute)
    if flex_attention.supports(context.prefix_keys[first]):
        context.flat = flex_attention.flat_mask(
            torch.stack([flex_attention.owners(pack.segment_ids, num_shared) for pack in packs]),
            [one.num_tokens for one in loaded])
        hidden = run(_flat([one.states for one in shared], states), _flat([one.positions for one in shared], positions))
        return model.base_model.norm(hidden[:, num_shared:]).chunk(len(packs))
    if num_shared:  # once for all rows of a pack; gradients flow through
        extend_prefix(model, torch.cat([one.states for one in shared]), torch.cat([one.positions for one in shared]),
                      context, first, recompute=recompute)
    context.own_bias = segment_bias(torch.cat([pack.segment_ids for pack in packs]), model.dtype)
    return model.base_model.norm(run(torch.cat(states), torch.cat(positions))).chunk(len(packs))


def _flat(shared: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[N, S + R*T, ...]` of the packs' shared turns `[1, S, ...]` and rows `[R, T, ...]`."""
    return torch.stack([torch.cat([before[0], own.flatten(0, 1)]) for before, own in zip(shared, rows, strict=True)])


def _prefixes(loaded: Sequence[ComposedPrefix], first: int, dtype: torch.dtype) -> AttentionContext:
    """The prefixes `[N, H, P, D]` of each layer from `first` on; shorter ones are padded to the longest and masked."""
    longest = max(one.num_tokens for one in loaded)
    keys, values = (
        torch.stack([functional.pad(tensor.to(dtype), (0, 0, 0, longest - tensor.shape[2])) for tensor in tensors], 1)
        for tensors in ([one.keys for one in loaded], [one.values for one in loaded]))
    bias = None
    if any(one.num_tokens < longest for one in loaded):
        slots, lengths = torch.arange(longest, device=keys.device), [one.num_tokens for one in loaded]
        beyond = slots >= torch.tensor(lengths, device=keys.device)[:, None]
        bias = torch.zeros(beyond.shape, dtype=dtype, device=keys.device).masked_fill(beyond, float("-inf"))
    return AttentionContext([None] * first + list(keys), [None] * first + list(values), bias)
