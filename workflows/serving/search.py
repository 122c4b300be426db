"""Searching the corpora of a registry: passages for a question, or the cartridge that it is about."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from cartridges.registry import Entry
from cartridges.template import ChatTemplate
from workflows.serving.errors import ApiError
from workflows.serving.passages import Passage, PassageIndex, cut

log = logging.getLogger(__name__)

KEPT_PASSAGES = 500_000
"""Passages in the indices that are kept in memory; the least recently used go first."""

KEPT_TEXTS = 4096
"""Corpora whose passages are kept, so that a new one does not mean reading all of them again."""

FRESH_S = 10.0
"""Seconds for which it is not looked again which corpora there are, or for one that could not be read."""

Versions = tuple[str, ...]


class CorpusSearch:
    """BM25 over the texts that the registry keeps. Blocking; used from several threads.

    `read(entry)` gives a text, ApiError where it cannot be had. `list_entries()` gives those with a text;
    OSError where the registry cannot be reached.
    """

    def __init__(self, read: Callable[[Entry], str], list_entries: Callable[[], Sequence[Entry]],
                 template: ChatTemplate):
        self._read, self._list, self._template = read, list_entries, template
        self._texts: OrderedDict[str, list[str]] = OrderedDict()
        self._indices: OrderedDict[Versions, tuple[PassageIndex, float]] = OrderedDict()
        self._listing: tuple[tuple[Entry, ...], float] | None = None
        self._lock = threading.Lock()
        self._building: dict[Versions, threading.Lock] = {}

    def passages(self, entries: Sequence[Entry], question: str, max_tokens: int) -> str:
        """The best passages of these corpora for `question`, as a text whose system turn has at most
        `max_tokens`, in the order in which they stand there; empty where no word of it occurs.

        The best that still fits is taken each time: a long one does not shut out a short one behind it.
        """
        index = self._index_of(entries, skip_unreadable=False)
        chosen: list[Passage] = []
        for passage in index.best(question, max(1, max_tokens // 8)):
            longer = sorted([*chosen, passage], key=lambda one: (one.owner, one.index))
            if len(self._template.system_ids(_joined(longer))) <= max_tokens:
                chosen = longer
        return _joined(chosen)

    def which(self, allowed: Callable[[str], bool], question: str) -> Entry | None:
        """The entry with the best passage for `question` among those that are `allowed` by name.

        None where no text shares a word with it. How rare a word is, is counted over the allowed corpora
        only: what is in the others must not show. ApiError 400 where none keeps its text.
        """
        entries = [entry for entry in self._entries() if allowed(entry.name)]
        if not entries:
            raise ApiError(400, "auto: no cartridge here was published with its corpus text; name one as the model",
                           "corpus_not_available", "model")
        best = self._index_of(entries, skip_unreadable=True).best(question, 1)
        return entries[best[0].owner] if best else None

    def warm(self) -> None:
        """Read and index all corpora, so that who asks first does not wait for it. Never raises."""
        try:
            self._index_of(self._entries(), skip_unreadable=True)
        except Exception:  # nobody waits for it here; the first question tries again, and is told
            log.exception("the corpora could not be indexed at the start")

    def _entries(self) -> tuple[Entry, ...]:
        """While the registry cannot be reached, those that were there."""
        if self._listing and time.monotonic() < self._listing[1]:
            return self._listing[0]
        try:
            self._listing = tuple(self._list()), time.monotonic() + FRESH_S
        except OSError as error:
            if self._listing is None:
                raise ApiError(503, f"the registry cannot be reached ({type(error).__name__}); try again",
                               "registry_unreachable", retry_after=5) from error
        return self._listing[0]

    def _index_of(self, entries: Sequence[Entry], skip_unreadable: bool) -> PassageIndex:
        versions = tuple(map(_version, entries))
        with self._lock:
            building = self._building.setdefault(versions, threading.Lock())
        with building:  # Whoever wants the same index waits; others do not.
            found = self._indices.get(versions)
            if found is None or time.monotonic() >= found[1]:
                found = self._build(entries, skip_unreadable)
            with self._lock:
                self._indices[versions] = found
                self._indices.move_to_end(versions)
                self._evict()
                self._building.pop(versions, None)
        return found[0]

    def _evict(self) -> None:
        total = sum(len(index.passages) for index, _ in self._indices.values())
        while len(self._indices) > 1 and total > KEPT_PASSAGES:
            _, (index, _) = self._indices.popitem(last=False)
            total -= len(index.passages)

    def _build(self, entries: Sequence[Entry], skip_unreadable: bool) -> tuple[PassageIndex, float]:
        """The index, and until when it holds: one that lacks a text is soon made again."""
        texts, until = [], float("inf")
        for entry in entries:
            try:
                texts.append(self._text(entry))
            except ApiError as error:
                if not skip_unreadable:
                    raise
                log.warning("auto cannot find %s: %s", _version(entry), error)
                texts.append([])
                until = time.monotonic() + FRESH_S
        return PassageIndex(texts), until

    def _text(self, entry: Entry) -> list[str]:
        version = _version(entry)
        found = self._texts.get(version)
        if found is None:
            found = cut(self._read(entry), self._template.tokenizer)
        with self._lock:
            self._texts[version] = found
            self._texts.move_to_end(version)
            while len(self._texts) > KEPT_TEXTS:
                self._texts.popitem(last=False)
        return found


def _joined(passages: Sequence[Passage]) -> str:
    return "\n\n".join(passage.text for passage in passages)


def _version(entry: Entry) -> str:
    return f"{entry.name}@{entry.version}"
