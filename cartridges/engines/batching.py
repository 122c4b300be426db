"""Which requests share a forward pass: groups of one prefix, in a few recurring shapes."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Requests (by index) that share a prefix; they fill `rows` rows, the rest of them idle."""

    prefix: Hashable
    indices: tuple[int, ...]
    rows: int


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pieces(prefixes: Sequence[Hashable], lengths: Sequence[int], max_rows: int) -> list[Piece]:
    """Split each prefix' requests, in order of length, into pieces of at most `max_rows`."""
    groups: dict[Hashable, list[int]] = {}
    for index in sorted(range(len(prefixes)), key=lambda i: lengths[i]):
        groups.setdefault(prefixes[index], []).append(index)
    made = []
    for prefix, indices in groups.items():
        for start in range(0, len(indices), max_rows):
            part = tuple(indices[start:start + max_rows])
            made.append(Piece(prefix, part, power_of_two(len(part))))
    return made


def batches(all_pieces: Sequence[Piece], max_rows: int) -> Iterator[list[Piece]]:
    """Batches of pieces with equally many rows, `max_rows` rows at most together."""
    by_rows: dict[int, list[Piece]] = {}
    for piece in all_pieces:
        by_rows.setdefault(piece.rows, []).append(piece)
    for rows, same in sorted(by_rows.items()):
        step = max(1, max_rows // rows)
        for start in range(0, len(same), step):
            yield same[start:start + step]
