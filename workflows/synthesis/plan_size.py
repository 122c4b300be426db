"""How many conversations to plan, and settings with numbers that were derived."""

from typing import Any

from cartridges.config import BuildSettings

CONVERSATIONS_PER_TOKEN = 1.0
"""Planned conversations for each corpus token where neither a number nor a budget is given."""
FEWEST_CONVERSATIONS = 256


def default_conversations(corpus_tokens: int) -> int:
    """Number of conversations to plan for a corpus of `corpus_tokens` tokens."""
    return max(FEWEST_CONVERSATIONS, round(corpus_tokens * CONVERSATIONS_PER_TOKEN))


def with_counts(settings: BuildSettings, corpus_tokens: int) -> BuildSettings:
    """`settings` with the default number of conversations where none is set."""
    if settings.synthesize.num_conversations:
        return settings
    return with_plan(settings, num_conversations=default_conversations(corpus_tokens))


def with_plan(settings: BuildSettings, num_conversations: int, steps: int | None = None) -> BuildSettings:
    """`settings` with these numbers; None leaves the steps as they are."""
    update: dict[str, Any] = {
        "synthesize": settings.synthesize.model_copy(update={"num_conversations": num_conversations})}
    if steps is not None:
        update["train"] = settings.train.model_copy(update={"steps": steps})
    return settings.model_copy(update=update)
