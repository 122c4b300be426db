"""The one form in which the report card asks, the same after every prefix."""

from cartridges.records import Message

EXAMPLES = (
    ("What colour are the doors of the Lindqvist mill?", "dark green"),
    ("How many steps lead up to the bell of Orsa?", "112"),
    ("Who repaired the clock of the Lindqvist mill?", "Tova Berg"),
)
"""Short answers from an invented text. They fix the style, so that the likelihood of a gold answer
measures knowledge and not whether the model would rather write a sentence."""


def question_messages(question: str) -> list[Message]:
    """`question` as the last turn of a conversation with short-answer examples before it."""
    turns: list[Message] = []
    for asked, answered in EXAMPLES:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*turns, {"role": "user", "content": question.strip()}]
