"""The one form in which short questions are asked, in self-study and in the report card alike."""

from cartridges.records import Message

EXAMPLES = (
    ("What colour are the doors of the Lindqvist mill?", "dark green"),
    ("How many steps lead up to the bell of Orsa?", "112"),
    ("Who repaired the clock of the Lindqvist mill?", "Tova Berg"),
)
"""Short answers from an invented text. They fix the style, so that the likelihood of a gold answer
measures knowledge and not whether the model would rather write a sentence."""


def example_messages() -> list[Message]:
    """The turns before every short question: the same tokens each time, so they are computed once."""
    turns: list[Message] = []
    for asked, answered in EXAMPLES:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


def question_messages(question: str) -> list[Message]:
    """`question` as the last turn of a conversation with short-answer examples before it."""
    return [*example_messages(), {"role": "user", "content": question.strip()}]
