"""Several cartridges as one: their slots side by side, one attention sink, each where it was trained.

A cartridge is trained with its questions starting at position `p`, right behind its last slot. RoPE
makes only distances matter, so keys are turned until the last slot of every cartridge stands right
before the first question token of the whole: each is then seen from the distances it was trained at,
whatever else is loaded, and an engine need only start at the number of slots, as it always does.

The first slots of a cartridge are the frozen sink. A model takes one; the sinks of all but the first
cartridge are dropped (several cost half of the accuracy at eight cartridges, others found).
"""

import hashlib
from collections.abc import Sequence

import torch

from cartridges.cartridge import Cartridge


def composed_tokens(sizes: Sequence[tuple[int, int]]) -> int:
    """Slots of a composition of cartridges with `(num_tokens, num_frozen_tokens)` each."""
    return sum(tokens - (frozen if index else 0) for index, (tokens, frozen) in enumerate(sizes))


def composed_digest(digests: Sequence[str]) -> str:
    """The digest of a composition of cartridges with these digests, in order."""
    return hashlib.sha256("+".join(digests).encode()).hexdigest()


def compose(cartridges: Sequence[Cartridge], frequencies: torch.Tensor) -> Cartridge:
    """One cartridge that holds all of `cartridges`, the first one's sink in front.

    `frequencies` float32 `[head_dim / 2]` are the model's RoPE frequencies in radians a position
    (`cartridges.models.rope_frequencies`). Raises `ValueError` for none, or for different shapes.
    """
    if not cartridges or any(one.shape != cartridges[0].shape for one in cartridges):
        raise ValueError(f"cannot compose cartridges of shapes {[one.shape for one in cartridges]}")
    total = composed_tokens([(one.num_tokens, one.num_frozen_tokens) for one in cartridges])
    keys, values = [], []
    for index, cartridge in enumerate(cartridges):
        start = cartridge.num_frozen_tokens if index else 0
        own_keys, own_values = cartridge.keys_values()
        keys.append(rotate(own_keys[:, :, start:], frequencies, total - cartridge.num_tokens))
        values.append(own_values[:, :, start:])
    return Cartridge(torch.cat(keys, dim=2), torch.cat(values, dim=2), cartridges[0].num_frozen_tokens)


def rotate(keys: torch.Tensor, frequencies: torch.Tensor, positions: int) -> torch.Tensor:
    """`keys` `[..., head_dim]` after RoPE, moved by `positions`: a rotation of each of RoPE's planes.

    Planes pair dimension `i` with `i + head_dim / 2`, as Llama- and Qwen-type models do. A factor that
    some RoPE variants put on keys (YaRN) is in them already and stays.
    """
    if positions == 0:
        return keys
    angles = (positions * frequencies.double()).to(keys.device)
    cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
    left, right = keys.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
