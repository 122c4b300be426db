"""The collapse test: does a cartridge still answer when others are loaded beside it?

Independently trained cartridges can fail together (in a reproduction by others, accuracy fell from 74 % to 26 % at
twenty). So the questions of one cartridge are asked with 1, 3 and 7 other cartridges (partners) loaded, with the
cartridge first (so that its sink is kept) and last. The remaining share of its gain over the model without any
cartridge determines with how many partners it may be served.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cartridges.compose import compose, composed_digest
from cartridges.config import EvaluateSettings
from cartridges.engines.base import CartridgePrefix, Prefix
from cartridges.errors import UserError
from cartridges.evaluation.asking import Answered
from cartridges.evaluation.bootstrap import interval, paired_interval
from cartridges.models import BaseModel, rope_frequencies

LOADED = (2, 4, 8)
"""Numbers of cartridges loaded together, including the one under test."""


def compose_prefix(base: BaseModel, parts: Sequence[CartridgePrefix]) -> CartridgePrefix:
    """Several cartridges as one prefix of `base`."""
    cartridge = compose([part.cartridge for part in parts], rope_frequencies(base.identity))
    return CartridgePrefix(cartridge, composed_digest([part.digest for part in parts]))


@dataclass(frozen=True)
class CollapseTest:
    """The answers without a cartridge, with only the one under test, and with others beside it: by the number of loaded
    cartridges and its place among them (`first`, `last`)."""

    closed_book: list[Answered]
    alone: list[Answered]
    loaded: dict[int, dict[str, list[Answered]]]

    def card(self, settings: EvaluateSettings, seed: int) -> dict[str, Any]:
        """`{passed_partners, share, questions, closed_book, alone, loaded: [{loaded, first, last, passed}]}`. An arm is
        `{accuracy, nll_per_token}` with intervals; loaded arms also have the paired difference to `alone`. `accuracy`
        is `contains`, or `choice_accuracy` for questions with options."""
        closed = _accuracy(self.closed_book).mean()
        gain = _accuracy(self.alone).mean() - closed
        rows, passed_partners, held = [], 0, gain > 0
        for count, arms in self.loaded.items():
            left = min(_accuracy(arm).mean() for arm in arms.values()) - closed
            passed = bool(gain > 0 and left >= settings.composition_share * gain)
            held = held and passed
            passed_partners = count - 1 if held else passed_partners
            rows.append({"loaded": count, "passed": passed,
                         **{place: _figures(arm, settings, seed, self.alone) for place, arm in arms.items()}})
        return {"passed_partners": passed_partners, "share": settings.composition_share,
                "questions": len(self.alone), "closed_book": _figures(self.closed_book, settings, seed),
                "alone": _figures(self.alone, settings, seed), "loaded": rows}


def collapse_test(asked: Callable[[Prefix], list[Answered]], base: BaseModel, subject: CartridgePrefix,
                  partners: Sequence[CartridgePrefix]) -> CollapseTest:
    """Ask the questions of `subject` with it alone and with the first 1, 3 and 7 of `partners` beside it. `asked` asks
    all of them after a prefix. Raises `UserError` without partners."""
    if not partners:
        raise UserError("name at least one other cartridge to load beside it")
    closed, alone = asked(None), asked(subject)
    loaded = {}
    for count in [count for count in LOADED if count <= len(partners) + 1]:
        beside = partners[:count - 1]
        loaded[count] = {"first": asked(compose_prefix(base, [subject, *beside])),
                         "last": asked(compose_prefix(base, [*beside, subject]))}
    return CollapseTest(closed, alone, loaded)


def pooled(tests: Sequence[CollapseTest]) -> CollapseTest:
    """The tests of several cartridges pooled into one, for the numbers of loaded cartridges that all of them have."""
    counts = [count for count in LOADED if all(count in test.loaded for test in tests)]
    return CollapseTest(
        [one for test in tests for one in test.closed_book], [one for test in tests for one in test.alone],
        {count: {place: [one for test in tests for one in test.loaded[count][place]] for place in ("first", "last")}
         for count in counts})


def _figures(answered: list[Answered], settings: EvaluateSettings, seed: int,
             alone: list[Answered] | None = None) -> dict[str, Any]:
    samples = settings.bootstrap_samples
    figures = {"accuracy": interval(_accuracy(answered), samples, seed),
               "nll_per_token": interval(_nll(answered), samples, seed)}
    if alone is None:
        return figures
    return figures | {"accuracy_change": paired_interval(_accuracy(answered), _accuracy(alone), samples, seed)}


def _accuracy(answered: list[Answered]) -> np.ndarray:
    return np.array([one.values["contains" if one.item.is_generated else "choice_accuracy"] for one in answered])


def _nll(answered: list[Answered]) -> np.ndarray:
    return np.array([one.values["nll_per_token"] for one in answered])
