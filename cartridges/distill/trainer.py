"""The optimiser loop. It is resumable and independent of how gradients are computed (`Stepper`).

One loop trains one cartridge or a cohort: several cartridges of different corpora over one base model. Each member
has its own course, learning rate and gradient norm, so it learns the same as when trained alone.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from cartridges.config import TrainSettings
from cartridges.distill.course import Course, Step, StepMetrics
from cartridges.distill.losses import LossSums
from cartridges.distill.optimizer import clip, make_optimizer
from cartridges.distill.packing import Pack
from cartridges.distill.student import Student, forward_joint, pack_shape
from cartridges.errors import NonFiniteLoss


class Stepper(Protocol):
    """Owns the students, their optimiser and the communication between workers. Members go by number."""

    def forward_backward(self, packs: Mapping[int, Pack], loss_tokens: Mapping[int, int]) -> dict[int, LossSums]:
        """Accumulate the gradients of each member's `loss / loss_tokens`, which is the global count of its step."""
        ...

    def step(self, lrs: Mapping[int, float]) -> dict[int, float]:
        """Reduce, clip and update the members in `lrs`, clear all. Returns their gradient norms before clipping."""
        ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


class TorchStepper:
    """One process; the optimiser is on the cartridges' trainable slots (float32 master and moments)."""

    def __init__(self, students: Sequence[Student], settings: TrainSettings):
        self.students, self.max_grad_norm = tuple(students), settings.optimizer.max_grad_norm
        self.optimizer = make_optimizer([student.cartridge for student in students], settings.optimizer)

    def forward_backward(self, packs: Mapping[int, Pack], loss_tokens: Mapping[int, int]) -> dict[int, LossSums]:
        sums = forward_packs(self.students, packs)
        sum(sums[member].loss / loss_tokens[member] for member in packs).backward()
        return sums

    def step(self, lrs: Mapping[int, float]) -> dict[int, float]:
        norms = clip(self.optimizer, lrs, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    def save(self, directory: Path) -> None:
        state = {"cartridges": [student.cartridge.state_dict() for student in self.students],
                 "optimizer": self.optimizer.state_dict()}
        torch.save(state, directory / "trainer.pt")

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "trainer.pt", weights_only=True)
        for student, cartridge in zip(self.students, state["cartridges"], strict=True):
            student.cartridge.load_state_dict(cartridge)
        self.optimizer.load_state_dict(state["optimizer"])


def forward_packs(students: Sequence[Student], packs: Mapping[int, Pack],
                  joined: bool | None = None) -> dict[int, LossSums]:
    """The losses of the members in `packs`. With `joined`, packs of the same shape run in one pass.

    None joins them on a GPU. On a CPU one pack fills the cores, and each number of joined packs would be a new shape.
    """
    if joined is None:
        joined = next(iter(packs.values())).input_ids.is_cuda and not any(one.lockstep for one in students)
    passes: dict[object, list[int]] = {}
    for member, pack in packs.items():
        passes.setdefault(pack_shape(pack) if joined else member, []).append(member)
    sums: dict[int, LossSums] = {}
    for members in passes.values():
        found = forward_joint([students[member] for member in members], [packs[member] for member in members])
        sums |= dict(zip(members, found, strict=True))
    return sums


class Trainer:
    """Runs the members' `courses` on `stepper`, one step of each at a time.

    `report(metrics)` is called after every member's step, `checkpoint(step)` every `checkpoint_every` steps and after
    the last. A member with a gradient that is not finite keeps its state from before that step; `failed` holds its
    message, and the others continue. `NonFiniteLoss` is raised when no member is left.
    """

    def __init__(self, stepper: Stepper, courses: Sequence[Course], device="cpu"):
        self.stepper, self.courses, self.device = stepper, tuple(courses), device
        self.steps = max(course.steps for course in courses)
        self.checkpoint_every = courses[0].settings.checkpoint_every
        self.next_step = 0
        self.failed: dict[int, str] = {}
        self._ahead: tuple[int, dict[int, Step]] = -1, {}

    def run(self, report: Callable[[StepMetrics], None] = lambda _: None,
            checkpoint: Callable[[int], None] = lambda _: None, until: int | None = None) -> None:
        """Steps from `next_step` to `until` (None: the end)."""
        last = self.steps if until is None else min(until, self.steps)
        while self.next_step < last:
            for metrics in self.train_step():
                report(metrics)
            done = self.next_step
            if done % self.checkpoint_every == 0 or done == self.steps:
                checkpoint(done)

    def train_step(self) -> list[StepMetrics]:
        """One step of each unfinished member; `seconds` is its share of the time."""
        start = time.perf_counter()
        number, prepared = self._ahead
        steps = self._prepare(self.next_step) if number != self.next_step else {
            member: step for member, step in prepared.items() if member not in self.failed}
        sums = self._losses(steps)
        # While a GPU is still at work: the optimiser's step waits for it.
        self._ahead = self.next_step + 1, self._prepare(self.next_step + 1)
        norms = self.stepper.step({member: step.lr for member, step in steps.items()})
        self._note_failures(norms)
        self.next_step += 1
        seconds = (time.perf_counter() - start) / max(1, len(steps))
        return [self.courses[member].metrics(member, step, sums[member], norms[member], seconds)
                for member, step in steps.items() if member not in self.failed]

    def _prepare(self, number: int) -> dict[int, Step]:
        """Step `number` of each unfinished member."""
        return {member: course.step(number) for member, course in enumerate(self.courses)
                if number < course.steps and member not in self.failed}

    def _losses(self, steps: Mapping[int, Step]) -> dict[int, list[LossSums]]:
        loss_tokens = {member: step.loss_tokens for member, step in steps.items()}
        sums: dict[int, list[LossSums]] = {member: [] for member in steps}
        for packs in zip(*(step.packs for step in steps.values()), strict=True):
            by_member = {member: pack.to(self.device) for member, pack in zip(steps, packs, strict=True)}
            for member, found in self.stepper.forward_backward(by_member, loss_tokens).items():
                sums[member].append(found)
        return sums

    def _note_failures(self, norms: Mapping[int, float]) -> None:
        """By the gradients, which all workers share; a loss is known to one worker only."""
        self.failed |= {member: self._message(norm) for member, norm in norms.items() if not math.isfinite(norm)}
        if len(self.failed) == len(self.courses):
            raise NonFiniteLoss(next(iter(self.failed.values())))

    def _message(self, value: float) -> str:
        return (f"the gradient became {value} at step {self.next_step}; lower train.optimizer.lr and run again: the "
                "last checkpoint is kept")
