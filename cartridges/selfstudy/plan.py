"""What is to be generated: a deterministic list of tasks, before any model is loaded."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from cartridges.config import SynthesizeSettings
from cartridges.errors import UserError
from cartridges.records import Chunk
from cartridges.selfstudy import general
from cartridges.selfstudy.families import DEFAULT_MIXTURE, ENGLISH_RULES, FAMILIES, OTHER_MIXTURE, decodes
from cartridges.selfstudy.languages import SYLLABLES, is_english

_PIECE = re.compile(rf"\d|[{SYLLABLES}]|[^\W\d{SYLLABLES}]+|[^\w\s]")
"""About a token, whatever the tokenizer. Characters would slight tables, which say more in fewer."""


@dataclass(frozen=True)
class Task:
    """One conversation to make. `seed` is its private source of chance; `ordinal` counts the tasks of
    the same family for the same chunk, so that a family can go through a chunk statement by statement.
    A general conversation is about no chunk: its `chunk_id` is empty."""

    conversation_id: str
    chunk_id: str
    seed_family: str
    seed: int
    ordinal: int = 0


def plan(chunks: Iterable[Chunk], settings: SynthesizeSettings, seed: int,
         weights: Mapping[str, float] | None = None,
         before: Mapping[tuple[str, str], int] | None = None) -> list[Task]:
    """`settings.num_conversations` tasks; a function of its arguments and of nothing else.

    Every chunk gets conversations in proportion to its length in tokens, times its weight where `weights` has one
    by its id (systematic sampling: edges as often as the middle), every family its share. Tasks of a
    chunk stand together, so that those in flight share its prefill; those for which a model has to
    write come last, the general ones at the end. `before` counts the tasks that there were already, by chunk and
    family: ordinals go on from there, and so does a family's way through the chunk. One pass over `chunks`, of which
    none is kept. Where a chunk is not English, the share of the families that ask by rules of English goes to others.
    Raises `UserError` for a family that does not exist.
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
