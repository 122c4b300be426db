"""Cuts a corpus into chunks: slices of documents at natural boundaries, short enough for the teacher.

Coarse cuts (sections, paragraphs) come first; finer ones (lines, sentences, words, tokens) apply only to parts that
are still too long. Then neighbours are packed into chunks of even length.
"""

import bisect
import hashlib
import re
from array import array
from collections.abc import Collection, Iterator
from pathlib import PurePath

from cartridges.config import ChunkSettings
from cartridges.readers import CODE_SUFFIXES
from cartridges.records import Chunk, Corpus, Document

Span = tuple[int, int]

TINY_SHARE = 0.25
"""A span shorter than this share of `max_tokens` may join a neighbour across a heading."""

_HEADING = r"(?m)^(?=#{1,6} \S)"
_PROSE_CUTS = (
    re.compile(_HEADING),
    # Paragraphs; a heading stays with the paragraph after it.
    re.compile(r"\n[ \t]*\n(?:[ \t]*\n)*"),
    # Intended line ends: list items, table rows, verse; not hard-wrapped prose.
    re.compile(r"(?<=[.!?:;|])[ \t]*\n|\n(?=[ \t]*(?:[-*+|•]|\d+[.)])[ \t]?)"),
    re.compile(r"(?<=[.!?])[\"')\]”’]*\s+|(?<=[。！？])"),
    re.compile(r"\n"),
    re.compile(r"\s+"),
)
_CODE_CUTS = (
    # Top-level definitions: a line at the left margin after a blank one.
    re.compile(r"\n[ \t]*\n+(?=[^\s)\]}])"),
    re.compile(r"\n[ \t]*\n(?:[ \t]*\n)*"),
    re.compile(r"\n"),
    re.compile(r"\s+"),
)


def chunk_corpus(corpus: Corpus, tokenizer, settings: ChunkSettings) -> list[Chunk]:
    """The chunks of all documents, in order."""
    return list(Chunks(corpus, tokenizer, settings))


class Chunks:
    """The chunks of all documents, in order. Every pass cuts them again, with one document in memory at a time.

    After a pass the positions of all chunks are known, and `with_ids` yields some of them without cutting again.
    """

    def __init__(self, corpus: Corpus, tokenizer, settings: ChunkSettings):
        self.corpus, self.tokenizer, self.settings = corpus, tokenizer, settings
        self._places = array("q")
        """Document number, start and end of each chunk, flat, because a corpus may have millions."""

    def __iter__(self) -> Iterator[Chunk]:
        self._places = array("q")
        for number, document in enumerate(self.corpus.documents):
            for chunk in chunk_document(document, self.tokenizer, self.settings):
                self._places.extend((number, chunk.start, chunk.end))
                yield chunk

    def __len__(self) -> int:
        """Number of chunks in the last pass."""
        return len(self._places) // 3

    def with_ids(self, wanted: Collection[str]) -> Iterator[Chunk]:
        """The chunks of the last pass with `wanted` ids, in order."""
        places = iter(zip(*(self._places[part::3] for part in range(3)), strict=True))
        place = next(places, None)
        for number, document in enumerate(self.corpus.documents):
            while place is not None and place[0] == number:
                chunk = _chunk(document, *place[1:])
                if chunk.chunk_id in wanted:
                    yield chunk
                place = next(places, None)


def chunk_document(document: Document, tokenizer, settings: ChunkSettings) -> list[Chunk]:
    """Chunks of at most `settings.max_tokens` tokens each, in order and without overlap.

    `document.text[start:end] == text` for each, with only whitespace between chunks. The ids depend
    only on document and position. `tokenizer` must be a fast one (for offsets).
    """
    return [_chunk(document, start, end)
            for start, end in _Cutter(document, tokenizer, settings.max_tokens).spans()]


def _chunk(document: Document, start: int, end: int) -> Chunk:
    chunk_id = hashlib.sha256(f"{document.document_id}:{start}:{end}".encode()).hexdigest()[:16]
    return Chunk(chunk_id, document.document_id, start, end, document.text[start:end])


