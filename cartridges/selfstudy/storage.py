"""Stores conversations as Parquet rows, readable with `datasets.load_dataset`.

`topk_ids` and `topk_logprobs` have one row per position: row `i` is about predicting `input_ids[i + 1]` and is
empty if `loss_mask[i]` is false.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cartridges.errors import UserError
from cartridges.records import Conversation, Dropped

ROWS_AT_ONCE = 256
"""That are read from a file."""


def schema() -> pa.Schema:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema([
        ("conversation_id", pa.string()), ("chunk_id", pa.string()), ("seed_family", pa.string()),
        ("dropped", pa.string()), ("messages", pa.list_(message)), ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())), ("topk_ids", pa.list_(pa.list_(pa.int32()))),
        ("topk_logprobs", pa.list_(pa.list_(pa.float32()))), ("shared_tokens", pa.int32()),
        ("info", pa.string()),
    ])


def to_row(result: Conversation | Dropped) -> dict:
    """`result` as a row of `schema()`. A dropped conversation has its messages so far, and its reason in `dropped`."""
    if isinstance(result, Dropped):
        return {"conversation_id": result.conversation_id, "chunk_id": result.chunk_id,
                "seed_family": result.seed_family, "dropped": result.reason, "messages": list(result.messages),
                "input_ids": [], "loss_mask": [], "topk_ids": [], "topk_logprobs": [], "shared_tokens": 0,
                "info": "{}"}
    return {
        "conversation_id": result.conversation_id, "chunk_id": result.chunk_id,
        "seed_family": result.seed_family, "dropped": "", "messages": list(result.messages),
        "input_ids": result.input_ids.tolist(), "loss_mask": result.loss_mask.tolist(),
        "topk_ids": _spread(result.topk_ids, result.loss_mask),
        "topk_logprobs": _spread(result.topk_logprobs, result.loss_mask),
        "shared_tokens": result.shared_tokens, "info": json.dumps(result.info, sort_keys=True),
    }


def from_row(row: dict) -> Conversation | Dropped:
    if row["dropped"]:
        return Dropped(row["conversation_id"], row["seed_family"], row["dropped"], row["chunk_id"],
                       tuple(row["messages"]))
    return Conversation(
        row["conversation_id"], row["chunk_id"], row["seed_family"], tuple(row["messages"]),
        np.asarray(row["input_ids"], np.int32), np.asarray(row["loss_mask"], bool),
        _gather(row["topk_ids"], np.int32), _gather(row["topk_logprobs"], np.float32),
        int(row["shared_tokens"]), json.loads(row["info"]))


def count_tasks(directories: Iterable[str | Path]) -> Counter[tuple[str, str]]:
    """Number of conversations below `directories`, including dropped ones, by chunk and family."""
    counts: Counter[tuple[str, str]] = Counter()
    for file in (file for directory in directories for file in Path(directory).rglob("*.parquet")):
        table = pq.read_table(file, columns=["chunk_id", "seed_family"])
        counts.update(zip(*(table[name].to_pylist() for name in ("chunk_id", "seed_family")), strict=True))
    return counts


def load_conversations(directory: str | Path) -> list[Conversation]:
    """The kept conversations in all Parquet files below `directory`, in order of conversation id.

    Raises `UserError` if there are none.
    """
    kept = [one for file in sorted(Path(directory).rglob("*.parquet"))
            if "conversation_id" in (opened := pq.ParquetFile(file)).schema_arrow.names
            for batch in opened.iter_batches(ROWS_AT_ONCE) for one in _conversations(batch)]
    if not kept:
        raise UserError(f"{directory} holds no conversations; run `cartridges synthesize` first")
    return sorted(kept, key=lambda one: one.conversation_id)


def _conversations(batch: pa.RecordBatch) -> Iterator[Conversation]:
    """The kept ones. Numbers go from Arrow's memory to arrays of their own: as Python's objects they would take ten
    times as much."""
    batch = batch.filter(pc.equal(batch["dropped"], ""))
    said = batch.select(["conversation_id", "chunk_id", "seed_family", "messages", "shared_tokens", "info"]).to_pylist()
    rows = zip(said, _lists(batch["input_ids"]), _lists(batch["loss_mask"]), _lists(batch["topk_ids"]),
               _lists(batch["topk_logprobs"]), strict=True)
    for row, input_ids, loss_mask, topk_ids, topk_logprobs in rows:
        scored = int(loss_mask.sum())
        yield Conversation(
            row["conversation_id"], row["chunk_id"], row["seed_family"], tuple(row["messages"]), input_ids, loss_mask,
            topk_ids.reshape(scored, -1) if scored else topk_ids, topk_logprobs.reshape(scored, -1) if scored
            else topk_logprobs, int(row["shared_tokens"]), json.loads(row["info"]))


def _lists(column: pa.ListArray) -> Iterator[np.ndarray]:
    """Each list's values, of lists of lists all of them, as an array that may be written to."""
    ends, values = column.offsets.to_numpy(), column.values
    while pa.types.is_list(values.type):
        ends, values = values.offsets.to_numpy()[ends], values.values
    flat = values.to_numpy(zero_copy_only=False)
    return (flat[start:end].copy() for start, end in zip(ends[:-1], ends[1:], strict=True))


def _spread(rows: np.ndarray, mask: np.ndarray) -> list[list]:
    at = iter(rows.tolist())
    return [next(at) if scored else [] for scored in mask.tolist()]


def _gather(rows: list[list], dtype) -> np.ndarray:
    return np.asarray([row for row in rows if len(row)], dtype)
