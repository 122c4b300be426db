"""Percentile bootstrap over questions, for a mean and for the difference of two arms."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps the mean `[..., d]` of the questions' statistics to a figure `[...]`."""

BLOCK_ELEMENTS = 1 << 22
CONFIDENCE = 0.95


def mean_statistic(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def interval(values: np.ndarray, samples: int, seed: int,
             statistic: Statistic = mean_statistic) -> dict[str, float]:
    """`{mean, low, high, n}`: the figure over all questions and its 95 % interval.

    `values` is `[n]`, or `[n, d]` with a `statistic` of their mean. Questions are resampled `samples` times;
    equal seed and n draw equal samples.
    """
    values = _as_matrix(values)
    return _summary(statistic(values.mean(0)), statistic(resampled_means(values, samples, seed)),
                    len(values))


def paired_interval(left: np.ndarray, right: np.ndarray, samples: int, seed: int,
                    statistic: Statistic = mean_statistic) -> dict[str, float]:
    """The interval of `left - right`, both over the same questions, which are resampled together."""
    left, right = _as_matrix(left), _as_matrix(right)
    if left.shape != right.shape:
        raise ValueError(f"{left.shape} and {right.shape} are not over the same questions")
    both = resampled_means(np.concatenate([left, right], axis=1), samples, seed)
    width = left.shape[1]
    return _summary(statistic(left.mean(0)) - statistic(right.mean(0)),
                    statistic(both[:, :width]) - statistic(both[:, width:]), len(left))


def resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means `[samples, d]` of rows of `values` `[n, d]` drawn with replacement."""
    n = len(values)
    block = max(1, BLOCK_ELEMENTS // n)
    counts = _draws(n, samples, seed)
    return np.concatenate([counts[start:start + block] @ values / n
                           for start in range(0, samples, block)])


@lru_cache(maxsize=2)
def _draws(n: int, samples: int, seed: int) -> np.ndarray:
    """How often each sample draws each question, `[samples, n]`; cached, because every metric needs it."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n, np.full(n, 1 / n), size=samples).astype(np.uint16)


def _as_matrix(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("no questions to resample")
    return values.reshape(len(values), -1)


def _summary(figure, resampled: np.ndarray, n: int) -> dict[str, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return {"mean": float(figure), "low": float(low), "high": float(high), "n": n}
