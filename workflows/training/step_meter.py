"""Measures a training worker: its memory, and the share of the matrix-product rate that its steps reach."""

import resource
import sys
from collections.abc import Sequence

import torch

from cartridges.cartridge import Cartridge
from cartridges.compose import composed_tokens
from cartridges.distill.course import Course, StepMetrics
from cartridges.distill.matmul import bare_seconds, computed, flops, planned
from cartridges.distill.packing import PackPlan
from cartridges.models import BaseModel


class StepMeter:
    """Measures the rate once, on the products of the first step's first pack; the share is of this worker's packs.

    Layers that are not trained are not counted, so in the first epoch, which still reads them, it is too low. Where
    the base is spread over workers nobody has the weights to measure a rate with, and memory alone is told.
    """

    def __init__(self, base: BaseModel, courses: Sequence[Course], cartridges: Sequence[Cartridge],
                 distractors: Sequence[Sequence[Cartridge]]):
        """`distractors` are each member's."""
        self.base, self.courses, self.cartridges, self.distractors = base, courses, cartridges, distractors
        self.flops_per_s = None
        if courses[0].settings.zero_stage < 3:
            pack, p = courses[0].step(0).packs[0].to(base.device), cartridges[0].num_tokens
            # The first time builds kernels for the shapes, as the first step does.
            seconds = [bare_seconds(base, [pack], p) for _ in range(2)][-1]
            self.flops_per_s = flops(base.model, computed(pack, p)) / seconds

    def read(self, metrics: StepMetrics) -> dict[str, float]:
        """`matmul_share` of the step, where the rate is known, and the most memory taken so far, in bytes."""
        if self.flops_per_s is None:
            return {"memory_bytes": memory_bytes()}
        course, cartridge = self.courses[metrics.member], self.cartridges[metrics.member]
        plans = course.order.plans(metrics.step)[course.rank::course.world]
        needed = sum(flops(self.base.model, planned(course.conversations, plan, self._slots(metrics.member, plan)),
                           0 if plan.distractors else cartridge.num_frozen_layers) for plan in plans)
        return {"matmul_share": needed / metrics.seconds / self.flops_per_s, "memory_bytes": memory_bytes()}

    def _slots(self, member: int, plan: PackPlan) -> int:
        """Number of slots before the pack, those of the distractors included."""
        loaded = [self.cartridges[member], *(self.distractors[member][index] for index in plan.distractors)]
        return composed_tokens([(one.num_tokens, one.num_frozen_tokens) for one in loaded])


def memory_bytes() -> int:
    """Most bytes ever taken: by tensors on a GPU, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Kilobytes, but bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
