"""Stores conversations as Parquet rows, readable with `datasets.load_dataset`.

`topk_ids` and `topk_logprobs` have one row per position: row `i` is about predicting `input_ids[i + 1]` and is
empty if `loss_mask[i]` is false.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartridges.errors import UserError
from cartridges.records import Conversation, Dropped


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
    rows = [row for file in sorted(Path(directory).rglob("*.parquet"))
            for row in pq.read_table(file).to_pylist() if "conversation_id" in row and not row["dropped"]]
    if not rows:
        raise UserError(f"{directory} holds no conversations; run `cartridges synthesize` first")
    return [from_row(row) for row in sorted(rows, key=lambda row: row["conversation_id"])]


def _spread(rows: np.ndarray, mask: np.ndarray) -> list[list]:
    at = iter(rows.tolist())
    return [next(at) if scored else [] for scored in mask.tolist()]


def _gather(rows: list[list], dtype) -> np.ndarray:
    return np.asarray([row for row in rows if len(row)], dtype)
