"""The two forms of a question, the same in self-study and in every arm of the report card.

For free generation a question stands alone, as users ask an endpoint: small models then answer in a sentence and are
right more often than when forced to be brief. For likelihoods of short gold answers, examples of short answers
precede the question; without them the likelihood would measure style.
"""

from cartridges.records import Message

EXAMPLES = (
    ("What colour are the doors of the Lindqvist mill?", "dark green"),
    ("How many steps lead up to the bell of Orsa?", "112"),
    ("Who repaired the clock of the Lindqvist mill?", "Tova Berg"),
)
"""Questions and short answers about an invented text. They fix the style, so that the likelihood of a gold answer
measures knowledge and not whether the model prefers a full sentence."""


def example_messages() -> list[Message]:
    """The turns before every short question. Their tokens never change, so engines compute them once."""
    turns: list[Message] = []
    for asked, answered in EXAMPLES:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


def question_messages(question: str) -> list[Message]:
    """`question` as the last turn of a conversation with short-answer examples before it."""
    return [*example_messages(), {"role": "user", "content": question.strip()}]


def plain_messages(question: str) -> list[Message]:
    """`question` alone."""
    return [{"role": "user", "content": question.strip()}]
