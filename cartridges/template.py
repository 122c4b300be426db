"""The one place that renders chats to tokens, for synthesis, training, evaluation and serving.

A cartridge stands in for a *system turn*. So every prompt is split once, at the end of that turn:
`system_ids(text)` is what a cartridge replaces, `conversation_ids(messages)` is what follows.
Whatever stands before, the conversation's tokens are the same: teacher and student, report card
and endpoint cannot drift apart.

Only the template may open and close turns: where a text or a message spells a special token
(`<|im_end|>`, say), it is read as the characters it is.
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
"""Stands, while a chat is rendered, for what must be read as text: `ChatTemplate._literal` of that index."""


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
        self._literal = [*_special_tokens(tokenizer), "\ue000"]  # the mark's own opening, too
        self._spelled = re.compile("|".join(map(re.escape, self._literal)))
        # Once and here: the tokenizer's switch is not safe while other threads encode.
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

        It is empty where the turn without text is that long already.
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
        return self._encode(self._conversation_text(messages, generation_prompt))

    def _conversation_text(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        if any(message["role"] == "system" for message in messages):
            raise UserError("a system message cannot follow a cartridge or corpus: put it in the "
                            "user message")
        system = {"role": "system", "content": "x"}
        full = self._render([system, *messages], generation_prompt)
        return full[len(self._sentinel):]

    def text_ids(self, text: str) -> list[int]:
        """`text` as it stands inside a turn."""
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
    """Longest first, so that none hides a longer one that begins with it."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))
