"""Near duplicates: texts that share most of their word pairs with an earlier text.

MinHash with banding (datasketch) finds candidates, and the exact Jaccard similarity decides. So no text below the
threshold is dropped, and nearly every one above it is found.
"""

from collections.abc import Iterable

from cartridges.selfstudy.languages import spaced

PERMUTATIONS = 128
RECALL_MARGIN = 0.8
"""The index searches down to this share of the threshold, since MinHash only estimates the similarity."""


def near_duplicates(texts: Iterable[tuple[str, str]], similarity: float) -> set[str]:
    """Ids of those `(id, text)` whose similarity to an earlier one that is kept is at least `similarity`."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=max(0.05, similarity * RECALL_MARGIN), num_perm=PERMUTATIONS)
    kept: dict[str, frozenset[str]] = {}
    repeated = set()
    for name, text in texts:
        pairs = word_pairs(text)
        sketch = MinHash(PERMUTATIONS)
        sketch.update_batch([pair.encode() for pair in sorted(pairs)])
        if any(jaccard(pairs, kept[other]) >= similarity for other in index.query(sketch)):
            repeated.add(name)
        else:
            index.insert(name, sketch)
            kept[name] = pairs
    return repeated


def word_pairs(text: str) -> frozenset[str]:
    """Pairs of neighbouring words in `text`, without case and spaces; for a single word, that word."""
    words = spaced(text.casefold()).split()
    return frozenset(f"{a} {b}" for a, b in zip(words, words[1:], strict=False)) or frozenset(words)


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Jaccard similarity: the size of the intersection over that of the union."""
    return len(left & right) / max(len(left | right), 1)
