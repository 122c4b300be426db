"""How much to do: from a time to conversations and steps, by rates measured on this machine."""

import math
import re
from dataclasses import dataclass

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from workflows.synthesis.plan_size import FEWEST_CONVERSATIONS, with_plan

TRAINING_START_SECONDS = 60.0
START_SECONDS = 30.0 + TRAINING_START_SECONDS
"""Part of a budget that goes to starting Ray, to loading the model twice and to the start of training."""

_UNITS = {"s": 1, "m": 60, "h": 3600}


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


def parse_time(text: str) -> float:
    """`90s`, `10m`, `1.5h` in seconds. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if not match or float(match[1]) <= 0:
        raise UserError(f"budget {text!r} is not a time; write it as 90s, 10m or 2h")
    return float(match[1]) * _UNITS[match[2]]


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
