"""The corpus itself in the prompt, cut to the model's window: what a cartridge stands in for."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cartridges.errors import UserError
from cartridges.registry import Entry, Registry
from cartridges.template import MAX_CHARACTERS_PER_TOKEN, ChatTemplate
from workflows.serving.errors import ApiError

STEP = 256
"""The text is cut to a multiple of this many tokens, so that requests of any length share few prefixes
in the engine's cache."""

KEPT = 64
"""Texts kept in memory, the oldest out first."""


@dataclass(frozen=True)
class Turn:
    """`text` as a system turn of `num_tokens`; `truncated`: only the corpus' beginning fitted."""

    text: str
    num_tokens: int
    truncated: bool


class CorpusTexts:
    """Texts of the registry's cartridges as system turns for a model with a `window` of tokens."""

    def __init__(self, registry: Registry, template: ChatTemplate, window: int):
        self.registry, self.template, self.window = registry, template, window
        self._turns: OrderedDict[tuple[tuple[str, ...], int], Turn] = OrderedDict()

    def turn(self, entries: Sequence[Entry], room: int) -> Turn:
        """The texts of `entries` in order, with at least `room` tokens of the window left behind them.

        Blocking. ApiError 400 where a text was not kept or the window has no room, 409 where it is
        damaged, 503 where the registry cannot be reached.
        """
        versions = tuple(f"{entry.name}@{entry.version}" for entry in entries)
        whole = self._turns.get((versions, self.window)) or self._make(versions, entries, self.window)
        if not whole.truncated and whole.num_tokens + room <= self.window:
            return whole
        limit = (self.window - room) // STEP * STEP
        if limit <= len(self.template.system_ids("")):
            raise ApiError(400, f"prompt and answer take {room} of the window's {self.window} tokens and leave "
                           "no room for the corpus", "context_length_exceeded")
        return self._turns.get((versions, limit)) or self._make(versions, entries, limit)

    def _make(self, versions: tuple[str, ...], entries: Sequence[Entry], limit: int) -> Turn:
        text = "\n\n".join(self.read(entry) for entry in entries)
        kept = self.template.cut(text[: MAX_CHARACTERS_PER_TOKEN * self.window], limit)
        turn = Turn(kept, len(self.template.system_ids(kept)), len(kept) < len(text))
        self._turns[versions, limit] = turn
        while len(self._turns) > KEPT:
            self._turns.popitem(last=False)
        return turn

    def read(self, entry: Entry) -> str:
        """The text that the registry keeps of `entry`'s corpus. ApiError where it cannot be had."""
        try:
            text = self.registry.corpus_text(entry)
        except UserError as error:
            raise ApiError(409, str(error), "corpus_damaged", "full_context") from None
        except OSError as error:
            raise ApiError(503, f"the registry cannot be reached ({type(error).__name__}); try again",
                           "registry_unreachable", retry_after=5) from error
        if text is None:
            raise ApiError(400, f"the registry does not hold the corpus text of {entry.name}; build it with "
                           "corpus.keep_text=true", "corpus_not_available", "full_context")
        return text
