"""BM25 over passages of corpora: what a fallback reads, and which corpus a question is about."""

from collections.abc import Sequence
from dataclasses import dataclass

import bm25s
import numpy as np

from cartridges.chunking import chunk_document
from cartridges.config import ChunkSettings
from cartridges.documents import stretches
from cartridges.records import Document

PASSAGE_TOKENS = 128
"""Longest passage. Chosen for the 135M model, which reads a paragraph better than a page."""

# A word; or one character of a script that puts no spaces between words.
WORDS = r"(?u)[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"


@dataclass(frozen=True)
class Passage:
    """`text` stands at place `index` of text number `owner`."""

    owner: int
    index: int
    text: str


MAX_WORDS = 256
"""Distinct words of a question that are looked up; the rest of a long one adds time, not direction."""


class PassageIndex:
    """The passages of several texts: `texts[owner]` is a sequence of passages.

    Scores are Lucene's BM25 over lower-cased words without English stop words.
    """

    def __init__(self, texts: Sequence[Sequence[str]]):
        self.passages = [Passage(owner, index, text) for owner, passages in enumerate(texts)
                         for index, text in enumerate(passages)]
        words = _words([passage.text for passage in self.passages])
        # BM25 of nothing but empty passages has no vocabulary to build.
        self._bm25 = bm25s.BM25() if any(words) else None
        if self._bm25:
            self._bm25.index(words, show_progress=False)

    def best(self, question: str, count: int) -> list[Passage]:
        """At most `count` passages that share a word with `question`, best first."""
        known = self._bm25.vocab_dict if self._bm25 else {}
        words = [word for word in dict.fromkeys(_words([question])[0]) if word in known][:MAX_WORDS]
        if not words:
            return []
        scores = self._bm25.get_scores(words)
        order = np.argsort(-scores, kind="stable")[:count]
        return [self.passages[at] for at in order if scores[at] > 0]


def cut(text: str, tokenizer) -> list[str]:
    """The passages of a text, in order; they end where paragraphs or sentences do."""
    settings = ChunkSettings(max_tokens=PASSAGE_TOKENS)
    return [chunk.text for part in stretches([text])
            for chunk in chunk_document(Document("", "", part), tokenizer, settings)]


def _words(texts: list[str]) -> list[list[str]]:
    return bm25s.tokenize(texts, token_pattern=WORDS, stopwords="en", return_ids=False, show_progress=False)
