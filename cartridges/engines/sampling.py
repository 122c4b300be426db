"""Sampling of tokens from logprobs."""

from collections.abc import Sequence

import numpy as np
import torch


def sample(logprobs: torch.Tensor, temperatures: torch.Tensor, top_ps: Sequence[float],
           draws: torch.Tensor) -> torch.Tensor:
    """One token per row from T=1 `logprobs` `[B, V]` by inverse transform of `draws` `[B]` in [0, 1).

    A temperature of 0 is greedy. Each row has its own draw, so its sample does not depend on the other rows
    of the batch.
    """
    greedy = logprobs.argmax(dim=-1)
    if not bool((temperatures > 0).any()):
        return greedy
    scaled = logprobs / temperatures.clamp(min=1e-4)[:, None]
    probabilities = scaled.softmax(dim=-1)
    for row, top_p in enumerate(top_ps):
        if top_p < 1:
            probabilities[row] = _nucleus(probabilities[row], top_p)
    cumulative = probabilities.cumsum(dim=-1)
    target = draws.to(cumulative)[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True)[:, 0]
    sampled = sampled.clamp(max=logprobs.shape[1] - 1)
    return torch.where(temperatures > 0, sampled, greedy)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = probabilities.sort(descending=True)
    keep = ordered.cumsum(0) - ordered < top_p
    return torch.zeros_like(probabilities).scatter(0, order, ordered * keep)


class Draws:
    """The stream of uniform random numbers of one row."""

    def __init__(self, seed: int):
        self.generator = np.random.default_rng(seed)

    def next(self) -> float:
        return float(self.generator.random())
