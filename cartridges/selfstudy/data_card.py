"""The data card of a data set: counts, distributions and checks, gathered table by table.

Distributions are histograms, so memory does not grow with the number of tokens.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cartridges.selfstudy.drop_reasons import DUPLICATE, ERROR, NEAR_DUPLICATE, reason_name

ERRORS_LISTED = 50
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Distribution:
    """Mean and quantiles of values from `low` to `high`.

    For values beyond, bins are joined in pairs until they fit; if `bounded`, such values count as the nearest bound.
    """

    def __init__(self, low: float, high: float, bins: int = 4096, bounded: bool = False):
        self.bounded = bounded
        self.edges = np.linspace(low, high, bins + 1)
        self.counts = np.zeros(bins, np.int64)
        self.total = 0.0

    def add(self, values: np.ndarray) -> None:
        self.total += float(values.sum())
        finite = values[np.isfinite(values)]
        while len(finite) and not self.bounded and finite.max() > self.edges[-1]:
            self._widen(up=True)
        while len(finite) and not self.bounded and finite.min() < self.edges[0]:
            self._widen(up=False)
        self.counts += np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges)[0]

    def _widen(self, up: bool) -> None:
        """Bins twice as wide, above or below."""
        joined, none = self.counts.reshape(-1, 2).sum(1), np.zeros(len(self.counts) // 2, np.int64)
        low, high = self.edges[0], self.edges[-1]
        low, high = (low, 2 * high - low) if up else (2 * low - high, high)
        self.edges = np.linspace(low, high, len(self.edges))
        self.counts = np.concatenate([joined, none] if up else [none, joined])

    def mean(self) -> float:
        return self.total / max(int(self.counts.sum()), 1)

    def quantile(self, share: float) -> float:
        """The quantile at `share`, exact to the width of a bin."""
        reached = np.concatenate([[0], np.cumsum(self.counts)])
        target = share * reached[-1]
        end = max(1, int(np.searchsorted(reached, target)))
        within = (target - reached[end - 1]) / max(reached[end] - reached[end - 1], 1)
        return float(self.edges[end - 1] + within * (self.edges[end] - self.edges[end - 1]))

    def histogram(self, bars: int) -> dict[str, Any]:
        """Counts in `bars` (a power of two) bars of equal width, up to the largest value."""
        counts, low, high = self.counts, self.edges[0], self.edges[-1]
        while len(counts) > bars and not counts[len(counts) // 2:].any():
            counts, high = counts[:len(counts) // 2], low + (high - low) / 2
        return {"low": float(low), "high": float(high), "counts": counts.reshape(bars, -1).sum(1).tolist()}

    def as_dict(self, bars: int = 32) -> dict[str, Any]:
        """The distribution as JSON; mean and quantiles are None without values."""
        n = int(self.counts.sum())
        return {
            "n": n, "mean": self.mean() if n else None,
            "quantiles": {f"{q:g}": self.quantile(q) if n else None for q in QUANTILES},
            "histogram": self.histogram(bars),
        }


@dataclass
class Summary:
    """Counts of a data set. Entropies (nats, with the tail as one bucket) and masses are over loss positions."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    families: dict[str, Counter] = field(default_factory=dict)
    errors: list[dict[str, str]] = field(default_factory=list)
    chunks: Counter = field(default_factory=Counter)
    tokens: int = 0
    facts: Counter = field(default_factory=Counter)
    topk_mass: Distribution = field(default_factory=lambda: Distribution(0, 1, bounded=True))
    teacher_entropy: Distribution = field(default_factory=lambda: Distribution(0, 8))
    teacher_nll: Distribution = field(default_factory=lambda: Distribution(0, 8))
    information_gain: Distribution = field(default_factory=lambda: Distribution(-4, 12))
    retried: int = 0
    answer_tokens: Distribution = field(default_factory=lambda: Distribution(0, 2048))

    def add(self, table: pa.Table) -> None:
        """Count the rows of `table` (the schema of `selfstudy.storage`)."""
        self._add_reasons(table)
        kept = table.filter(pc.equal(table["dropped"], ""))
        self.kept += len(kept)
        self.chunks.update(kept["chunk_id"].to_pylist())
        self.tokens += pc.sum(pc.list_value_length(kept["input_ids"])).as_py() or 0
        self._add_info([json.loads(info) for info in kept["info"].to_pylist()])
        for mask in kept["loss_mask"].chunks:
            before = np.concatenate([[0], np.cumsum(mask.values.to_numpy(zero_copy_only=False))])
            self.answer_tokens.add(np.diff(before[mask.offsets.to_numpy()]).astype(float))
        self._add_teacher(kept["topk_logprobs"])

    def _add_reasons(self, table: pa.Table) -> None:
        columns = (table[name].to_pylist() for name in ("conversation_id", "seed_family", "dropped"))
        for conversation_id, family, reason in zip(*columns, strict=True):
            name = reason_name(reason)
            self.families.setdefault(family, Counter())[name or "kept"] += 1
            if name:
                self.dropped[name] += 1
            if name == "error" and len(self.errors) < ERRORS_LISTED:
                self.errors.append({"conversation_id": conversation_id, "seed_family": family,
                                    "error": reason.removeprefix(ERROR)})

    def _add_info(self, rows: list[dict[str, Any]]) -> None:
        for name in ("teacher_nll", "information_gain"):
            getattr(self, name).add(np.array([row[name] for row in rows if name in row], float))
        self.retried += sum("retries" in row for row in rows)
        for row in rows:
            kind = "known" if row.get("known") else "written"
            for name in ("numbers", "names", "ungrounded_numbers", "ungrounded_names"):
                self.facts[kind, name] += int(row.get(name, 0))

    def _add_teacher(self, column: pa.ChunkedArray) -> None:
        for chunk in column.chunks:
            rows = chunk.flatten()
            k = pc.max(pc.list_value_length(rows)).as_py() or 0
            if k == 0:
                continue
            logprobs = rows.flatten().to_numpy(zero_copy_only=False).reshape(-1, k).astype(np.float64)
            mass = np.exp(logprobs).sum(1)
            tail = np.clip(1 - mass, 1e-6, None)
            self.topk_mass.add(mass)
            self.teacher_entropy.add(-(np.exp(logprobs) * logprobs).sum(1) - tail * np.log(tail))

    def as_dict(self) -> dict[str, Any]:
        """The counts for the manifest as JSON, with masses and entropies as means over loss positions."""
        return {
            "conversations": {"kept": self.kept, "dropped": dict(sorted(self.dropped.items()))},
            "families": {family: dict(sorted(self.families[family].items())) for family in sorted(self.families)},
            "tokens": {"input": self.tokens, "loss": int(self.topk_mass.counts.sum())},
            "topk_mass": self.topk_mass.mean(), "teacher_entropy": self.teacher_entropy.mean(),
        }


