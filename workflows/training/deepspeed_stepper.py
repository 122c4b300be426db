"""DeepSpeed under the trainer's `Stepper` protocol: data parallel, ZeRO, any number of workers.

What is specific to training a cartridge before a frozen base:
- only the cartridge's slots are given to the optimiser, so only they are reduced;
- This engine never sees the base model: it neither broadcasts nor casts it, and the cartridge, its
  gradients and moments stay float32 whatever the base computes in.

Stages 1 and 2 cut up the optimiser's state. What stage 3 is for is the base, which has an engine of its own then
(`workflows.training.zero3`); cartridge and moments, small beside it, stay whole.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cartridges.config import TrainSettings
from cartridges.distill.losses import LossSums
from cartridges.distill.optimizer import clip, make_optimizer
from cartridges.distill.packing import Pack
from cartridges.distill.student import Student
from cartridges.distill.trainer import forward_packs
from cartridges.errors import NonFiniteLoss

TAG = "state"


class _WithoutBase(nn.Module):
    """Students whose base model is out of DeepSpeed's sight."""

    def __init__(self, students: Sequence[Student]):
        super().__init__()
        self.cartridges = nn.ModuleList(student.cartridge for student in students)
        self._students = tuple(students)  # a tuple's members are not registered as submodules

    def forward(self, packs: Mapping[int, Pack]) -> dict[int, LossSums]:
        return forward_packs(self._students, packs)


class DeepSpeedStepper:
    """`students` under DeepSpeed. Needs an initialised `torch.distributed` process group.

    One `forward_backward` for every round of the worker's packs (as many on each), then `step`. Stages 1 and 2 take
    one student: what they cut up has no members.
    """

    def __init__(self, students: Sequence[Student], settings: TrainSettings):
        self.stage = settings.zero_stage % 3  # at stage 3 as at 0
        self.max_grad_norm = settings.optimizer.max_grad_norm
        self.world_size = torch.distributed.get_world_size()
        module = _WithoutBase(students)
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(list(module.cartridges), settings.optimizer)
        self._lrs: Mapping[int, float] = {}
        self._norms: dict[int, float] = {}
        if self.stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        self.engine = _initialize(module, optimizer, trainable, self._config())
        # DeepSpeed makes the parameters equal on all workers; what is frozen of the cartridges are buffers.
        for buffer in module.buffers():
            if buffer.numel():
                torch.distributed.broadcast(buffer, src=0)

    @property
    def device(self) -> torch.device:
        """Where the packs must be."""
        return self.engine.device

    def _config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,
            # step() is the boundary: a step takes as many packs as it is given.
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if self.stage == 0 else self.max_grad_norm,
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }

    def forward_backward(self, packs: Mapping[int, Pack], loss_tokens: Mapping[int, int]) -> dict[int, LossSums]:
        """Add the gradient of each member's loss divided by its `loss_tokens`, the step's global count."""
        sums = self.engine(packs)
        if self.stage and not all(math.isfinite(float(one.loss.detach())) for one in sums.values()):
            # `_clip` takes out what is not finite; these stages do not come by it.
            raise NonFiniteLoss("the loss is not finite; lower train.optimizer.lr and run again: the last checkpoint "
                                "is kept")
        # DeepSpeed averages over workers; the losses are already divided by the global counts.
        loss = sum(sums[member].loss / loss_tokens[member] for member in packs)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)
        return sums

    def step(self, lrs: Mapping[int, float]) -> dict[int, float]:
        """Reduce, clip, update the members in `lrs`, clear; their gradient norms before clipping."""
        self._lrs = lrs
        if self.stage == 0:
            self.engine.step()
            return self._norms
        (lr,) = lrs.values()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.engine.step()
        return {0: float(self.engine.get_global_grad_norm())}

    def _clip(self, optimizer, *_) -> None:
        # Here and not by DeepSpeed at stage 0, which clips all by one norm and throws that away.
        self._norms = clip(optimizer, self._lrs, self.max_grad_norm)

    def save(self, directory: Path) -> None:
        """Cartridges and moments. Every worker calls it, with the same directory."""
        self.engine.save_checkpoint(str(directory), tag=TAG, exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        self.engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)


def _initialize(module: nn.Module, optimizer, trainable, config: dict[str, Any]):
    import deepspeed

    quiet()
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, model_parameters=trainable, config=config,
        dist_init_required=False)
    return engine


def quiet() -> None:
    """Silence DeepSpeed and keep it from compiling. Call it before the first engine is made."""
    import logging

    from deepspeed.ops import __compatible_ops__

    # Compiled on first use otherwise (a minute), for a gain within one machine that gloo does not need.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
