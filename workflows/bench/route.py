"""How often `model: "auto"` finds the corpus that a question belongs to."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cartridges.corpus import corpus_ids, load_corpus
from cartridges.errors import UserError
from cartridges.readers import ROW_SUFFIXES
from cartridges.records import Corpus
from workflows.serving.passages import PassageIndex, cut


def bench_route(sources: list[str], tokenizer, max_questions: int, seed: int = 0) -> dict[str, Any]:
    """Ask every corpus' own questions of an index over all of them.

    `sources`: `FILE` (a JSONL: every row is a corpus) or `PATH::ID` (one corpus, or by shell pattern several
    rows joined to one). At most `max_questions` of each are drawn by `seed`. Raises `UserError` for fewer than
    two corpora and for one without questions.
    """
    corpora = [corpus for source in sources for corpus in _load(source)]
    _check(corpora)
    started = time.perf_counter()
    index = PassageIndex([cut(corpus.text, tokenizer) for corpus in corpora])
    indexed = time.perf_counter()
    rng = np.random.default_rng(seed)
    found = [_found(index, owner, corpus, max_questions, rng) for owner, corpus in enumerate(corpora)]
    took = time.perf_counter() - indexed
    shares = {corpus.corpus_id: float(np.mean(hits)) for corpus, hits in zip(corpora, found, strict=True)}
    total = sum(map(len, found))
    return {"corpora": len(corpora), "passages": len(index.passages), "questions": total,
            "index_s": indexed - started, "question_ms": 1000 * took / total,
            "accuracy": sum(map(sum, found)) / total, "chance": 1 / len(corpora), "by_corpus": shares}


def _load(source: str) -> list[Corpus]:
    path, _, corpus_id = source.partition("::")
    if corpus_id or Path(path).suffix.lower() not in ROW_SUFFIXES:
        return [load_corpus(path, corpus_id or None)]
    return [load_corpus(path, row) for row in dict.fromkeys(corpus_ids(path))]


def _check(corpora: list[Corpus]) -> None:
    if len(corpora) < 2:
        raise UserError("bench route needs at least two corpora: a JSONL of several, or several files")
    twice = [name for name, count in Counter(corpus.corpus_id for corpus in corpora).items() if count > 1]
    if twice:
        raise UserError(f"corpus {twice[0]} is given twice")
    for corpus in corpora:
        if not corpus.questions:
            raise UserError(f"corpus {corpus.corpus_id} has no questions; bench route asks each corpus' own")


def _found(index: PassageIndex, owner: int, corpus: Corpus, most: int, rng: np.random.Generator) -> list[bool]:
    order = rng.permutation(len(corpus.questions))[:most]
    best = [index.best(corpus.questions[at].question, 1) for at in order]
    return [bool(passages) and passages[0].owner == owner for passages in best]
