"""Seed families: ways to start a conversation about a chunk.

A family is a frozen dataclass, its fields are its hyperparameters, and its one method proposes a
conversation. `register` adds one of your own. The paper's five families and its generic baseline
(arXiv 2506.06266, section on self-study) let the model write its message freely; the anchored and
cloze families are for models too small to ask well, and know the answer from the text.
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
    """How a conversation about a chunk is to be made.

    Exactly one of `seed_prompt` (the asking side sees the chunk and this), `completion` (the asking
    side continues this text after few-shot examples) and `user` (the message itself) is set.
    `answer` is known from the text, and the teacher only scores it; None lets the teacher write.
    `must_contain`: a written answer without it is dropped. `short` puts the short-answer examples
    before the question.

    Of several rounds, `earlier` are questions and answers that stand before, known from the text as `answer` is and
    scored with it; and after the teacher has written an answer, the asking side is shown question and answer and
    the next of `follow_ups`, as many rounds as there are.
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
    """Proposes a conversation about `chunk`, or None where the chunk has nothing for it.

    `ordinal` counts the family's proposals for this chunk. `decodes` says whether a model has to write
    anything: such tasks are batched with each other, so that the others do not wait for them.
    """

    @property
    def decodes(self) -> bool: ...

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None: ...


@dataclass(frozen=True)
class SeedPrompts:
    """The asking side is told what kind of message to write."""

    prompts: tuple[str, ...]
    decodes: ClassVar[bool] = True

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal:
        prompt = rng.choice(self.prompts).replace("{format}", rng.choice(seed_prompts.FORMATS))
        return Proposal(seed_prompt=prompt)


@dataclass(frozen=True)
class MultiRound:
    """The asking side asks on after every answer, `rounds` times in all (the paper's k)."""

    rounds: int = 2
    decodes: ClassVar[bool] = True

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal:
        first = rng.choice((*seed_prompts.QUESTION, *seed_prompts.USE_CASE))
        return Proposal(seed_prompt=first, follow_ups=tuple(rng.choices(seed_prompts.FOLLOW_UP, k=self.rounds - 1)))


@dataclass(frozen=True)
class Anchored:
    """A question by rule whose answer is a span of the text; the teacher scores that answer.

    No decoding at all, one prefill: many times as many conversations a second. `answer` is what the
    teacher scores: the "span" after short-answer examples, or the "sentence" that holds it, as a
    model answers when it is simply asked; "written" lets the teacher write, and it must say the span.
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
                told = questions.sentence(statement, span, question)
                return Proposal(user=question, answer=told) if told else None
            if question:
                return Proposal(user=question, answer=span, short=True)
        return None


@dataclass(frozen=True)
class AnchoredRounds:
    """Up to `rounds` questions by rule in one conversation, each answered by the sentence that holds the answer; one
    prefill scores them all."""

    rounds: int = 3
    decodes: ClassVar[bool] = False

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        one, told = Anchored("sentence"), {}
        for turn in range(self.rounds):
            found = one.propose(chunk, rng, ordinal * self.rounds + turn)
            # An answer that was given already would be copied.
            if found and found.user not in told and found.answer not in told.values():
                told[found.user] = found.answer
        if len(told) < 2:
            return None
        *earlier, (asked, answer) = told.items()
        return Proposal(user=asked, answer=answer, earlier=tuple(earlier))


@dataclass(frozen=True)
class AnchoredAsked:
    """The question for a span is asked by the model, which continues few-shot examples."""

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
    """The start of a statement; the teacher scores how the text goes on."""

    decodes: ClassVar[bool] = False

    def propose(self, chunk: Chunk, rng: random.Random, ordinal: int) -> Proposal | None:
        told = [parts(s.verbatim) for s in statements(chunk.text) if word_count(s.verbatim) >= 6]
        if not told:
            return None
        words, join = told[ordinal % len(told)]
        shared = max((len(commonprefix([words, others])) for others, _ in told if others is not words), default=0)
        first = max(3, shared + 1)  # from here on no other statement begins so
        if first >= len(words):
            return None
        cut = rng.randint(first, max(first, len(words) - 3))
        return Proposal(user="Continue: " + join.join(words[:cut]), answer=join.join(words[cut:]))


@dataclass(frozen=True)
class Keywords:
    """A few words of a statement, in any order; the teacher scores the statement that holds them.

    Of these there are many for every statement, and none depends on a rule of grammar.
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
            told = questions.sentence(statement, span, user)
            return Proposal(user=user, answer=told) if told else None
        return None


