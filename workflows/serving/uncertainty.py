"""How unsure an answer is, from the top logprobs of its tokens."""

import math
from collections.abc import Sequence

from cartridges.engines.base import TokenEvent

TOPK = 20
"""Logprobs to ask for: what vLLM gives at most unless it is told otherwise."""


def entropy(topk_logprobs: Sequence[float]) -> float:
    """Nats. What lies outside the top k counts as one more outcome, so it is a lower bound."""
    probabilities = [math.exp(logprob) for logprob in topk_logprobs]
    rest = max(0.0, 1.0 - sum(probabilities))
    return -sum(p * math.log(p) for p in [*probabilities, rest] if p > 0)


def mean_entropy(events: Sequence[TokenEvent]) -> float:
    """Mean over the tokens of `events`, in nats a token."""
    return sum(entropy(event.topk_logprobs) for event in events) / len(events)
