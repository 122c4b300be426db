"""From the measured contexts to one that this machine was not given: a straight line, said to be one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from workflows.bench.arms import Sizes, batch_size

CONTEXT = 131_072
CARTRIDGES = (2048, CONTEXT // 10 // 32 * 32)
"""Sizes that stand in for such a context: a common one, and a tenth."""
ASSUMPTIONS = (
    "Extrapolated, not measured.",
    "A decoding step takes a + b * requests + c * requests * KV tokens of a request seconds, fitted to the "
    "measured rows of both arms without negative coefficients.",
    "Time to first token of a resident prefix is a + b * its tokens, fitted likewise.",
    "The KV budget is the measured one, or what one request on the long context takes if that is more; the "
    "batch is what fits it, and no larger than the largest allowed in the measurement.",
    "The model's window, and whether this model can use so long a context, play no part.",
)


def extrapolate(rows: Sequence[dict[str, Any]], own: int, bytes_per_token: int, budget: int, most: int,
                num_tokens: int | None = None) -> dict[str, Any]:
    """Ratios at `CONTEXT` tokens from `rows` in which every request has a corpus of its own.

    `residual` is the largest relative distance of a measured step from the fit.
    """
    step, residual = _fit_steps(rows)
    first = _fit([[1.0, row["prefix_tokens"]] for row in rows], [row["ttft_s"] for row in rows])
    found = []
    for p in [num_tokens] if num_tokens else CARTRIDGES:
        sizes = Sizes(CONTEXT, p, own, bytes_per_token)
        room = max(budget, sizes.request_bytes("full_context"))
        rates, batches = {}, {}
        for arm in ("full_context", "cartridge"):
            batch = batches[arm] = batch_size(arm, sizes, "one each", room, most)
            rates[arm] = batch / float(step @ _terms(batch, sizes.prefix(arm) + own / 2))
        ttft = [float(first @ [1.0, sizes.prefix(arm)]) for arm in ("full_context", "cartridge")]
        found.append({
            "context_tokens": CONTEXT, "num_tokens": p, "kv_budget_bytes": room, "batch": batches,
            "decode": rates["cartridge"] / rates["full_context"], "ttft": ttft[0] / ttft[1],
            "kv_bytes": sizes.request_bytes("full_context") / sizes.request_bytes("cartridge")})
    return {"ratios": found, "assumptions": list(ASSUMPTIONS), "residual": residual,
            "step_seconds": dict(zip(("constant", "per_request", "per_kv_token"), step.tolist(), strict=True)),
            "ttft_seconds": dict(zip(("constant", "per_prefix_token"), first.tolist(), strict=True))}


def _fit_steps(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, float]:
    usable = [row for row in rows if row["step_s"] is not None]
    terms = [_terms(row["batch"], row["prefix_tokens"] + row["own_tokens"] / 2) for row in usable]
    seconds = [row["step_s"] for row in usable]
    found = _fit(terms, seconds)
    return found, float(np.max(np.abs(np.array(terms) @ found / seconds - 1), initial=0))


def _terms(batch: int, kv_tokens: float) -> list[float]:
    return [1.0, batch, batch * kv_tokens]


def _fit(terms: Sequence[Sequence[float]], targets: Sequence[float]) -> np.ndarray:
    """Least squares of relative errors; the most negative coefficient is put to 0 until none is."""
    scaled = np.array(terms, float) / np.array(targets, float)[:, None]
    kept = list(range(scaled.shape[1]))
    found = np.zeros(scaled.shape[1])
    while kept:
        solution = np.linalg.lstsq(scaled[:, kept], np.ones(len(scaled)), rcond=None)[0]
        if (solution >= 0).all():
            found[kept] = solution
            break
        kept.pop(int(solution.argmin()))
    return found
