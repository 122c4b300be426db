"""Seed families: ways to start a conversation about a chunk.

A family is a frozen dataclass, its fields are its hyperparameters, and its one method proposes a
conversation. `register` adds one of your own. The paper's five families and its generic baseline
(arXiv 2506.06266, section on self-study) let the model write its message freely; the anchored and
cloze families are for models too small to ask well, and know the answer from the text.
"""

import random
from dataclasses import dataclass
from typing import Protocol

from cartridges.records import Chunk
from cartridges.selfstudy import seed_prompts
from cartridges.selfstudy.spans import Statement, answer_spans, statements


@dataclass(frozen=True)
class Proposal:
    """How a conversation about a chunk is to be made.

    Exactly one of `seed_prompt` (the asking side sees the chunk and this), `completion` (the asking
    side continues this text after few-shot examples) and `user` (the message itself) is set.
    `answer` is known from the text, and the teacher only scores it; None lets the teacher write.
    `must_contain`: a written answer without it is dropped. `short` puts the short-answer examples
    before the question.
    """

    seed_prompt: str | None = None
    completion: str | None = None
    user: str | None = None
    answer: str | None = None
    must_contain: str | None = None
    short: bool = False


class SeedFamily(Protocol):
    """Proposes a conversation about `chunk`, or None where the chunk has nothing for it."""

    def propose(self, chunk: Chunk, rng: random.Random) -> Proposal | None: ...


@dataclass(frozen=True)
class SeedPrompts:
    """The asking side is told what kind of message to write."""

    prompts: tuple[str, ...]

    def propose(self, chunk: Chunk, rng: random.Random) -> Proposal:
        prompt = rng.choice(self.prompts).replace("{format}", rng.choice(seed_prompts.FORMATS))
        return Proposal(seed_prompt=prompt)


@dataclass(frozen=True)
class Anchored:
    """A question whose answer is a span of the text; the teacher scores that answer.

    One prefill instead of decoding: several times as many conversations a second.
    """

    def propose(self, chunk: Chunk, rng: random.Random) -> Proposal | None:
        drawn = draw_span(chunk, rng)
        if drawn is None:
            return None
        statement, span = drawn
        return Proposal(completion=asking_text(statement, span), answer=span, short=True)


@dataclass(frozen=True)
class AnchoredWritten:
    """The same question without examples; the teacher writes, and must say the span."""

    def propose(self, chunk: Chunk, rng: random.Random) -> Proposal | None:
        drawn = draw_span(chunk, rng)
        if drawn is None:
            return None
        statement, span = drawn
        return Proposal(completion=asking_text(statement, span), must_contain=span)


@dataclass(frozen=True)
class Cloze:
    """A statement with a span left out; the teacher scores the span."""

    def propose(self, chunk: Chunk, rng: random.Random) -> Proposal | None:
        drawn = draw_span(chunk, rng)
        if drawn is None:
            return None
        statement, span = drawn
        if span not in statement.text:
            return None
        gap = statement.text.replace(span, "____", 1)
        return Proposal(user=f"Fill in the gap: {gap}", answer=span, short=True)


@dataclass(frozen=True)
class Recall:
    """The start of a statement; the teacher scores how the text goes on."""

    def propose(self, chunk: Chunk, rng: random.Random) -> Proposal | None:
        told = [s for s in statements(chunk.text) if len(s.verbatim.split()) >= 6]
        if not told:
            return None
        words = rng.choice(told).verbatim.split(" ")
        cut = rng.randint(3, max(3, len(words) - 3))
        return Proposal(user="Continue: " + " ".join(words[:cut]), answer=" ".join(words[cut:]))


FAMILIES: dict[str, SeedFamily] = {
    "structuring": SeedPrompts(seed_prompts.STRUCTURING),
    "summarization": SeedPrompts(seed_prompts.SUMMARIZATION),
    "question": SeedPrompts(seed_prompts.QUESTION),
    "use_case": SeedPrompts(seed_prompts.USE_CASE),
    "creative": SeedPrompts(seed_prompts.CREATIVE),
    "generic": SeedPrompts(seed_prompts.GENERIC),
    "anchored": Anchored(),
    "anchored_written": AnchoredWritten(),
    "cloze": Cloze(),
    "recall": Recall(),
}

DEFAULT_MIXTURE = {
    "anchored": 0.72, "anchored_written": 0.08, "cloze": 0.10, "recall": 0.05,
    "structuring": 0.01, "summarization": 0.01, "question": 0.01, "use_case": 0.01, "creative": 0.01,
}
"""Shares of the planned conversations, for a small asking model; see docs/log.md."""


def register(name: str, family: SeedFamily) -> None:
    """Make `family` available to `synthesize.families` under `name`."""
    FAMILIES[name] = family


def draw_span(chunk: Chunk, rng: random.Random) -> tuple[Statement, str] | None:
    """A statement of the chunk and a span of it; early spans (numbers, names) are likelier."""
    told = [(s, spans) for s in statements(chunk.text) if (spans := answer_spans(s))]
    if not told:
        return None
    statement, spans = rng.choices(told, weights=[len(spans) ** 0.5 for _, spans in told])[0]
    return statement, spans[int(len(spans) * rng.random() ** 1.5)]


def asking_text(statement: Statement, span: str) -> str:
    return f"Text: {statement.text}\nAnswer: {span}\nQuestion:"
