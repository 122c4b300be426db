"""The context-distillation loss: cross-entropy against the teacher's stored top-k logprobs.

KL(teacher || student) up to the teacher's entropy, which is constant (arXiv 2506.06266, section on
context distillation). The teacher's mass outside its top-k is one tail bucket, matched against the
student's mass outside the same ids; all k entries count at every position.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

SLICE = 128
"""Positions whose full-vocabulary logits exist at once: peak memory does not grow with the pack."""
TINY = 1e-6


@dataclass(frozen=True)
class LossSums:
    """Sums over loss positions, to be divided by the global count. Scalars, float32.

    `loss` carries the gradient; `kl` is the tailed KL (loss minus teacher entropy, in nats),
    `entropy` the teacher's tailed entropy, `mass` its top-k mass.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    entropy: torch.Tensor
    mass: torch.Tensor
    count: torch.Tensor


def distillation(hidden: torch.Tensor, head: torch.Tensor, topk_ids: torch.Tensor,
                 topk_logprobs: torch.Tensor) -> LossSums:
    """`hidden` `[m, hidden]` at the loss positions, `head` `[V, hidden]`, top-k rows `[m, k]`."""
    teacher = topk_logprobs.float().exp()
    mass = teacher.sum(-1)
    tail = (1 - mass).clamp(min=0)
    entropy = -(teacher * topk_logprobs.float()).sum(-1) - tail * tail.clamp(min=TINY).log()
    loss = _SlicedCrossEntropy.apply(hidden, head, topk_ids, teacher, tail)
    count = torch.tensor(float(len(hidden)), device=hidden.device)
    return LossSums(loss, loss.detach() - entropy.sum(), entropy.sum(), mass.sum(), count)


def next_token(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> LossSums:
    """The baseline: cross-entropy against the tokens themselves (`targets` `[m]`)."""
    ones = torch.ones(len(targets), 1, device=hidden.device)
    loss = _SlicedCrossEntropy.apply(hidden, head, targets[:, None], ones, torch.zeros_like(ones[:, 0]))
    count = torch.tensor(float(len(hidden)), device=hidden.device)
    zero = torch.zeros((), device=hidden.device)
    return LossSums(loss, loss.detach(), zero, count, count)


class _SlicedCrossEntropy(torch.autograd.Function):
    """Loss and its gradient for `hidden` in one pass over the vocabulary, slice by slice.

    The gradient of a bucketed softmax is `student - target`, where the tail's share of the target
    is spread as the student spreads it; so it can be formed while the logits are there, and
    neither logits nor probabilities are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, head, ids, teacher, tail):
        total = torch.zeros((), device=hidden.device)
        grad = torch.empty_like(hidden)
        for start in range(0, len(hidden), SLICE):
            stop = min(start + SLICE, len(hidden))
            loss, slice_grad = _slice(_padded(hidden[start:stop]), head, _padded(ids[start:stop]),
                                      _padded(teacher[start:stop]), _padded(tail[start:stop]), stop - start)
            total += loss
            grad[start:stop] = slice_grad[: stop - start]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        return grad * upstream.to(grad.dtype), None, None, None, None


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """To `SLICE` rows: one shape for the product with the head, however many positions there are."""
    missing = SLICE - len(tensor)
    return functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, missing]) if missing else tensor


def _slice(hidden, head, ids, teacher, tail, real: int):
    logprobs = (hidden @ head.t()).float().log_softmax(-1)
    chosen = logprobs.gather(1, ids)
    student_tail = (1 - chosen.exp().sum(-1)).clamp(min=TINY)
    losses = -(teacher * chosen).sum(-1) - tail * student_tail.log()
    student = logprobs.exp_()
    grad = student * (1 - tail / student_tail)[:, None]
    grad.scatter_(1, ids, chosen.exp() - teacher)
    return losses[:real].sum(), grad.to(hidden.dtype) @ head
