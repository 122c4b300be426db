"""The forms in which questions are asked, in self-study and in the report card alike, in every arm.

Free generation is asked plainly, as users ask an endpoint: small models answer in a sentence and are
right more often than when made to be brief. Likelihoods of short gold answers come after examples of
short answers, or they would measure style.
"""

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


def plain_messages(question: str) -> list[Message]:
    """`question` by itself."""
    return [{"role": "user", "content": question.strip()}]
