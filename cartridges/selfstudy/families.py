"""Seed families: ways to start a conversation about a chunk.

A family is a frozen dataclass whose fields are its hyperparameters and whose one method proposes a
conversation. `register` adds a family. In the paper's five families and its generic baseline (arXiv
2506.06266, section on self-study) the model writes its message freely. The anchored and cloze families
are for models too small to ask well; their answers are known from the text.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from typing import ClassVar, Literal, Protocol

from cartridges.records import Chunk
from cartridges.selfstudy import questions, seed_prompts
from cartridges.selfstudy.languages import parts, word_count
from cartridges.selfstudy.phrases import head
from cartridges.selfstudy.spans import Statement, answer_spans, content_words, statements


@dataclass(frozen=True)
class Proposal:
    """Instructions for making a conversation about a chunk.

    Exactly one of `seed_prompt` (which the asking side sees with the chunk), `completion` (which the asking
    side continues after few-shot examples) and `user` (the message itself) is set. An `answer` is known from
    the text, and the teacher only scores it; with None the teacher writes one. A written answer without
    `must_contain` is dropped. `short` puts the short-answer examples before the question.

    There are two forms of several rounds. `earlier` are previous questions and answers that are known from the text
    and scored together with `answer`. With `follow_ups`, after each answer of the teacher the asking side sees
    question, answer and the next follow-up prompt.
    """

    seed_prompt: str | None = None
    completion: str | None = None
    user: str | None = None
    answer: str | None = None
    must_contain: str | None = None
    short: bool = False
    earlier: tuple[tuple[str, str], ...] = ()
    follow_ups: tuple[str, ...] = ()


class SeedFamily(Protocol):
    """Proposes conversations about `chunk`; None if the chunk has nothing suitable.

    `ordinal` counts the family's proposals for this chunk. `decodes` is true if a model has to write
    anything. Such tasks are batched together, so that the others do not wait for them.
    """

    @property
    def decodes(self) -> bool: ...

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None: ...


@dataclass(frozen=True)
class SeedPrompts:
    """A seed prompt describes the kind of message that the asking side writes."""

    prompts: tuple[str, ...]
    decodes: ClassVar[bool] = True

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal:
        prompt = rng.choice(self.prompts).replace("{format}", rng.choice(seed_prompts.FORMATS))
        return Proposal(seed_prompt=prompt)


@dataclass(frozen=True)
class MultiRound:
    """The asking side asks `rounds` questions, each after the previous answer (the paper's k)."""

    rounds: int = 2
    decodes: ClassVar[bool] = True

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal:
        first = rng.choice((*seed_prompts.QUESTION, *seed_prompts.USE_CASE))
        return Proposal(seed_prompt=first, follow_ups=tuple(rng.choices(seed_prompts.FOLLOW_UP, k=self.rounds - 1)))


@dataclass(frozen=True)
class Anchored:
    """A question by rule whose answer is a span of the text.

    The teacher scores that answer in one prefill without decoding, which gives many times more conversations per
    second. `answer` is the form that is scored: the "span" after short-answer examples, or the "sentence" that
    contains it, as a model answers a plain question. With "written" the teacher writes an answer, which must
    contain the span.
    """

    answer: Literal["span", "sentence", "written"] = "span"

    @property
    def decodes(self) -> bool:
        return self.answer == "written"

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        for statement, span in draw_spans(chunk, rng, ordinal, attempts=6):
            question = questions.ask(statement, span, rng)
            if not question and self.answer == "span":
                question = questions.gap(statement, span, rng)
            if question and self.answer == "written":
                return Proposal(user=question, must_contain=span)
            if question and self.answer == "sentence":
                answer = questions.sentence(statement, span, question)
                return Proposal(user=question, answer=answer) if answer else None
            if question:
                return Proposal(user=question, answer=span, short=True)
        return None


@dataclass(frozen=True)
class AnchoredRounds:
    """Up to `rounds` questions by rule in one conversation, each answered by the sentence that contains the answer.
    One prefill scores them all."""

    rounds: int = 3
    decodes: ClassVar[bool] = False

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        one, rounds = Anchored("sentence"), {}
        for turn in range(self.rounds):
            found = one.propose(chunk, rng, ordinal * self.rounds + turn)
            # The model could copy an answer that was already given.
            if found and found.user not in rounds and found.answer not in rounds.values():
                rounds[found.user] = found.answer
        if len(rounds) < 2:
            return None
        *earlier, (asked, answer) = rounds.items()
        return Proposal(user=asked, answer=answer, earlier=tuple(earlier))


@dataclass(frozen=True)
class AnchoredAsked:
    """The asking side writes the question for a span, by continuing few-shot examples."""

    decodes: ClassVar[bool] = True

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        for statement, span in draw_spans(chunk, rng, ordinal, attempts=1):
            return Proposal(completion=f"Text: {statement.text}\nAnswer: {span}\nQuestion:", answer=span,
                            short=True)
        return None


@dataclass(frozen=True)
class Cloze:
    """A statement with a span left out; the teacher scores the span."""

    decodes: ClassVar[bool] = False

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        for statement, span in draw_spans(chunk, rng, ordinal, attempts=1):
            gap = statement.text.replace(span, "____", 1)
            return Proposal(user=f"Fill in the gap: {gap}", answer=span, short=True)
        return None


@dataclass(frozen=True)
class Recall:
    """The start of a statement; the teacher scores the rest."""

    decodes: ClassVar[bool] = False

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        texts = [parts(s.verbatim) for s in statements(chunk.text) if word_count(s.verbatim) >= 6]
        if not texts:
            return None
        words, join = texts[ordinal % len(texts)]
        shared = max((len(commonprefix([words, others])) for others, _ in texts if others is not words), default=0)
        first = max(3, shared + 1)  # with this many words the start is unique
        if first >= len(words):
            return None
        cut = rng.randint(first, max(first, len(words) - 3))
        return Proposal(user="Continue: " + join.join(words[:cut]), answer=join.join(words[cut:]))


@dataclass(frozen=True)
class Keywords:
    """A few words of a statement in random order; the teacher scores the statement.

    Every statement gives many of these, and none depends on a rule of grammar.
    """

    decodes: ClassVar[bool] = False

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        for statement, span in draw_spans(chunk, rng, ordinal, attempts=1):
            if statement.cells:
                words = _row_words(statement, span)
            else:
                words = [span, *rng.sample(content := content_words(statement.text), min(2, len(content)))]
            rng.shuffle(words)
            asked = rng.choice(("What about {}?", "Tell me about {}.", "What is known of {}?"))
            user = asked.format(", ".join(dict.fromkeys(words)))
            answer = questions.sentence(statement, span, user)
            return Proposal(user=user, answer=answer) if answer else None
        return None


def _row_words(statement: Statement, span: str) -> list[str]:
    """The row's subject and the requested column; the subject alone if it is the span and has a column name. (Several
    rows without one, which are sentences, may be about the same subject.)"""
    (named, subject), *rest = statement.cells
    if span == subject and named:
        return [subject]
    column = next((name for name, cell in rest if cell == span), rest[0][0])
    return [subject, column.lower()]


FAMILIES: dict[str, SeedFamily] = {
    "structuring": SeedPrompts(seed_prompts.STRUCTURING),
    "summarization": SeedPrompts(seed_prompts.SUMMARIZATION),
    "question": SeedPrompts(seed_prompts.QUESTION),
    "use_case": SeedPrompts(seed_prompts.USE_CASE),
    "creative": SeedPrompts(seed_prompts.CREATIVE),
    "generic": SeedPrompts(seed_prompts.GENERIC),
    "multi_round": MultiRound(),
    "anchored": Anchored(),
    "anchored_sentence": Anchored("sentence"),
    "anchored_written": Anchored("written"),
    "anchored_asked": AnchoredAsked(),
    "anchored_rounds": AnchoredRounds(),
    "cloze": Cloze(),
    "recall": Recall(),
    "keywords": Keywords(),
}

DEFAULT_MIXTURE = {
    "anchored": 0.45, "anchored_sentence": 0.34, "recall": 0.08, "keywords": 0.07, "cloze": 0.02,
    "anchored_written": 0.01, "question": 0.01, "structuring": 0.005, "summarization": 0.005, "use_case": 0.005,
    "creative": 0.005,
}
"""Shares of the planned conversations, chosen for a small asking model (docs/log.md)."""


ENGLISH_RULES = frozenset({"anchored", "anchored_sentence", "anchored_written", "anchored_asked", "anchored_rounds",
                           "keywords"})
"""Families that make sense of English only; `plan` gives chunks in other languages to others."""
OTHER_MIXTURE = {"cloze": 0.5, "recall": 0.45, "question": 0.03, "use_case": 0.01, "summarization": 0.01}
"""Of what those would have made, where no shares are given. Not measured."""


def register(name: str, family: SeedFamily) -> None:
    """Make `family` available to `synthesize.families` under `name`."""
    FAMILIES[name] = family


def decodes(name: str) -> bool:
    """Whether a model has to write anything for the family `name`; true for general conversations, which have none."""
    return name not in FAMILIES or FAMILIES[name].decodes


def draw_spans(chunk: Chunk, rng: random.Random, ordinal: int,
               attempts: int) -> Iterator[tuple[Statement, str]]:
    """`attempts` draws of a statement and a span; the `ordinal`-th proposal starts at the `ordinal`-th pair.

    Proposals go through the statements in a fixed random order per chunk, and in each round take the next span of a
    statement. So all statements are asked about equally often, and no span is first twice before every span of its
    statement was. Numbers and names come early. The second draw is the statement's next span; later draws are random.
    """
    found = _with_spans(chunk.text)
    order = random.Random(chunk.chunk_id).sample(range(len(found)), len(found))
    for attempt in range(attempts if found else 0):
        if attempt > 1:
            statement, spans = rng.choice(found)
            yield statement, rng.choice(spans)
            continue
        turn, index = divmod(ordinal, len(found))
        statement, spans = found[order[index]]
        yield statement, _in_turn(spans, statement.text)[(turn + attempt) % len(spans)]


@lru_cache(maxsize=64)
def _with_spans(text: str) -> tuple[tuple[Statement, list[str]], ...]:
    """The statements of `text` with their spans, except spans that occur in half of them ("port number", and so "the
    port number of echo"): these do not distinguish statements.

    The cells of a row come twice as often as its subject, as in people's questions about tables.
    """
    found = [(statement, answer_spans(statement)) for statement in statements(text)]
    counts = Counter(span for _, spans in found for span in set(spans))
    common = {span for span, count in counts.items() if count > max(2, len(found) // 2)}
    kept = []
    for statement, spans in found:
        spans = [span for span in spans if span not in common and (statement.cells or head(span) not in common)]
        if statement.cells:
            subject = statement.cells[0][1]
            spans = 2 * [span for span in spans if span != subject] + [span for span in spans if span == subject]
        if spans:
            kept.append((statement, spans))
    return tuple(kept)


def _in_turn(spans: list[str], seed: str) -> list[str]:
    """`spans` in a random order in which the first ones, the likelier answers, tend to stay first."""
    rng = random.Random(seed)
    keys = [position + 3 * rng.random() for position in range(len(spans))]
    return [span for _, span in sorted(zip(keys, spans, strict=True))]
