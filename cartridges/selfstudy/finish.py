"""The last pass over written conversations: exact duplicates across all batches, and the counts."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

DUPLICATE = "duplicate"
ERROR = "error: "
"""A row dropped because it raised has a reason that begins so; the rest is the error."""


@dataclass
class Summary:
    """Counts of a data set. Masses and entropies are sums over `loss_tokens` positions."""

    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    families: dict[str, Counter] = field(default_factory=dict)
    tokens: int = 0
    loss_tokens: int = 0
    topk_mass: float = 0.0
    teacher_entropy: float = 0.0

    def add(self, table: pa.Table) -> None:
        """Count the rows of `table` (the schema of `selfstudy.storage`)."""
        reasons = table["dropped"].to_pylist()
        for family, reason in zip(table["seed_family"].to_pylist(), reasons, strict=True):
            name = reason_name(reason)
            self.families.setdefault(family, Counter())[name or "kept"] += 1
            if name:
                self.dropped[name] += 1
        kept = table.filter(pc.equal(table["dropped"], ""))
        self.kept += len(kept)
        self.tokens += pc.sum(pc.list_value_length(kept["input_ids"])).as_py() or 0
        self._add_teacher(kept["topk_logprobs"])

    def _add_teacher(self, column: pa.ChunkedArray) -> None:
        for chunk in column.chunks:
            rows = chunk.flatten()
            k = pc.max(pc.list_value_length(rows)).as_py() or 0
            if k == 0:
                continue
            logprobs = rows.flatten().to_numpy(zero_copy_only=False).reshape(-1, k).astype(np.float64)
            mass = np.exp(logprobs).sum(1)
            tail = np.clip(1 - mass, 1e-6, None)
            self.loss_tokens += len(logprobs)
            self.topk_mass += float(mass.sum())
            self.teacher_entropy += float(-(np.exp(logprobs) * logprobs).sum() - (tail * np.log(tail)).sum())

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; masses and entropies (nats, tail as one bucket) as means over loss tokens."""
        positions = max(self.loss_tokens, 1)
        return {
            "conversations": {"kept": self.kept, "dropped": dict(sorted(self.dropped.items()))},
            "families": {family: dict(sorted(self.families[family].items())) for family in sorted(self.families)},
            "tokens": {"input": self.tokens, "loss": self.loss_tokens},
            "topk_mass": self.topk_mass / positions,
            "teacher_entropy": self.teacher_entropy / positions,
        }


def reason_name(reason: str) -> str:
    """`error: ValueError: ...` -> `error`, so that reasons can be counted; others as they are."""
    return "error" if reason.startswith(ERROR) else reason


def duplicates(files: Sequence[Path]) -> set[str]:
    """Ids of kept conversations whose messages another one, of a smaller id, has word for word."""
    first: dict[bytes, str] = {}
    repeated = set()
    for conversation_id, digest in sorted(_kept_digests(files)):
        if first.setdefault(digest, conversation_id) != conversation_id:
            repeated.add(conversation_id)
    return repeated


def _kept_digests(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for file in files:
        for row in pq.read_table(file, columns=["conversation_id", "messages", "dropped"]).to_pylist():
            if not row["dropped"]:
                text = "\x00".join(" ".join(message["content"].split()) for message in row["messages"])
                yield row["conversation_id"], hashlib.sha256(text.encode()).digest()


def finish(parts: Path, shards: Path, rows_per_shard: int = 4096) -> Summary:
    """Rewrite the files of `parts` as `shards/part-*.parquet` with duplicates marked as dropped.

    Rows are in the order of their ids, so the shards do not depend on which actor was quick.
    `shards` must not exist; a caller renames it into place.
    """
    files = sorted(parts.glob("*.parquet"))
    repeated = duplicates(files)
    located = sorted((conversation_id, number, row) for number, file in enumerate(files)
                     for row, conversation_id in enumerate(_ids(file)))
    shards.mkdir(parents=True)
    summary = Summary()
    for shard, start in enumerate(range(0, len(located), rows_per_shard)):
        table = _gather(files, located[start:start + rows_per_shard])
        reasons = [DUPLICATE if conversation_id in repeated else reason for conversation_id, reason
                   in zip(table["conversation_id"].to_pylist(), table["dropped"].to_pylist(), strict=True)]
        column = table.schema.get_field_index("dropped")
        table = table.set_column(column, table.schema.field("dropped"), pa.array(reasons, pa.string()))
        summary.add(table)
        pq.write_table(table, shards / f"part-{shard:05d}.parquet", compression="zstd")
    return summary


def _ids(file: Path) -> list[str]:
    return pq.read_table(file, columns=["conversation_id"])["conversation_id"].to_pylist()


def _gather(files: Sequence[Path], located: Sequence[tuple[str, int, int]]) -> pa.Table:
    """The rows at `(id, file number, row)`, in that order; each file is read once."""
    wanted: dict[int, list[int]] = {}
    for _, number, row in located:
        wanted.setdefault(number, []).append(row)
    table = pa.concat_tables([pq.read_table(files[number]).take(rows) for number, rows in wanted.items()])
    return table.sort_by("conversation_id")
