"""A data set as one HTML page that needs nothing else: the card, and samples to be read."""

import math
import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cartridges.prompts import EXAMPLES
from cartridges.records import Conversation
from cartridges.selfstudy.drop_reasons import reason_name
from cartridges.selfstudy.storage import from_row
from workflows.synthesis.inspect_dataset import DISTRIBUTIONS, family_rows, remarks

DROPPED_OF_A_REASON = 3
"""Dropped conversations shown for each reason."""
ALTERNATIVES = 5
"""Number of the teacher's top-k tokens in the note of a token."""


@dataclass(frozen=True)
class Token:
    """A piece of an answer: its text, the teacher's probability (None: not in the top-k), the likeliest."""

    text: str
    probability: float | None
    note: str

    @property
    def uncertainty(self) -> float:
        """0 for a certain token, 1 for one of 0.1 % or less, even in logarithms."""
        return 1.0 if self.probability is None else min(1.0, -math.log10(max(self.probability, 1e-3)) / 3)


def write_page(directory: Path, card: dict[str, Any], file: Path, samples: int, seed: int) -> None:
    """Write the page of the data set in `directory` to `file`; `samples` kept conversations a family."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(str(files("workflows") / "templates")), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("dataset.html").render(
        card=card, families=family_rows(card["families"], card["conversations"]["dropped"]),
        remarks=remarks(card), distributions=[(label, card[name]) for name, label in DISTRIBUTIONS.items()
                                              if card[name]["n"]],
        samples=_samples(directory, card, samples, seed))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")


def _samples(directory: Path, card: dict[str, Any], each: int, seed: int) -> list[dict[str, Any]]:
    """The drawn conversations as the page shows them, by family, the kept ones first."""
    from cartridges.config import ModelSettings
    from cartridges.models import load_tokenizer, resolve_model_dir

    rows = _draw(sorted((directory / "shards").glob("*.parquet")), each, seed)
    tokenizer = load_tokenizer(resolve_model_dir(ModelSettings(
        name=card["model"]["name"], revision=card["model"]["revision"])))
    chunks = _chunks(directory / "chunks.parquet", {row["chunk_id"] for row in rows})
    shown = [_sample(row, tokenizer, chunks.get(row["chunk_id"], "")) for row in rows]
    return sorted(shown, key=lambda one: (one["family"], one["reason"] != "", one["reason"]))


def _draw(files: list[Path], each: int, seed: int) -> list[dict[str, Any]]:
    """Rows drawn by `seed`: of every family the kept ones, of every reason the dropped ones."""
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for number, file in enumerate(files):
        columns = pq.read_table(file, columns=["seed_family", "dropped"]).to_pydict()
        for row, (family, reason) in enumerate(zip(columns["seed_family"], columns["dropped"], strict=True)):
            key = ("dropped", reason_name(reason)) if reason else ("kept", family)
            places.setdefault(key, []).append((number, row))
    rng = random.Random(seed)
    drawn = [place for (kind, _), found in sorted(places.items())
             for place in rng.sample(found, min(len(found), each if kind == "kept" else DROPPED_OF_A_REASON))]
    return [row for number, file in enumerate(files) if (at := sorted(r for n, r in drawn if n == number))
            for row in pq.read_table(file).take(at).to_pylist()]


def _chunks(file: Path, wanted: set[str]) -> dict[str, str]:
    rows = pq.read_table(file, columns=["chunk_id", "text"], filters=[("chunk_id", "in", sorted(wanted))])
    return dict(zip(rows["chunk_id"].to_pylist(), rows["text"].to_pylist(), strict=True))


def _sample(row: dict[str, Any], tokenizer, chunk: str) -> dict[str, Any]:
    result = from_row(row)
    kept = isinstance(result, Conversation)
    # The example turns before a short question are the same everywhere.
    examples = 2 * len(EXAMPLES) if kept and result.shared_tokens else 0
    messages = result.messages[examples:]
    answers = iter(_answers(result, tokenizer) if kept else ())
    return {
        "id": row["conversation_id"], "family": row["seed_family"], "reason": row["dropped"], "chunk": chunk,
        "messages": [message | {"tokens": next(answers, []) if message["role"] == "assistant" else []}
                     for message in messages], "examples": examples,
        "info": {key: f"{value:.3g}" for key, value in result.info.items() if value} if kept else {},
    }


def _answers(conversation: Conversation, tokenizer) -> list[list[Token]]:
    """The tokens of each answer that is taught, with the teacher's probability of each."""
    at = np.flatnonzero(conversation.loss_mask)
    starts = np.flatnonzero(np.diff(at) > 1) + 1  # the loss positions of one answer follow each other
    parts = (np.split(rows, starts) for rows in (conversation.input_ids[at + 1], conversation.topk_ids,
                                                 conversation.topk_logprobs))
    return [_tokens(*(part.tolist() for part in answer), tokenizer) for answer in zip(*parts, strict=True)]


def _tokens(answered: list[int], topk_ids: list[list[int]], topk_logprobs: list[list[float]],
            tokenizer) -> list[Token]:
    tokens, waiting = [], []
    for place, (token, ids, logprobs) in enumerate(zip(answered, topk_ids, topk_logprobs, strict=True), 1):
        likely = dict(zip(ids, (math.exp(value) for value in logprobs), strict=True))
        waiting.append(token)
        text = _text(tokenizer, waiting)
        if text.endswith("\ufffd") and place < len(answered):
            text = ""  # half of a character: it stands with the token that ends it
        else:
            waiting = []
        tokens.append(Token(text, likely.get(token), _note(tokenizer, likely, likely.get(token))))
    return tokens


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _note(tokenizer, likely: dict[int, float], probability: float | None) -> str:
    """`62 %; instead: " Ann" 62 %, " Bo" 20 %`."""
    told = "not among the teacher's likeliest" if probability is None else f"{probability:.1%}"
    likeliest = sorted(likely.items(), key=lambda item: -item[1])[:ALTERNATIVES]
    return f"{told}; likeliest: " + ", ".join(f"{_text(tokenizer, [t])!r} {p:.0%}" for t, p in likeliest)
