"""Groups requests into forward passes by prefix, in a few recurring shapes."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Piece:
    """Requests (by index) that share a prefix, in `rows` rows of a batch; rows without a request are idle.
    `longest` is the length in tokens of the longest request."""

    prefix: Hashable
    indices: tuple[int, ...]
    rows: int
    longest: int


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pieces(prefixes: Sequence[Hashable], lengths: Sequence[int], max_rows: int) -> list[Piece]:
    """Split the requests of each prefix, in order of length, into pieces of at most `max_rows`."""
    groups: dict[Hashable, list[int]] = {}
    for index in sorted(range(len(prefixes)), key=lambda i: lengths[i]):
        groups.setdefault(prefixes[index], []).append(index)
    made = []
    for prefix, indices in groups.items():
        for start in range(0, len(indices), max_rows):
            part = tuple(indices[start:start + max_rows])
            made.append(Piece(prefix, part, power_of_two(len(part)), lengths[part[-1]]))
    return made


def decoding_pieces(prefixes: Sequence[Hashable], lengths: Sequence[int], max_rows: int) -> list[Piece]:
    """Like `pieces`, but all pieces have the same number of rows: the one that gives the fewest batches.

    Each decoding step reads all of the model's weights whatever the number of rows, so few large batches beat many
    small ones (docs/log.md).
    """
    sizes = Counter(prefixes).values()

    def passes(rows: int) -> int:
        return -(-sum(-(-size // rows) for size in sizes) // (max_rows // rows))

    choices = [1 << i for i in range(max_rows.bit_length())]
    rows = min(choices, key=lambda rows: (passes(rows), -rows))
    return [replace(piece, rows=rows) for piece in pieces(prefixes, lengths, rows)]


def batches(all_pieces: Sequence[Piece], max_rows: int) -> Iterator[list[Piece]]:
    """Batches of pieces that have the same number of rows and similar lengths, with at most `max_rows` rows each."""
    by_rows: dict[int, list[Piece]] = {}
    for piece in sorted(all_pieces, key=lambda piece: piece.longest):
        by_rows.setdefault(piece.rows, []).append(piece)
    for rows, same in sorted(by_rows.items()):
        step = max(1, max_rows // rows)
        for start in range(0, len(same), step):
            yield same[start:start + step]


def common_starts(prefixes: Sequence[Hashable], inputs: Sequence[Sequence[int]], limits: Sequence[int],
                  shortest: int = 16) -> list[int]:
    """How many leading tokens each request shares with others after the same prefix.

    These tokens (example turns, say) are computed only once. `limits` is the maximum for each request; shared
    starts shorter than `shortest` are not worth it and count as 0.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, (prefix, ids) in enumerate(zip(prefixes, inputs, strict=True)):
        groups.setdefault((prefix, tuple(ids[:shortest])), []).append(index)
    starts = [0] * len(inputs)
    for members in groups.values():
        if len(members) > 1:
            length = min(limits[index] for index in members)
            first = inputs[members[0]]
            for index in members[1:]:
                length = _agreement(first, inputs[index], length)
            for index in members:
                starts[index] = length if length >= shortest else 0
    return starts


def _agreement(a: Sequence[int], b: Sequence[int], most: int) -> int:
    for position in range(most):
        if a[position] != b[position]:
            return position
    return most
