"""The KL that a cartridge has left to its teacher, by chunk. It decides where a curriculum adds conversations."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from cartridges.config import TrainSettings
from cartridges.distill.packing import collate, plan_packs
from cartridges.distill.student import Student
from cartridges.records import Conversation


@torch.no_grad()
def remaining_kl(student: Student, conversations: Sequence[Conversation], settings: TrainSettings, seed: int,
                 device="cpu", most: int = 32) -> dict[str, float]:
    """Mean tailed KL to what is trained for (nats an answer token) by chunk id, over at most `most`
    conversations of each, drawn by `seed`. General conversations belong to no chunk and are left out.
    `student` is one for distillation.
    """
    by_chunk: dict[str, list[Conversation]] = {}
    for index in np.random.default_rng([seed, 3]).permutation(len(conversations)):
        members = by_chunk.setdefault(conversations[index].chunk_id, [])
        if len(members) < most:
            members.append(conversations[index])
    return {chunk: _mean_kl(student, members, settings, seed, device)
            for chunk, members in sorted(by_chunk.items()) if chunk}


def _mean_kl(student: Student, members: Sequence[Conversation], settings: TrainSettings, seed: int,
             device) -> float:
    sums = [student(collate(members, plan, settings.pack_tokens, settings.label_share).to(device))
            for plan in plan_packs(members, settings.row_tokens, settings.pack_tokens, seed)]
    return sum(float(one.kl) for one in sums) / max(sum(float(one.count) for one in sums), 1.0)


def chunk_weights(kl: Mapping[str, float], sharpness: float) -> dict[str, float]:
    """How many conversations a chunk gets for its length, relative to the mean: its KL to that power.

    At most four times and at least a quarter of the mean, so that no chunk is forgotten and none drowns
    the others. Chunks that are not in `kl` count as the mean.
    """
    values = np.maximum(np.array(list(kl.values()), float), 0.0) ** sharpness
    mean = values.mean() if len(values) and values.mean() > 0 else 1.0
    return {chunk: float(np.clip(value / mean, 0.25, 4.0)) for chunk, value in zip(kl, values, strict=True)}
