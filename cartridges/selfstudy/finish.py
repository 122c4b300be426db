"""The last pass over written conversations: exact duplicates across all batches, and the counts."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cartridges.selfstudy.card import DUPLICATE, Summary


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
