"""Searching the corpora of a registry: passages for a question, or the cartridge that it is about."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cartridges.registry import Entry
from cartridges.template import ChatTemplate
from workflows.serving.errors import ApiError
from workflows.serving.passages import Passage, PassageIndex, cut

KEPT = 64
"""Corpora (or combinations of them) whose own index is kept in memory, the oldest out first."""

FRESH_S = 10.0
"""Seconds for which the index over all corpora is used without looking for new ones."""


class CorpusSearch:
    """BM25 over the texts that the registry keeps. `read(entry)` gives one; ApiError where there is none.

    Blocking; used from several threads.
    """

    def __init__(self, read: Callable[[Entry], str], template: ChatTemplate):
        self._read, self._template = read, template
        self._own: OrderedDict[tuple[str, ...], PassageIndex] = OrderedDict()
        self._parts: dict[str, list[str]] = {}
        self._all: tuple[float, tuple[Entry, ...], PassageIndex] | None = None
        self._lock = threading.Lock()

    def passages(self, entries: Sequence[Entry], question: str, max_tokens: int) -> str:
        """The best passages of these corpora for `question`, as a text whose system turn has at most
        `max_tokens`, in the order in which they stand there; empty where no word of it occurs.

        The best that still fits is taken each time: a long one does not shut out a short one behind it.
        """
        index = self._index_of(entries)
        chosen: list[Passage] = []
        for passage in index.best(question, max(1, max_tokens // 8)):
            longer = sorted([*chosen, passage], key=lambda one: (one.owner, one.index))
            if len(self._template.system_ids(_joined(longer))) <= max_tokens:
                chosen = longer
        return _joined(chosen)

    def which(self, list_entries: Callable[[], Sequence[Entry]], allowed: Callable[[str], bool],
              question: str) -> Entry | None:
        """The entry with the best passage for `question` among those that are `allowed` by name.

        None where no text shares a word with it. ApiError 400 where no corpus text is kept.
        """
        entries, index = self._everything(list_entries)
        open_ones = {place for place, entry in enumerate(entries) if allowed(entry.name)}
        if not open_ones:
            raise ApiError(400, "auto: no cartridge here was published with its corpus text; name one as the model",
                           "corpus_not_available", "model")
        best = index.best(question, 1, open_ones)
        return entries[best[0].owner] if best else None

    def _index_of(self, entries: Sequence[Entry]) -> PassageIndex:
        key = tuple(map(_version, entries))
        with self._lock:
            if key not in self._own:
                self._own[key] = PassageIndex([self._passages(entry) for entry in entries])
            self._own.move_to_end(key)
            while len(self._own) > KEPT:
                self._own.popitem(last=False)
            return self._own[key]

    def _everything(self, list_entries: Callable[[], Sequence[Entry]]) -> tuple[tuple[Entry, ...], PassageIndex]:
        with self._lock:
            if self._all and time.monotonic() - self._all[0] < FRESH_S:
                return self._all[1:]
            entries = tuple(entry for entry in list_entries() if entry.manifest.corpus_text is not None)
            same = self._all and list(map(_version, self._all[1])) == list(map(_version, entries))
            index = self._all[2] if self._all and same else self._build(entries)
            self._all = (time.monotonic(), entries, index)
            return entries, index

    def _build(self, entries: Sequence[Entry]) -> PassageIndex:
        # What was cut before is not cut again; what is no longer on offer is forgotten.
        self._parts = {_version(entry): self._parts.get(_version(entry)) or self._readable(entry)
                       for entry in entries}
        return PassageIndex(list(self._parts.values()))

    def _readable(self, entry: Entry) -> list[str]:
        """One damaged or unreachable text must not keep questions from all other corpora."""
        try:
            return self._passages(entry)
        except ApiError:
            return []

    def _passages(self, entry: Entry) -> list[str]:
        return cut(self._read(entry), self._template.tokenizer)


def _joined(passages: Sequence[Passage]) -> str:
    return "\n\n".join(passage.text for passage in passages)


def _version(entry: Entry) -> str:
    return f"{entry.name}@{entry.version}"
