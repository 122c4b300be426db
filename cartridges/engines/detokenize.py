"""Converts token ids to text, one token at a time."""

from collections.abc import Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """Turns a growing list of token ids into printable pieces.

    Joined, the pieces are the decoded text without special tokens, cut before the first stop string.
    A piece never ends within a character (byte-level tokenizers split them) or within the beginning
    of a possible stop string.
    """

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = tuple(text for text in stop if text)
        self.stopped = False
        self._ids: list[int] = []
        self._begin = 0
        self._read = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that became printable with `token_id`. Sets `stopped` at a stop string."""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._begin:self._read])
        after = self._decode(self._ids[self._begin:])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        # Decoding restarts at the last complete piece: a token's text may depend on the token before it
        # (leading spaces), but on no earlier one.
        self._begin, self._read = self._read, len(self._ids)
        return self._release(self._held + after[len(before):])

    def finish(self) -> str:
        """The text that was held back as a possible stop string. An unfinished character is dropped."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._begin:self._read])
        rest = self._decode(self._ids[self._begin:])[len(before):]
        text = self._release(self._held + rest.rstrip(REPLACEMENT))
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep:]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
