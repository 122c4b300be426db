"""The immutable records that cross stage boundaries, each with one writer and one reader."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

Message = dict[str, str]
"""`{"role": "user" | "assistant", "content": ...}`: a turn, as chat APIs write it."""


@dataclass(frozen=True)
class KVShape:
    """The dimensions of a model's KV cache, shared by a cartridge and its base model."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int

    def bytes_per_token(self, bytes_per_value: int = 2) -> int:
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True)
class Document:
    """One of the user's texts. `document_id` is a hash of its bytes."""

    document_id: str
    source: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A part of one document: `document.text[start:end] == text`."""

    chunk_id: str
    document_id: str
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Question:
    """A question with its gold answers, and `options` if it is multiple choice.

    `answers` holds every accepted string. With `options`, `gold` is the index of the right option
    and `answers` is `(options[gold],)`.
    """

    question_id: str
    question: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    gold: int | None = None


PASSAGES = 64
"""Number of passages that represent a corpus too long to be read whole."""


@dataclass(frozen=True)
class Corpus:
    """The text that one cartridge is built for: documents in order, and their questions, if any.

    `fingerprint` is a hash over the document ids in order. `documents` may be read again in every pass
    (`cartridges.documents`); only `text` holds all of them in memory.
    """

    corpus_id: str
    documents: Collection[Document]
    fingerprint: str
    questions: tuple[Question, ...] = ()

    @property
    def text(self) -> str:
        return "\n\n".join(document.text for document in self.documents)

    def beginning(self, characters: int) -> str:
        """The first `characters` of `text`."""
        parts, length = [], 0
        for document in self.documents:
            parts.append(document.text)
            length += len(document.text)
            if length >= characters:
                break
        return "\n\n".join(parts)[:characters]

    def spread(self, characters: int) -> str:
        """`text` if it has at most `characters`; otherwise passages at even distances, about as long together."""
        total = sum(len(document.text) + 2 for document in self.documents)
        if total <= characters:
            return self.text
        length, passages, at = characters // PASSAGES, [], 0
        for document in self.documents:
            for start in (total * index // PASSAGES - at for index in range(PASSAGES)):
                if start + length > 0 and start < len(document.text):
                    passages.append(document.text[max(0, start):start + length])
            at += len(document.text) + 2
        return "\n\n".join(passages)


@dataclass(frozen=True)
class Task:
    """One conversation to make.

    `seed` is its own random seed. `ordinal` counts the tasks of the same family for the same chunk, so that a family
    can go through a chunk statement by statement. A general conversation has no chunk: its `chunk_id` is empty.
    """

    conversation_id: str
    chunk_id: str
    seed_family: str
    seed: int
    ordinal: int = 0


@dataclass(frozen=True)
class Dropped:
    """A planned conversation that was not kept, the reason, and the `messages` it had by then."""

    conversation_id: str
    seed_family: str
    reason: str
    chunk_id: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One self-study conversation with the teacher's top-k logprobs.

    `input_ids` (int32 `[n]`) are the tokens after the system turn, without chunk or cartridge. Every other
    tensor is aligned with the *predicting* position: row `i` is about predicting `input_ids[i + 1]`.
    So `loss_mask[i]` is true if `input_ids[i + 1]` is the assistant's (including its end-of-turn token).
    This shift is defined here and applied nowhere else.

    `topk_ids` (int32) and `topk_logprobs` (float32), both `[loss_mask.sum(), k]`, hold the teacher's
    rows at T=1 for the loss positions, in order, sorted by falling probability. (In Parquet they have one
    row per position, empty where there is no loss.)

    The first `shared_tokens` of `input_ids` are example turns with which every conversation of this form
    begins; packing computes them once per pack.
    """

    conversation_id: str
    chunk_id: str
    seed_family: str
    messages: tuple[Message, ...]
    input_ids: np.ndarray
    loss_mask: np.ndarray
    topk_ids: np.ndarray
    topk_logprobs: np.ndarray
    shared_tokens: int = 0
    info: dict[str, float | str] = field(default_factory=dict)
