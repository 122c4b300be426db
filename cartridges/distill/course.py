"""The training data of one cartridge by step: a pure function of conversations, settings, seed and step."""

from collections.abc import Sequence
from dataclasses import dataclass

from cartridges.config import TrainSettings
from cartridges.distill.losses import LossSums
from cartridges.distill.packing import Pack, collate, plan_size
from cartridges.distill.schedule import Order, learning_rate
from cartridges.records import Conversation


@dataclass(frozen=True)
class StepMetrics:
    """Means over the step's loss tokens (nats per token), and rates. `member`: the cartridge's index in its cohort."""

    member: int
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


@dataclass(frozen=True)
class Step:
    """One worker's packs of a step. `loss_tokens` and `tokens` are counts over all workers."""

    step: int
    lr: float
    packs: list[Pack]
    loss_tokens: int
    tokens: int


class Course:
    """Packs, learning rate and metrics of each step. Worker `rank` of `world` takes every `world`-th pack of a step.

    `partners`: how many other members of the cohort serve as distractors. 0 takes the distractors of the settings.
    """

    def __init__(self, conversations: Sequence[Conversation], settings: TrainSettings, seed: int, rank: int = 0,
                 world: int = 1, partners: int = 0):
        self.conversations, self.settings, self.rank, self.world = conversations, settings, rank, world
        self.order = Order(conversations, settings, seed, partners or None)

    @property
    def steps(self) -> int:
        return self.order.steps

    def step(self, step: int) -> Step:
        plans = self.order.plans(step)
        packs = [collate(self.conversations, plan, self.settings.pack_tokens, self.settings.label_share)
                 for plan in plans[self.rank::self.world]]
        # Every worker knows every plan, so the global counts need neither communication nor the others' packs.
        sizes = [plan_size(self.conversations, plan) for plan in plans]
        return Step(step, learning_rate(step, self.steps, self.settings.optimizer), packs,
                    sum(size.loss_tokens for size in sizes), sum(size.tokens for size in sizes))

    def metrics(self, member: int, step: Step, sums: Sequence[LossSums], grad_norm: float,
                seconds: float) -> StepMetrics:
        total = {name: sum(float(getattr(one, name).detach()) for one in sums)
                 for name in ("loss", "kl", "entropy", "mass", "count")}
        count = max(total["count"], 1.0)
        return StepMetrics(member, step.step, self.steps, total["loss"] / count, total["kl"] / count,
                           total["entropy"] / count, total["mass"] / count, step.lr, grad_norm, step.tokens,
                           step.loss_tokens, seconds)
