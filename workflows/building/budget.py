"""How much to do: from a time, or a number of conversations or tokens, to conversations and steps, by rates measured
on this machine."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from workflows.synthesis.plan_size import FEWEST_CONVERSATIONS, with_plan

TRAINING_START_SECONDS = 60.0
SYNTHESIS_START_SECONDS = 30.0
START_SECONDS = SYNTHESIS_START_SECONDS + TRAINING_START_SECONDS
"""Part of a budget that goes to starting Ray, to loading the model twice and to the start of training."""

_TIMES = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """Seconds of work, planned conversations, or tokens of the conversations that are kept."""

    amount: float
    unit: Literal["seconds", "conversations", "tokens"]


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine, measured: for a planned conversation and for a pack of a training step.

    `kept` is the share of planned conversations that pass the filters, `tokens` the mean length of
    those, without the turns that they share in a pack.
    """

    conversation_seconds: float
    pack_seconds: float
    kept: float
    tokens: float


def parse_budget(text: str) -> Budget:
    """`90s`, `10m`, `1.5h`, `2000conversations` or `500000tokens`. Raises `UserError` for anything else."""
    time = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip(), re.ASCII)
    count = re.fullmatch(r"(\d+)\s*(conversation|token)s?", text.strip(), re.ASCII)
    if time and float(time[1]) > 0:
        return Budget(float(time[1]) * _TIMES[time[2]], "seconds")
    if count and int(count[1]) > 0:
        return Budget(int(count[1]), "conversations" if count[2] == "conversation" else "tokens")
    raise UserError(f"budget {text!r} is neither a time nor a count; write it as 10m, 2000conversations or "
                    "500000tokens")


def require_one_count(settings: BuildSettings) -> None:
    """Raise `UserError` where a budget and a number both say how many conversations."""
    if settings.synthesize.num_conversations:
        raise UserError(f"--budget {settings.budget} and synthesize.num_conversations="
                        f"{settings.synthesize.num_conversations} both say how many; give one of them")


def conversations_for(wanted: Budget, rates: Rates | None, spent: float = 0.0) -> int:
    """How many to plan for a budget of synthesis alone; `rates` are not needed where it counts conversations. `spent`
    are seconds that are gone by now. Raises `UserError` where it is not enough for one."""
    if wanted.unit == "conversations":
        return int(wanted.amount)
    if wanted.unit == "tokens":
        count = math.ceil(wanted.amount / (rates.kept * rates.tokens))
    else:
        count = int((wanted.amount - spent - SYNTHESIS_START_SECONDS) / rates.conversation_seconds)
    if count < 1:
        needed = spent + SYNTHESIS_START_SECONDS + FEWEST_CONVERSATIONS * rates.conversation_seconds
        raise UserError("the budget is too short for this machine and these settings; "
                        f"{math.ceil(needed / 60)}m would do")
    return count


def fit(settings: BuildSettings, rates: Rates, seconds: float, spent: float = 0.0) -> BuildSettings:
    """`settings` with conversations and steps so that synthesis and training take about `seconds`.

    A number that the user gave stays, and the other takes what is left. Raises `UserError` when not
    even a step fits, with a budget that would do; `spent` is what of such a one is gone by now.
    """
    left = seconds - START_SECONDS
    packs_a_conversation = settings.train.epochs * rates.kept * rates.tokens / settings.train.pack_tokens
    count = settings.synthesize.num_conversations
    if not count:
        for_steps = settings.train.steps * settings.train.packs_per_step * rates.pack_seconds
        share = 0 if settings.train.steps else packs_a_conversation * rates.pack_seconds
        count = int((left - for_steps) / (rates.conversation_seconds + share))
    steps = settings.train.steps or int(
        (left - count * rates.conversation_seconds) / rates.pack_seconds / settings.train.packs_per_step)
    if count < 1 or steps < 1:
        needed = spent + START_SECONDS + FEWEST_CONVERSATIONS * (
            rates.conversation_seconds + packs_a_conversation * rates.pack_seconds)
        raise UserError("the budget is too short for this machine and these settings; "
                        f"{math.ceil(needed / 60)}m would do")
    return with_plan(settings, num_conversations=count, steps=steps)


def steps_within(settings: BuildSettings, rates: Rates, kept: int, seconds: float) -> int:
    """Steps that `seconds` have time for, the start of training included; one epoch of `kept` conversations where
    that is more, as less would be a start and no cartridge."""
    left = seconds - TRAINING_START_SECONDS
    return max(epoch_steps(settings, rates, kept), int(left / rates.pack_seconds / settings.train.packs_per_step))


def epoch_steps(settings: BuildSettings, rates: Rates, kept: int) -> int:
    """Steps in which each of `kept` conversations is seen once."""
    return max(1, math.ceil(kept * rates.tokens / settings.train.pack_tokens / settings.train.packs_per_step))


def estimate(settings: BuildSettings, rates: Rates) -> tuple[int, float]:
    """`(steps, seconds)` of synthesis and training under `settings`."""
    count = settings.synthesize.num_conversations
    packs = settings.train.epochs * count * rates.kept * rates.tokens / settings.train.pack_tokens
    steps = settings.train.steps or max(1, round(packs / settings.train.packs_per_step))
    seconds = count * rates.conversation_seconds + steps * settings.train.packs_per_step * rates.pack_seconds
    return steps, START_SECONDS + seconds
