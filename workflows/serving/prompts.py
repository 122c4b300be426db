"""From what a client sent to the token ids that follow the prefix."""

from collections.abc import Sequence

from cartridges.records import Message
from cartridges.template import ChatTemplate
from workflows.serving.api import ChatMessage
from workflows.serving.errors import ApiError


def fold_system(messages: Sequence[ChatMessage]) -> list[Message]:
    """Leading system (or developer) messages become the opening of the first user message.

    The cartridge stands where a system turn would, so there is no place for another; but agent
    frameworks always send one. A system message further on is refused.
    """
    count = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")),
                 len(messages))
    system = "\n\n".join(message.text for message in messages[:count])
    rest: list[Message] = [{"role": message.role, "content": message.text} for message in messages[count:]]
    if any(message["role"] in ("system", "developer") for message in rest):
        raise ApiError(400, "a system message must come before all others; put its text in a user message",
                       param="messages")
    if not system:
        return rest or [{"role": "user", "content": ""}]
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{"role": "user", "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]


def chat_ids(template: ChatTemplate, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    return tuple(template.conversation_ids(fold_system(messages), generation_prompt=True))


def raw_ids(template: ChatTemplate, prompt: str | list[int], vocab_size: int) -> tuple[int, ...]:
    """A completions prompt, put after the prefix as it is."""
    if isinstance(prompt, str):
        return tuple(template.tokenizer.encode(prompt, add_special_tokens=False))
    if max(prompt) >= vocab_size:
        raise ApiError(400, f"prompt: token id {max(prompt)} is not below {vocab_size}", param="prompt")
    return tuple(prompt)
