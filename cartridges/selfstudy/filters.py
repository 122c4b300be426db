"""Why a conversation is dropped. Each filter is a function; each drop is counted by its reason."""

import re

import numpy as np

_NUMBER = re.compile(r"\d[\d,.]*(?<![,.])")


def malformed_question(question: str, short: bool) -> str | None:
    """Empty, cut off, or not a question where one was asked for."""
    words = question.split()
    if len(words) < 3:
        return "empty"
    if short and not question.endswith("?"):
        return "malformed"
    if re.search(r"(?i)\b(the|this|given|following) (text|passage|paragraph|table|sentence)\b", question):
        return "refers_to_text"
    return None


def gives_answer_away(question: str, answer: str) -> bool:
    """The answer stands in the question, so that answering teaches nothing."""
    pattern = rf"(?<!\w){re.escape(answer.lower())}(?!\w)"
    return re.search(pattern, question.lower()) is not None


def ungrounded_numbers(answer: str, chunk: str, question: str) -> list[str]:
    """Numbers of the answer that stand neither in the chunk nor in the question."""
    known = set(_NUMBER.findall(chunk)) | set(_NUMBER.findall(question))
    return [number for number in _NUMBER.findall(answer) if number not in known]


def says(answer: str, span: str) -> bool:
    """`span` occurs in `answer` as whole words."""
    return re.search(rf"(?<!\w){re.escape(span.lower())}(?!\w)", answer.lower()) is not None


def information_gain(with_chunk: np.ndarray, without: np.ndarray) -> float:
    """Nats a token by which the chunk makes the answer likelier (logprobs of the same tokens)."""
    return float(with_chunk.mean() - without.mean())
