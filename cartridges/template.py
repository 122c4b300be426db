"""Renders chats to tokens, in one place for synthesis, training, evaluation and serving.

A cartridge stands in for a *system turn*. So every prompt is split at the end of that turn: a cartridge replaces
`system_ids(text)`, and `conversation_ids(messages)` follows. The conversation's tokens do not depend on the prefix,
so teacher, student, report card and endpoint all use the same ones.

Only the template opens and closes turns: a special token spelled out in a text or a message (`<|im_end|>`, say) is
encoded as plain characters.
"""

import hashlib
import re
from collections.abc import Sequence

from cartridges.errors import UserError
from cartridges.records import Message

PREAMBLE = "Use the following text to answer the user.\n\n"
MAX_CHARACTERS_PER_TOKEN = 64
"""No text has tokens this long on average: a window of `n` tokens never holds more than `64 n` characters."""
_MARK = re.compile("\ue000(\\d+)\ue001")
"""Marks, in a rendered chat, a spelled-out special token: the one with that index in `ChatTemplate._literal`."""


class ChatTemplate:
    """`tokenizer`'s chat template, split at the end of the system turn.

    Raises `UserError` if the tokenizer has no chat template, or a template without a separate system turn.
    """

    def __init__(self, tokenizer):
        if not tokenizer.chat_template:
            raise UserError(f"{tokenizer.name_or_path} has no chat template; use an instruct model")
        self.tokenizer = tokenizer
        self.hash = hashlib.sha256((tokenizer.chat_template + PREAMBLE).encode()).hexdigest()
        self._literal = [*_special_tokens(tokenizer), "\ue000"]  # and the mark's own first character
        self._spelled = re.compile("|".join(map(re.escape, self._literal)))
        # Encoded once, because the tokenizer's switch is not safe while other threads encode.
        self._as_text = [tokenizer.encode(token, add_special_tokens=False, split_special_tokens=True)
                         for token in self._literal]
        self._sentinel = self._render([{"role": "system", "content": "x"}])
        probe = self._render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
        if not probe.startswith(self._sentinel) or "x" not in self._sentinel:
            raise UserError(f"{tokenizer.name_or_path}'s chat template has no separate system turn; "
                            "cartridges need one to stand in for")

    def system_ids(self, text: str) -> list[int]:
        """The closed system turn around the corpus or chunk `text`."""
        return self._encode(self._render([{"role": "system", "content": PREAMBLE + text}]))

    def cut(self, text: str, max_tokens: int) -> str:
        """The longest beginning of `text`, in whole tokens, whose system turn has at most `max_tokens`.

        It is empty if the turn without any text is already longer.
        """
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end for _, end in encoded["offset_mapping"]]
        keep = min(len(ends), max_tokens)
        while keep > 0:
            part = text if keep == len(ends) else text[: ends[keep - 1]]
            excess = len(self.system_ids(part)) - max_tokens
            if excess <= 0:
                return part
            keep -= excess
        return ""

    def default_ids(self) -> list[int]:
        """The tokens that the template puts before a conversation without a system message."""
        message = {"role": "user", "content": "y"}
        opened = self._render([message])
        rest = self._render([{"role": "system", "content": "x"}, message])[len(self._sentinel):]
        if not opened.endswith(rest):
            raise UserError(f"{self.tokenizer.name_or_path}'s chat template renders a conversation "
                            "differently without a system turn; cartridges cannot serve it")
        return self._encode(opened[: len(opened) - len(rest)])

    def conversation_ids(self, messages: Sequence[Message], generation_prompt: bool = True) -> list[int]:
        """The tokens after the system turn. With `generation_prompt` they end where the assistant begins."""
        return self._encode(self._conversation_text(messages, generation_prompt))

    def _conversation_text(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        if any(message["role"] == "system" for message in messages):
            raise UserError("a system message cannot follow a cartridge or corpus: put it in the "
                            "user message")
        system = {"role": "system", "content": "x"}
        full = self._render([system, *messages], generation_prompt)
        return full[len(self._sentinel):]

    def text_ids(self, text: str) -> list[int]:
        """The tokens of `text` inside a turn."""
        return self._encode(self._shielded(text))

    def _render(self, messages, generation_prompt: bool = False) -> str:
        shielded = [{**message, "content": self._shielded(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(
            shielded, tokenize=False, add_generation_prompt=generation_prompt)

    def _shielded(self, text: str) -> str:
        return self._spelled.sub(lambda found: f"\ue000{self._literal.index(found.group())}\ue001", text)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(_MARK.split(text)):
            if i % 2:
                ids += self._as_text[int(piece)]
            elif piece:
                ids += self.tokenizer.encode(piece, add_special_tokens=False)
        return ids


def _special_tokens(tokenizer) -> list[str]:
    """All special tokens, longest first, so that a longer one is matched before its prefix."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
