"""The last pass over all written conversations: marks duplicates across batches, and counts.

Rows are sorted by id through one file per shard: each row is read once from its part and once from there, and no more
than a shard, or `HELD_BYTES`, is in memory.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartridges.selfstudy.data_card import Summary
from cartridges.selfstudy.drop_reasons import DUPLICATE, NEAR_DUPLICATE
from cartridges.selfstudy.near_duplicates import near_duplicates

HELD_BYTES = 2**28
"""Of rows on their way to a shard, that are held before they are written."""


def exact_duplicates(files: Sequence[Path], earlier: Sequence[Path] = ()) -> set[str]:
    """Ids of kept conversations with the same messages, word for word, as one with a smaller id or in the files
    `earlier`."""
    first = {digest: "" for _, digest in _digests(earlier)}
    repeated = set()
    for conversation_id, digest in sorted(_digests(files)):
        if first.setdefault(digest, conversation_id) != conversation_id:
            repeated.add(conversation_id)
    return repeated


def _digests(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for conversation_id, texts in _kept_texts(files):
        yield conversation_id, hashlib.sha256("\x00".join(texts).encode()).digest()


def _kept_texts(files: Sequence[Path]) -> Iterator[tuple[str, list[str]]]:
    """Ids and messages, with normalised spaces, of the kept conversations."""
    for file in files:
        for row in pq.read_table(file, columns=["conversation_id", "messages", "dropped"]).to_pylist():
            if not row["dropped"]:
                yield row["conversation_id"], [" ".join(message["content"].split()) for message in row["messages"]]


def _repeated(files: Sequence[Path], exact: bool, similarity: float | None,
              earlier: Sequence[Path]) -> dict[str, str]:
    """Reasons of duplicates by id. Near duplicates compare only the last question and answer, because the turns before
    may be the same examples."""
    reasons = dict.fromkeys(exact_duplicates(files, earlier), DUPLICATE) if exact else {}
    if similarity is not None:
        texts = sorted((conversation_id, " ".join(texts[-2:])) for conversation_id, texts in _kept_texts(files)
                       if conversation_id not in reasons)
        reasons |= dict.fromkeys(near_duplicates(texts, similarity), NEAR_DUPLICATE)
    return reasons


def deduplicate(parts: Path, shards: Path, exact: bool = True, similarity: float | None = None,
                earlier: Sequence[Path] = (), rows_per_shard: int = 4096) -> Summary:
    """Rewrite the files of `parts` as `shards/part-*.parquet` with duplicates marked as dropped.

    `exact` drops word-for-word repeats, also of the files `earlier`; `similarity` drops conversations that are
    similar to that degree (`selfstudy.near_duplicates`). Rows are in the order of their ids, so the shards do
    not depend on the speed of the actors. `shards` must not exist; the caller renames it into place.
    """
    files = sorted(parts.glob("*.parquet"))
    repeated = _repeated(files, exact, similarity, earlier)
    ids = np.sort(np.array([conversation_id for file in files for conversation_id in _ids(file)]))
    shards.mkdir(parents=True)
    sorting = shards / "sorting"
    _spread(files, ids[::rows_per_shard], sorting)
    summary = Summary()
    for shard in range(len(ids[::rows_per_shard])):
        table = _sorted(sorting / f"{shard:05d}")
        reasons = [repeated.get(conversation_id, reason) for conversation_id, reason
                   in zip(table["conversation_id"].to_pylist(), table["dropped"].to_pylist(), strict=True)]
        column = table.schema.get_field_index("dropped")
        table = table.set_column(column, table.schema.field("dropped"), pa.array(reasons, pa.string()))
        summary.add(table)
        pq.write_table(table, shards / f"part-{shard:05d}.parquet", compression="zstd")
    shutil.rmtree(sorting, ignore_errors=True)
    return summary


def _ids(file: Path) -> list[str]:
    return pq.read_table(file, columns=["conversation_id"])["conversation_id"].to_pylist()


def _spread(files: Sequence[Path], first_ids: np.ndarray, sorting: Path) -> None:
    """The rows of `files` below `sorting`, in a folder for each shard; `first_ids` are the smallest ids of the shards,
    in order. Each file is read once."""
    held: dict[int, list[pa.Table]] = {}
    size = 0
    for number, file in enumerate(files):
        table = pq.read_table(file)
        shards = np.searchsorted(first_ids, np.array(table["conversation_id"].to_pylist()), side="right") - 1
        order = np.argsort(shards, kind="stable")
        table, ends = table.take(order), np.searchsorted(shards[order], np.arange(len(first_ids)), side="right")
        for shard in np.unique(shards):
            start = ends[shard - 1] if shard else 0
            held.setdefault(int(shard), []).append(table.slice(start, ends[shard] - start))
        size += table.nbytes
        if size > HELD_BYTES or number == len(files) - 1:
            for shard, rows in held.items():
                folder = sorting / f"{shard:05d}"
                folder.mkdir(parents=True, exist_ok=True)
                pq.write_table(pa.concat_tables(rows), folder / f"{number:06d}.parquet")
            held, size = {}, 0


def _sorted(folder: Path) -> pa.Table:
    """The rows in `folder`, which is gone then, by their ids."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))])
    shutil.rmtree(folder)
    return table.sort_by("conversation_id")
