"""Documents in order, for corpora of any size.

A long text is split into several documents, which bounds the memory of a pass. If all documents together exceed
`HELD_CHARACTERS`, every pass reads them from disk again.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

from cartridges.errors import UserError
from cartridges.records import Document

logger = logging.getLogger(__name__)

LONGEST_CHARACTERS = 2**20
"""Longest document. A tokenizer needs about a hundred bytes of memory per token."""
HELD_CHARACTERS = 2**26
"""Longest corpus, over all its documents, that is kept in memory."""


def stretches(blocks: Iterable[str]) -> Iterator[str]:
    """The text of `blocks` in parts of at most `LONGEST_CHARACTERS`. A part ends after the last paragraph that fits,
    else after a line, a word, or anywhere; the last two parts have similar lengths. The boundaries of the blocks do
    not matter."""
    rest, at = "", 0
    for block in blocks:
        rest, at = rest[at:] + block, 0
        while len(rest) - at > 2 * LONGEST_CHARACTERS:
            begun, at = at, _cut(rest, at, LONGEST_CHARACTERS)
            yield rest[begun:at]
    while at < len(rest):
        left = len(rest) - at
        begun, at = at, _cut(rest, at, -(-left // 2)) if left > LONGEST_CHARACTERS else len(rest)
        yield rest[begun:at]


def _cut(text: str, start: int, most: int) -> int:
    """The best end for a part of at most `most` characters and more than half of that."""
    for mark in ("\n\n", "\n", " "):
        end = text.rfind(mark, start, start + most) + len(mark)
        if end > start + most // 2:
            return end
    return start + most


class Reread:
    """Documents that every pass reads from disk. Raises `UserError` if they have changed since the first pass."""

    def __init__(self, read: Callable[[], Iterable[Document]], ids: tuple[str, ...]):
        self._read, self.ids = read, ids

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Document]:
        expected = iter(self.ids)
        for document in distinct(self._read()):
            if next(expected, None) != document.document_id:
                raise _changed(f"at {document.source}")
            yield document
        if next(expected, None) is not None:
            raise _changed("at its end")


def _changed(where: str) -> UserError:
    return UserError(f"the corpus changed while it was read ({where}); leave it as it is and run again")


Documents = tuple[Document, ...] | Reread


def ids_of(documents: Documents) -> tuple[str, ...]:
    """The document ids, without reading the documents."""
    if isinstance(documents, Reread):
        return documents.ids
    return tuple(document.document_id for document in documents)


def gather(read: Callable[[], Iterable[Document]]) -> Documents:
    """The distinct documents that `read` yields, in memory or, if they are too long, as `Reread`. Takes one pass."""
    held: list[Document] = []
    ids: list[str] = []
    characters = 0
    for document in distinct(read()):
        ids.append(document.document_id)
        characters += len(document.text)
        if characters <= HELD_CHARACTERS:
            held.append(document)
        elif held:
            held.clear()
    if characters <= HELD_CHARACTERS:
        return tuple(held)
    logger.info("%d documents, %d characters: read again in every pass", len(ids), characters)
    return Reread(read, tuple(ids))


def distinct(documents: Iterable[Document]) -> Iterator[Document]:
    """`documents` without repeated ids."""
    seen: set[str] = set()
    for document in documents:
        if document.document_id not in seen:
            seen.add(document.document_id)
            yield document
