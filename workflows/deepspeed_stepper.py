"""DeepSpeed under the trainer's `Stepper` protocol: data parallel, ZeRO, any number of workers.

What is specific to training a cartridge before a frozen base:
- only the cartridge's slots are given to the optimiser, so only they are reduced;
- DeepSpeed never sees the base model: it neither broadcasts nor casts it, and the cartridge, its
  gradients and moments stay float32 whatever the base computes in.

Stages 0 to 2: stage 3 would partition the base, whose head the student reads outside of a module.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from cartridges.config import TrainSettings
from cartridges.distill.losses import LossSums
from cartridges.distill.optimizer import make_optimizer, set_learning_rate
from cartridges.distill.packing import Pack
from cartridges.distill.student import Student

TAG = "state"


class _WithoutBase(nn.Module):
    """A student whose base model is out of DeepSpeed's sight."""

    def __init__(self, student: Student):
        super().__init__()
        self.cartridge = student.cartridge
        self._student = (student,)  # a tuple is not registered as a submodule

    def forward(self, pack: Pack) -> LossSums:
        return self._student[0](pack)


class DeepSpeedStepper:
    """`student` under DeepSpeed. Needs an initialised `torch.distributed` process group.

    One `forward_backward` for every pack of the worker (the same number on each), then `step`.
    """

    def __init__(self, student: Student, settings: TrainSettings):
        self.student = student
        self.stage = settings.zero_stage
        self.max_grad_norm = settings.optimizer.max_grad_norm
        self.world_size = torch.distributed.get_world_size()
        trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(student.cartridge, settings.optimizer)
        self._norm = 0.0
        if self.stage == 0:
            optimizer.register_step_pre_hook(self._clip)
        self.engine = _initialize(_WithoutBase(student), optimizer, trainable, self._config())
        # DeepSpeed makes the parameters equal on all workers; what is frozen of the cartridge are buffers.
        for buffer in student.cartridge.buffers():
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

    def forward_backward(self, pack: Pack, num_loss_tokens: int) -> LossSums:
        """Add the gradient of `pack`'s loss divided by `num_loss_tokens`, the step's global count."""
        sums = self.engine(pack)
        # DeepSpeed averages over workers; the loss is already divided by the global count.
        self.engine.backward(sums.loss * (self.world_size / num_loss_tokens), scale_wrt_gas=False)
        return sums

    def step(self, lr: float) -> float:
        """Reduce, clip, update, clear; the gradient norm before clipping."""
        set_learning_rate(self.engine.optimizer, lr)
        self.engine.step()
        return self._norm if self.stage == 0 else float(self.engine.get_global_grad_norm())

    def _clip(self, optimizer, *_) -> None:
        # Here and not by DeepSpeed at stage 0, which throws the norm away.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))

    def save(self, directory: Path) -> None:
        """Cartridge and moments. Every worker calls it, with the same directory."""
        self.engine.save_checkpoint(str(directory), tag=TAG, exclude_frozen_parameters=True)

    def load(self, directory: Path) -> None:
        self.engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=False)


def _initialize(module: nn.Module, optimizer, trainable, config: dict[str, Any]):
    import logging

    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Compiled on first use otherwise (a minute), for a gain within one machine that gloo does not need.
    __compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, model_parameters=trainable, config=config,
        dist_init_required=False)
    return engine
