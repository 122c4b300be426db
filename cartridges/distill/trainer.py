"""The optimiser loop: plain, resumable, and blind to who computes the gradients."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from cartridges.config import TrainSettings
from cartridges.distill.losses import LossSums
from cartridges.distill.optimizer import make_optimizer, set_learning_rate
from cartridges.distill.packing import Pack, collate
from cartridges.distill.schedule import Order, learning_rate
from cartridges.distill.student import Student
from cartridges.records import Conversation


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is good."""


@dataclass(frozen=True)
class StepMetrics:
    """Means over the step's loss tokens (nats a token), and rates."""

    step: int
    steps: int
    loss: float
    kl: float
    teacher_entropy: float
    topk_mass: float
    lr: float
    grad_norm: float
    tokens: int
    loss_tokens: int
    seconds: float


class Stepper(Protocol):
    """Owns the student, its optimiser and the communication between workers."""

    def forward_backward(self, pack: Pack, num_loss_tokens: int) -> LossSums:
        """Accumulate the gradient of `loss / num_loss_tokens`. `num_loss_tokens` is global."""
        ...

    def step(self, lr: float) -> float:
        """Reduce, clip, update, clear. Returns the gradient norm before clipping."""
        ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


class TorchStepper:
    """One process; the optimiser is on the cartridge's trainable slots (float32 master and moments)."""

    def __init__(self, student: Student, settings: TrainSettings):
        self.student = student
        self.max_grad_norm = settings.optimizer.max_grad_norm
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(student.cartridge, settings.optimizer)

    def forward_backward(self, pack: Pack, num_loss_tokens: int) -> LossSums:
        sums = self.student(pack)
        (sums.loss / num_loss_tokens).backward()
        return sums

    def step(self, lr: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def save(self, directory: Path) -> None:
        state = {"cartridge": self.student.cartridge.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, directory / "trainer.pt")

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "trainer.pt", weights_only=True)
        self.student.cartridge.load_state_dict(state["cartridge"])
        self.optimizer.load_state_dict(state["optimizer"])


class Trainer:
    """Runs the steps of `order` on `stepper`. `rank` of `world` workers takes every `world`-th pack.

    `report(metrics)` is called after every step, `checkpoint(step)` every `checkpoint_every` steps
    and after the last one. Raises `NonFiniteLoss` before a bad gradient is applied.
    """

    def __init__(self, stepper: Stepper, conversations: Sequence[Conversation], settings: TrainSettings,
                 seed: int, device="cpu", rank: int = 0, world: int = 1):
        self.stepper, self.conversations, self.settings = stepper, conversations, settings
        self.order = Order(conversations, settings, seed)
        self.device, self.rank, self.world = device, rank, world
        self.next_step = 0

    def run(self, report: Callable[[StepMetrics], None] = lambda _: None,
            checkpoint: Callable[[int], None] = lambda _: None, until: int | None = None) -> None:
        """Steps from `next_step` to `until` (None: the end)."""
        last = self.order.steps if until is None else min(until, self.order.steps)
        while self.next_step < last:
            report(self.train_step())
            done = self.next_step
            if done % self.settings.checkpoint_every == 0 or done == self.order.steps:
                checkpoint(done)

    def train_step(self) -> StepMetrics:
        start, step = time.perf_counter(), self.next_step
        plans = self.order.plans(step)
        packs = [collate(self.conversations, plan, self.settings.pack_tokens, self.settings.label_share)
                 for plan in plans]
        # Every worker knows every pack, so the global count of loss tokens needs no communication.
        loss_tokens = sum(pack.num_loss_tokens for pack in packs)
        mine = packs[self.rank::self.world]
        sums = [self.stepper.forward_backward(pack.to(self.device), loss_tokens) for pack in mine]
        total = _add(sums)
        if not math.isfinite(total["loss"]):
            raise NonFiniteLoss(f"the loss became {total['loss']} at step {step}; lower train.optimizer.lr "
                                "and run again: the last checkpoint is kept")
        lr = learning_rate(step, self.order.steps, self.settings.optimizer)
        norm = self.stepper.step(lr)
        self.next_step += 1
        count = max(total["count"], 1.0)
        return StepMetrics(step, self.order.steps, total["loss"] / count, total["kl"] / count,
                           total["entropy"] / count, total["mass"] / count, lr, norm,
                           sum(int((pack.segment_ids > 0).sum()) for pack in packs), loss_tokens,
                           time.perf_counter() - start)


def _add(sums: Sequence[LossSums]) -> dict[str, float]:
    names = ("loss", "kl", "entropy", "mass", "count")
    return {name: sum(float(getattr(s, name).detach()) for s in sums) for name in names}