class _Cutter:
    """Cuts one document. Token counts come from one pass over it and are checked at the end."""

    def __init__(self, document: Document, tokenizer, max_tokens: int):
        self.text = document.text
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        is_code = PurePath(document.source).suffix.lower() in CODE_SUFFIXES
        self.cuts = _CODE_CUTS if is_code else _PROSE_CUTS
        self.has_headings = not is_code
        encoded = tokenizer(self.text, add_special_tokens=False, return_offsets_mapping=True,
                            verbose=False)
        self.token_starts = [start for start, _ in encoded["offset_mapping"]]

    def spans(self) -> list[Span]:
        rough = self._split(0, len(self.text), 0, self.max_tokens)
        return [span for part in rough for span in self._exact(part)]

    def _exact(self, span: Span) -> list[Span]:
        """`span`, cut again if it has more tokens alone than inside its document."""
        span = self._trim(span)
        limit = self.max_tokens
        parts = [span] if span[0] < span[1] else []
        while excess := max((self._encoded(part) for part in parts), default=0) - self.max_tokens:
            if excess < 0:
                break
            limit = max(1, limit - max(1, excess))
            parts = [self._trim(part) for part in self._split(*span, 0, limit)]
            parts = [part for part in parts if part[0] < part[1]]
        return parts

    def _encoded(self, span: Span) -> int:
        return len(self.tokenizer(self.text[span[0]:span[1]], add_special_tokens=False)["input_ids"])

    def _count(self, start: int, end: int) -> int:
        return (bisect.bisect_left(self.token_starts, end)
                - bisect.bisect_left(self.token_starts, start))

    def _split(self, start: int, end: int, level: int, limit: int) -> list[Span]:
        if self._count(start, end) <= limit or end - start <= 1:
            return [(start, end)]
        if level == len(self.cuts):
            return self._split_tokens(start, end, limit)
        pieces = self._pieces(start, end, level)
        parts = [part for piece in pieces for part in self._split(*piece, level + 1, limit)]
        return self._pack(parts, limit) if len(pieces) > 1 else parts

    def _pieces(self, start: int, end: int, level: int) -> list[Span]:
        """Cut after each match of the level's pattern, so that no text is lost."""
        ends = [match.end() for match in self.cuts[level].finditer(self.text, start, end)]
        if self.has_headings and level == 1:
            ends = [cut for cut in ends if not self._heading_before(start, cut)]
        bounds = [start, *[cut for cut in ends if start < cut < end], end]
        return list(zip(bounds, bounds[1:], strict=False))

    def _heading_before(self, start: int, cut: int) -> bool:
        last_line = self.text[start:cut].rstrip().rsplit("\n", 1)[-1]
        return re.match(_HEADING, last_line) is not None

    def _split_tokens(self, start: int, end: int, limit: int) -> list[Span]:
        """Cut before every `limit`-th token, where there is no whitespace (base64, some scripts)."""
        first, last = (bisect.bisect_left(self.token_starts, at) for at in (start, end))
        cuts = sorted({self.token_starts[i] for i in range(first + limit, last, limit)} - {start, end})
        bounds = [start, *cuts, end]
        return list(zip(bounds, bounds[1:], strict=False))

    def _pack(self, parts: list[Span], limit: int) -> list[Span]:
        """Join neighbours into spans of even length, so that the last one is not very short."""
        total = sum(self._count(*part) for part in parts)
        target = total / -(-total // limit)
        packed = [parts[0]]
        for part in parts[1:]:
            joined = (packed[-1][0], part[1])
            near_target = self._count(*packed[-1]) + self._count(*part) / 2 <= target
            if near_target and self._joinable(packed[-1], part, joined, limit):
                packed[-1] = joined
            else:
                packed.append(part)
        return self._join_tiny(packed, limit)

    def _join_tiny(self, parts: list[Span], limit: int) -> list[Span]:
        joined = [parts[0]]
        for part in parts[1:]:
            both = (joined[-1][0], part[1])
            tiny = min(self._count(*joined[-1]), self._count(*part)) < TINY_SHARE * limit
            if tiny and self._count(*both) <= limit:
                joined[-1] = both
            else:
                joined.append(part)
        return joined

    def _joinable(self, left: Span, right: Span, joined: Span, limit: int) -> bool:
        if self._count(*joined) > limit:
            return False
        starts_section = self.has_headings and re.match(_HEADING, self.text[slice(*right)])
        return not starts_section or self._count(*left) < TINY_SHARE * limit

    def _trim(self, span: Span) -> Span:
        """`span` without leading blank lines and trailing whitespace; the first line keeps its indentation."""
        start, end = span
        text = self.text[start:end]
        lead = text[: len(text) - len(text.lstrip())]
        if len(lead) == len(text):
            return start, start
        at_line_start = "\n" in lead or start == 0 or self.text[start - 1] == "\n"
        indent = len(lead) - len(lead.rstrip(" \t")) if at_line_start else 0
        return start + len(lead) - indent, start + len(text.rstrip())
