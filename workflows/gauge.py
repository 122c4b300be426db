"""What a training worker takes of its machine: memory, and the share of the matrix-product rate that it reaches."""

import resource
import sys
from collections.abc import Sequence

import torch

from cartridges.cartridge import Cartridge
from cartridges.compose import composed_tokens
from cartridges.distill.matmul import bare_seconds, computed, flops, planned
from cartridges.distill.packing import PackPlan, collate
from cartridges.distill.trainer import StepMetrics, Trainer
from cartridges.models import BaseModel


class Gauge:
    """Measures the rate once, on the products of the first step's first pack; the share is of this worker's packs.

    Layers that are not trained are not counted, so in the first epoch, which still reads them, it is too low.
    """

    def __init__(self, base: BaseModel, trainer: Trainer, cartridge: Cartridge, distractors: Sequence[Cartridge] = ()):
        self.base, self.trainer, self.cartridge, self.distractors = base, trainer, cartridge, distractors
        pack = collate(trainer.conversations, trainer.order.plans(0)[0], trainer.settings.pack_tokens).to(base.device)
        # The first time builds kernels for the shapes, as the first step does.
        seconds = [bare_seconds(base, [pack], cartridge.num_tokens) for _ in range(2)][-1]
        self.flops_per_s = flops(base.model, computed(pack, cartridge.num_tokens)) / seconds

    def read(self, metrics: StepMetrics) -> dict[str, float]:
        """`matmul_share` of the step, and the most memory taken so far, in bytes."""
        plans = self.trainer.order.plans(metrics.step)[self.trainer.rank::self.trainer.world]
        needed = sum(flops(self.base.model, planned(self.trainer.conversations, plan, self._slots(plan)),
                           0 if plan.beside else self.cartridge.num_frozen_layers) for plan in plans)
        return {"matmul_share": needed / metrics.seconds / self.flops_per_s, "memory_bytes": memory_bytes()}

    def _slots(self, plan: PackPlan) -> int:
        """Before the pack, with the cartridges that stand beside."""
        loaded = [self.cartridge, *(self.distractors[index] for index in plan.beside)]
        return composed_tokens([(one.num_tokens, one.num_frozen_tokens) for one in loaded])


def memory_bytes() -> int:
    """Most bytes ever taken: by tensors on a GPU, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
