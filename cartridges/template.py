"""The one place that renders chats to tokens, for synthesis, training, evaluation and serving.

A cartridge stands in for a *system turn*. So every prompt is split once, at the end of that turn:
`system_ids(text)` is what a cartridge replaces, `conversation_ids(messages)` is what follows.
Whatever stands before, the conversation's tokens are the same: teacher and student, report card
and endpoint cannot drift apart.
"""

import hashlib
from collections.abc import Sequence

from cartridges.errors import UserError
from cartridges.records import Message

PREAMBLE = "Use the following text to answer the user.\n\n"


class ChatTemplate:
    """`tokenizer`'s chat template, split at the end of the system turn.

    Raises `UserError` if the tokenizer has no chat template, or one without a system turn that
    can stand alone.
    """

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path} has no chat template; use an instruct model")
        self.tokenizer = tokenizer
        self.hash = hashlib.sha256((tokenizer.chat_template + PREAMBLE).encode()).hexdigest()
        self._sentinel = self._render([{"role": "system", "content": "x"}])
        probe = self._render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
        if not probe.startswith(self._sentinel) or "x" not in self._sentinel:
            raise UserError(f"{tokenizer.name_or_path}'s chat template has no separate system turn; "
                            "cartridges need one to stand in for")

    def system_ids(self, text: str) -> list[int]:
        """The closed system turn around the corpus or chunk `text`."""
        return self._encode(self._render([{"role": "system", "content": PREAMBLE + text}]))

    def default_ids(self) -> list[int]:
        """What the template puts before a conversation when no system message is given."""
        message = {"role": "user", "content": "y"}
        opened = self._render([message])
        rest = self._render([{"role": "system", "content": "x"}, message])[len(self._sentinel):]
        if not opened.endswith(rest):
            raise UserError(f"{self.tokenizer.name_or_path}'s chat template renders a conversation "
                            "differently without a system turn; cartridges cannot serve it")
        return self._encode(opened[: len(opened) - len(rest)])

    def conversation_ids(self, messages: Sequence[Message], generation_prompt: bool = True) -> list[int]:
        """What follows the system turn. With `generation_prompt`, ends where the assistant begins."""
        return self._encode(self.conversation_text(messages, generation_prompt))

    def conversation_text(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        if any(message["role"] == "system" for message in messages):
            raise UserError("a system message cannot follow a cartridge or corpus: put it in the "
                            "user message")
        system = {"role": "system", "content": "x"}
        full = self._render([system, *messages], generation_prompt)
        return full[len(self._sentinel):]

    def _render(self, messages, generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
