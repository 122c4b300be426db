"""What is to be generated: a deterministic list of tasks, before any model is loaded."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from cartridges.config import SynthesizeSettings
from cartridges.errors import UserError
from cartridges.records import Chunk, Task
from cartridges.selfstudy import general
from cartridges.selfstudy.families import DEFAULT_MIXTURE, FAMILIES, decodes

_PIECE = re.compile(r"\d|[^\W\d]+|[^\w\s]")
"""About a token, whatever the tokenizer. Characters would slight tables, which say more in fewer."""


def plan(chunks: Iterable[Chunk], settings: SynthesizeSettings, seed: int,
         weights: Mapping[str, float] | None = None,
         before: Mapping[tuple[str, str], int] | None = None) -> list[Task]:
    """`settings.num_conversations` tasks; a function of its arguments and of nothing else.

    Every chunk gets conversations in proportion to its length in tokens, times its weight where `weights` has one
    by its id (systematic sampling: edges as often as the middle), every family its share. Tasks of a
    chunk stand together, so that those in flight share its prefill; those for which a model has to
    write come last, the general ones at the end. `before` counts the tasks that there were already, by chunk and
    family: ordinals go on from there, and so does a family's way through the chunk. One pass over `chunks`, of which
    none is kept. Raises `UserError` for a family that does not exist.
    """
    count = round(settings.num_conversations * settings.general_share)
    about_chunks = _about_chunks(chunks, settings, settings.num_conversations - count, seed, weights or {},
                                 Counter(before or {}))
    return about_chunks + (_general(count, seed) if about_chunks else [])


def _general(count: int, seed: int) -> list[Task]:
    rng = np.random.default_rng([seed, 1])
    first, seeds = int(rng.integers(0, 2**31)), rng.integers(0, 2**62, size=count)
    return [Task(_task_id(seed, i, "", general.NAME), "", general.NAME, int(seeds[i]), first + i)
            for i in range(count)]


def _about_chunks(chunks: Iterable[Chunk], settings: SynthesizeSettings, total: int, seed: int,
                  weights: Mapping[str, float], made: Counter[tuple[str, str]]) -> list[Task]:
    shares = settings.families or DEFAULT_MIXTURE
    unknown = sorted(set(shares) - set(FAMILIES))
    if unknown:
        raise UserError(f"seed family {unknown[0]!r} does not exist; there are {', '.join(sorted(FAMILIES))}")
    ids, lengths = [], []
    for chunk in chunks:
        ids.append(chunk.chunk_id)
        lengths.append(len(_PIECE.findall(chunk.text)) * weights.get(chunk.chunk_id, 1.0))
    if not ids or not sum(shares.values()):
        return []
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths) / sum(lengths)
    points = (np.arange(total) + rng.random()) / max(total, 1)
    owners = np.minimum(np.searchsorted(ends, points, side="right"), len(ids) - 1)
    names = sorted(shares)
    weights = np.array([shares[name] for name in names], float)
    families = rng.choice(len(names), size=total, p=weights / weights.sum())
    seeds = rng.integers(0, 2**62, size=total)
    tasks: list[Task] = []
    for i, (owner, family, task_seed) in enumerate(zip(owners, families, seeds, strict=True)):
        of = (ids[owner], names[family])
        tasks.append(Task(_task_id(seed, i, *of), *of, int(task_seed), made[of]))
        made[of] += 1
    return sorted(tasks, key=lambda task: decodes(task.seed_family))


def _task_id(seed: int, index: int, chunk_id: str, family: str) -> str:
    return hashlib.sha256(f"{seed}:{index}:{chunk_id}:{family}".encode()).hexdigest()[:20]
