"""Learning rate and data order: pure functions of the step."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cartridges.config import OptimizerSettings, TrainSettings
from cartridges.distill.packing import PackPlan, plan_packs
from cartridges.records import Conversation


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Linear warm-up from above zero, then linear decay to `final_lr_share` of the peak."""
    warmup = max(1, math.ceil(settings.warmup_share * steps))
    if step < warmup:
        return settings.peak_lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.peak_lr * (1 - (1 - settings.final_lr_share) * progress)


class Order:
    """Which packs each step takes. An epoch's packs are a function of (lengths, seed, epoch).

    `num_distractors` cartridges may be drawn as distractors; None takes the number of `settings.distractors`.
    """

    def __init__(self, conversations: Sequence[Conversation], settings: TrainSettings, seed: int,
                 num_distractors: int | None = None):
        self.conversations, self.settings, self.seed = conversations, settings, seed
        self.num_distractors = len(settings.distractors) if num_distractors is None else num_distractors
        self._epochs: dict[int, list[PackPlan]] = {}
        self.per_epoch = len(self._epoch(0))

    @property
    def steps(self) -> int:
        """`settings.steps`, or as many as `settings.epochs` need."""
        if self.settings.steps:
            return self.settings.steps
        return max(1, math.ceil(self.settings.epochs * self.per_epoch / self.settings.packs_per_step))

    def plans(self, step: int) -> list[PackPlan]:
        """The packs of `step`. Epochs follow each other without a gap."""
        first = step * self.settings.packs_per_step
        return [self._pack(first + i) for i in range(self.settings.packs_per_step)]

    def _pack(self, index: int) -> PackPlan:
        # Every epoch draws its rows anew, so their number may differ a little: an index beyond this
        # epoch's packs wraps around, which repeats a pack rather than shifting all later ones.
        epoch, within = divmod(index, self.per_epoch)
        plans = self._epoch(epoch)
        return replace(plans[within % len(plans)], distractors=self._draw_distractors(index))

    def _draw_distractors(self, index: int) -> tuple[int, ...]:
        """The distractors of a pack: none in most, else one to `max_distractors` different ones."""
        count = self.num_distractors
        if not count:
            return ()
        rng = np.random.default_rng([self.seed, 2, index])
        if rng.random() >= self.settings.distractor_share:
            return ()
        drawn = rng.integers(1, min(self.settings.max_distractors, count) + 1)
        return tuple(rng.choice(count, drawn, replace=False).tolist())

    def _epoch(self, epoch: int) -> list[PackPlan]:
        if epoch not in self._epochs:
            # A step's packs are made while the one before, maybe of the last epoch, is still asked for.
            self._epochs = {kept: plans for kept, plans in self._epochs.items() if kept == epoch - 1}
            self._epochs[epoch] = plan_packs(self.conversations, self.settings.row_tokens, self.settings.pack_tokens,
                                             self.seed * 1_000_003 + epoch)
        return self._epochs[epoch]