def _row_words(statement: Statement, span: str) -> list[str]:
    """The row's subject and the column asked for. A subject alone says which row; but of a table told in sentences
    several may be about it."""
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
"""Shares of the planned conversations, for a small asking model; see docs/log.md."""


ENGLISH_RULES = frozenset({"anchored", "anchored_sentence", "anchored_written", "anchored_asked", "anchored_rounds",
                           "keywords"})
"""Families that make sense of English only; `plan` gives chunks in other languages to others."""
OTHER_MIXTURE = {"cloze": 0.5, "recall": 0.45, "question": 0.03, "use_case": 0.01, "summarization": 0.01}
"""Of what those would have made, where no shares are given. Not measured."""


def register(name: str, family: SeedFamily) -> None:
    """Make `family` available to `synthesize.families` under `name`."""
    FAMILIES[name] = family


def decodes(name: str) -> bool:
    """Whether a model has to write anything for the conversations of the family `name`. The general ones, which are of
    none, are written."""
    return name not in FAMILIES or FAMILIES[name].decodes


def draw_spans(chunk: Chunk, rng: random.Random, ordinal: int,
               attempts: int) -> Iterator[tuple[Statement, str]]:
    """`attempts` draws of a span; the `ordinal`-th proposal begins with the `ordinal`-th pair.

    Going through the statements in an order of the chunk's own, and through the spans of each round by
    round, asks about every statement as often as any other and begins with no span of a sentence twice
    before all of them have had their turn. Numbers and names come early. The second draw is the statement's
    next span, whose own turn comes a round later; those after it are free.
    """
    told = _told(chunk.text)
    order = random.Random(chunk.chunk_id).sample(range(len(told)), len(told))
    for attempt in range(attempts if told else 0):
        if attempt > 1:
            statement, spans = rng.choice(told)
            yield statement, rng.choice(spans)
            continue
        turn, index = divmod(ordinal, len(told))
        statement, spans = told[order[index]]
        yield statement, _in_turn(spans, statement.text)[(turn + attempt) % len(spans)]


@lru_cache(maxsize=64)
def _told(text: str) -> tuple[tuple[Statement, list[str]], ...]:
    """The statements with their spans, but for those that half of them hold ("port number", and so "the port
    number of echo"): they tell nothing apart.

    The cells of a row come twice as often as its subject, because that is how tables are asked about.
    """
    found = [(statement, answer_spans(statement)) for statement in statements(text)]
    counts = Counter(span for _, spans in found for span in set(spans))
    common = {span for span, count in counts.items() if count > max(2, len(found) // 2)}
    told = []
    for statement, spans in found:
        spans = [span for span in spans if span not in common and (statement.cells or head(span) not in common)]
        if statement.cells:
            subject = statement.cells[0][1]
            spans = 2 * [span for span in spans if span != subject] + [span for span in spans if span == subject]
        if spans:
            told.append((statement, spans))
    return tuple(told)


def _in_turn(spans: list[str], seed: str) -> list[str]:
    """An order of `spans` in which the first, the likelier answers, tend to stay first."""
    rng = random.Random(seed)
    keys = [position + 3 * rng.random() for position in range(len(spans))]
    return [span for _, span in sorted(zip(keys, spans, strict=True))]
