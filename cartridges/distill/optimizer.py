"""Adam whose steps are orthogonalised, head by head.

A head's keys (or values) are an associative memory with one slot per row. Adam's steps on it have a few
strong directions that all facts share and many weak ones that distinguish facts. A step whose singular
values are all near 1 learns the weak ones as fast. The idea is Muon's (Jordan et al. 2024, "Muon: an
optimizer for hidden layers"), applied to Adam's update instead of the momentum; here it learned more per
step than either alone (docs/log.md).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cartridges.cartridge import Cartridge
from cartridges.config import OptimizerSettings

_QUINTIC = 3.4445, -4.7750, 2.0315
"""Coefficients of Muon's iteration: five rounds bring singular values from 0.002 to 1 between 0.68 and 1.2."""
_ROUNDS = 5


def make_optimizer(cartridges: Sequence[Cartridge], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Separate parameter groups for keys (`key_lr_scale`) and values. A group's `member` is its cartridge's index."""
    groups = [{"params": [parameter], "lr_scale": scale, "member": member}
              for member, cartridge in enumerate(cartridges)
              for parameter, scale in ((cartridge.trainable_keys, settings.key_lr_scale),
                                       (cartridge.trainable_values, 1.0))]
    kind = {"adam": torch.optim.Adam, "orthogonal_adam": OrthogonalAdam}[settings.name]
    return kind(groups, lr=settings.peak_lr, betas=settings.betas)


def clip(optimizer: torch.optim.Optimizer, lrs: Mapping[int, float], max_norm: float) -> dict[int, float]:
    """Prepare a step of the members in `lrs`: set each one's learning rate and clip its gradients by their own norm.

    Gradients of other members, and those with a norm that is not finite, are discarded, so these members are not
    updated. Returns the norms before clipping.
    """
    parameters: dict[int, list[torch.nn.Parameter]] = {}
    for group in optimizer.param_groups:
        group["lr"] = lrs.get(group["member"], 0.0) * group["lr_scale"]
        parameters.setdefault(group["member"], []).extend(group["params"])
    norms = {member: float(nn.utils.clip_grad_norm_(parameters[member], max_norm)) for member in lrs}
    for member, own in parameters.items():
        if not math.isfinite(norms.get(member, math.nan)):
            for parameter in own:
                parameter.grad = None
    return norms


class OrthogonalAdam(torch.optim.Optimizer):
    """For parameters `[..., slots, head_dim]`: `lr` times Adam's update, orthogonalised as a matrix of
    `slots x head_dim` and brought to elements of root mean square near 1.

    It needs whole matrices, so no optimiser state that is cut up over workers (ZeRO 1 and up).
    """

    def __init__(self, params, lr: float, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("OrthogonalAdam takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(orthogonalized(self._update(parameter, group)), alpha=group["lr"])

    def _update(self, parameter: torch.Tensor, group) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(parameter.grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        correction = 1 - second ** float(state["step"])
        # The first moment's own correction is a factor, which orthogonalising takes away.
        return state["exp_avg"] / (state["exp_avg_sq"] / correction).sqrt_().add_(group["eps"])


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """`[..., n, d]` to about `U V^T` of each, times the root of the longer side (elements near 1).

    The iteration runs on the `d x d` products of columns, whose size does not grow with n.
    """
    n, d = matrices.shape[-2:]
    matrices = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12)
    gram, unit = matrices.transpose(-1, -2) @ matrices, torch.eye(d, device=matrices.device)
    total = unit.expand_as(gram)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        factor = a * unit + b * gram + c * gram @ gram
        total, gram = total @ factor, factor @ gram @ factor
    return (matrices @ total).mul_(max(n, d) ** 0.5)