def data_card(summary: Summary, manifest: dict[str, Any], model: dict[str, str | None]) -> dict[str, Any]:
    """The card of a finished data set: its `manifest`, extended by the full distributions of `summary`.

    `model` holds the teacher's name, revision, dtype and digests.
    """
    repeated = {name: summary.dropped[name] for name in (DUPLICATE, NEAR_DUPLICATE)}
    total = sum(repeated.values())
    covered = [count for chunk, count in summary.chunks.items() if chunk]
    return {
        **manifest, **summary.as_dict(), "model": model,
        "duplicates": {**repeated, "share": total / max(summary.kept + total, 1)},
        "groundedness": {kind: _grounded(summary.facts, kind) for kind in ("known", "written")},
        "chunks": {"planned": manifest["chunks"], "covered": len(covered),
                   "most_conversations": max(covered, default=0), "fewest_conversations": min(covered, default=0)},
        "teacher_entropy": summary.teacher_entropy.as_dict(), "topk_mass": summary.topk_mass.as_dict(),
        "teacher_nll": summary.teacher_nll.as_dict(), "information_gain": summary.information_gain.as_dict(),
        "answer_tokens": summary.answer_tokens.as_dict(), "failures": summary.errors, "retried": summary.retried,
    }


def _grounded(facts: Counter, kind: str) -> dict[str, Any]:
    """Counts of numbers and names in the kept answers of one kind, and their share that is in chunk or question."""
    shares = {}
    for name in ("numbers", "names"):
        count, without = facts[kind, name], facts[kind, f"ungrounded_{name}"]
        shares[name] = {"count": count, "ungrounded": without, "share": 1 - without / count if count else None}
    return shares
