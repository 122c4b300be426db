"""Filters for conversations, one function each. Dropped conversations are counted by reason."""

import re
from collections.abc import Iterator

import numpy as np

from cartridges.selfstudy.languages import UNSPACED, is_unspaced, word_count

_NUMBER = re.compile(r"\d[\d,.]*(?<![,.])")
_CAPITALISED = re.compile(r"(?<![\w'’-])[A-Z][\w'’-]+")
_WORD = re.compile(r"[\w'’-]+")
_OPENS = re.compile(r"(?:^|[.!?:;|*•\n\"“(\[-])[\s\"“(\[*_]*$")
"""Matches text that ends just before the first word of a sentence, a list item or a cell."""


def question_faults(question: str, short: bool) -> Iterator[str]:
    """The faults of a question: too short, not a question, or a reference to a text that the reader does not have."""
    if word_count(question) < 3:
        yield "empty"
    if short and not question.endswith(("?", "？", "؟")):
        yield "malformed"
    if re.search(r"(?i)\b(the|this|given|following) (text|passage|paragraph|table|sentence)\b", question):
        yield "refers_to_text"


def gives_answer_away(question: str, answer: str) -> bool:
    """Whether the question contains the answer, so that answering it teaches nothing."""
    return says(question, answer)


def ungrounded_numbers(answer: str, chunk: str, question: str) -> list[str]:
    """Numbers in the answer that are neither in the chunk nor in the question."""
    known = set(_NUMBER.findall(chunk)) | set(_NUMBER.findall(question))
    return [number for number in _NUMBER.findall(answer) if number not in known]


def ungrounded_names(answer: str, chunk: str, question: str) -> list[str]:
    """Capitalised words inside sentences of the answer that are neither in the chunk nor in the question.

    The first word of a sentence is ignored, because it is always capitalised. Works for Latin and similar scripts.
    """
    known = {_bare(word) for text in (chunk, question) for word in _WORD.findall(text)}
    return [name for name in names(answer) if _bare(name) not in known]


def names(text: str) -> list[str]:
    """The capitalised words of `text` that do not start a sentence."""
    return [match.group() for match in _CAPITALISED.finditer(text) if not _OPENS.search(text[:match.start()])]


def _bare(word: str) -> str:
    """`Voss's` -> `voss`."""
    return re.sub(r"['’]s?$", "", word).casefold()


def groundedness(answer: str, chunk: str, question: str) -> dict[str, float]:
    """Counts of numbers and names in the answer, and of those that are neither in the chunk nor in the question."""
    return {
        "numbers": float(len(_NUMBER.findall(answer))), "names": float(len(names(answer))),
        "ungrounded_numbers": float(len(ungrounded_numbers(answer, chunk, question))),
        "ungrounded_names": float(len(ungrounded_names(answer, chunk, question))),
    }


def says(text: str, span: str) -> bool:
    """Whether `text` contains `span` as whole words. Text written without spaces has no word bounds to check."""
    begins, ends = ("" if is_unspaced(span[at:][:1]) else mark for at, mark in (
        (0, rf"(?<![^\W{UNSPACED}])"), (-1, rf"(?![^\W{UNSPACED}])")))
    return re.search(f"{begins}{re.escape(span.lower())}{ends}", text.lower()) is not None


def information_gain(with_chunk: np.ndarray, without: np.ndarray) -> float:
    """Nats per token by which the chunk makes the answer likelier (both logprobs are of the same tokens)."""
    return float(with_chunk.mean() - without.mean())
