"""Plans a deterministic list of tasks before any model is loaded."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from cartridges.config import SynthesizeSettings
from cartridges.errors import UserError
from cartridges.records import Chunk, Task
from cartridges.selfstudy import general
from cartridges.selfstudy.families import DEFAULT_MIXTURE, ENGLISH_RULES, FAMILIES, OTHER_MIXTURE, decodes
from cartridges.selfstudy.languages import SYLLABLES, is_english

_PIECE = re.compile(rf"\d|[{SYLLABLES}]|[^\W\d{SYLLABLES}]+|[^\w\s]")
"""About one token of any tokenizer. Counting characters would underrate tables, which are denser than prose."""


def plan(chunks: Iterable[Chunk], settings: SynthesizeSettings, seed: int,
         weights: Mapping[str, float] | None = None,
         before: Mapping[tuple[str, str], int] | None = None) -> list[Task]:
    """`settings.num_conversations` tasks, determined by the arguments alone.

    A chunk gets conversations in proportion to its length in tokens, times its weight in `weights` (by chunk id; 1 if
    missing), by systematic sampling; a family gets its share. For a chunk that is not English, the share of the
    families with rules of English goes to others. Tasks of a chunk are adjacent, so that they share its prefill. Tasks
    for which a model has to write come last, and the general ones at the very end. `before` counts earlier tasks by
    chunk and family; ordinals continue from there, so a family continues through the chunk. `chunks` is iterated once
    and not stored. Raises `UserError` for an unknown family.
    """
    count = round(settings.num_conversations * settings.general_share)
    if settings.num_conversations and count == settings.num_conversations:
        raise UserError(f"synthesize.general_share={settings.general_share:g} of {count} conversations leaves none "
                        "about the corpus; lower it")
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
    ids, lengths, english = [], [], []
    for chunk in chunks:
        ids.append(chunk.chunk_id)
        english.append(is_english(chunk.text))
        lengths.append(len(_PIECE.findall(chunk.text)) * weights.get(chunk.chunk_id, 1.0))
    if not ids:
        return []
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths) / sum(lengths)
    points = (np.arange(total) + rng.random()) / max(total, 1)
    owners = np.minimum(np.searchsorted(ends, points, side="right"), len(ids) - 1)
    names = sorted(shares)
    weights = np.array([shares[name] for name in names], float)
    families = rng.choice(len(names), size=total, p=weights / weights.sum())
    seeds = rng.integers(0, 2**62, size=total)
    elsewhere = _elsewhere(settings.families, total, seed)
    tasks: list[Task] = []
    for i, (owner, family, task_seed) in enumerate(zip(owners, families, seeds, strict=True)):
        fits = english[owner] or names[family] not in ENGLISH_RULES
        of = (ids[owner], names[family] if fits else elsewhere[i] or names[family])
        tasks.append(Task(_task_id(seed, i, *of), *of, int(task_seed), made[of]))
        made[of] += 1
    return sorted(tasks, key=lambda task: decodes(task.seed_family))


def _elsewhere(given: Mapping[str, float], total: int, seed: int) -> list[str | None]:
    """For each task the family in place of one whose rules do not fit; None where the shares that were `given` have no
    other."""
    shares = {name: share for name, share in (given or OTHER_MIXTURE).items() if share and name not in ENGLISH_RULES}
    if not shares:
        return [None] * total
    names, weights = sorted(shares), np.array([shares[name] for name in sorted(shares)])
    return np.random.default_rng([seed, 2]).choice(names, size=total, p=weights / weights.sum()).tolist()


def _task_id(seed: int, index: int, chunk_id: str, family: str) -> str:
    return hashlib.sha256(f"{seed}:{index}:{chunk_id}:{family}".encode()).hexdigest()[:20]
