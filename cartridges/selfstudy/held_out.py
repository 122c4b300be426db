"""Self-study questions held out from training, for evaluation without questions of the user's."""

from collections.abc import Sequence

import numpy as np

from cartridges.prompts import example_messages
from cartridges.records import Conversation, Question

MAX_ANSWER_WORDS = 12
"""Longest answer; longer ones cannot be matched, and containment would be 0 for every arm."""


def split(conversations: Sequence[Conversation], count: int,
          seed: int) -> tuple[list[Conversation], list[Question]]:
    """`(conversations for training, held-out questions)`, at most `count` and a tenth of the conversations.

    The questions are drawn by `seed` from those with a short answer. All conversations that ask a held-out
    question are removed from training.
    """
    eligible = [i for i, conversation in enumerate(conversations) if _is_question(conversation)]
    wanted = min(count, len(conversations) // 10, len(eligible))
    if wanted == 0:
        return list(conversations), []
    drawn = np.random.default_rng([seed, 2]).choice(len(eligible), wanted, replace=False)
    chosen: dict[str, Conversation] = {}
    for index in sorted(drawn.tolist()):
        conversation = conversations[eligible[index]]
        chosen.setdefault(_folded(conversation.messages[-2]["content"]), conversation)
    return without(conversations, list(chosen)), [_as_question(conversation) for conversation in chosen.values()]


def without(conversations: Sequence[Conversation], questions: Sequence[str]) -> list[Conversation]:
    """`conversations` except those that ask one of `questions`, ignoring case and spaces."""
    asked = {_folded(question) for question in questions}
    return [conversation for conversation in conversations if not _asked(conversation) & asked]


def _is_question(conversation: Conversation) -> bool:
    question, answer = (message["content"] for message in conversation.messages[-2:])
    if not conversation.chunk_id:
        return False  # a general conversation, which the corpus does not answer
    if len(conversation.messages) > 2 and not conversation.shared_tokens:
        return False  # the last of several rounds may not be understood without the others
    return question.rstrip().endswith("?") and 0 < len(answer.split()) <= MAX_ANSWER_WORDS


def _as_question(conversation: Conversation) -> Question:
    question, answer = (message["content"].strip() for message in conversation.messages[-2:])
    return Question(conversation.conversation_id, question, (answer,))


def _asked(conversation: Conversation) -> set[str]:
    """The questions of a conversation, without those of its example turns."""
    own = conversation.messages[len(example_messages()) if conversation.shared_tokens else 0:]
    return {_folded(message["content"]) for message in own if message["role"] == "user"}


def _folded(text: str) -> str:
    return " ".join(text.lower().split())
