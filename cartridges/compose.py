"""Composes several cartridges into one: their slots side by side, with one attention sink.

A cartridge is trained with questions that start at position `p`, right after its last slot. With RoPE only
distances matter, so the keys of every cartridge are rotated until its last slot is right before the first question
token of the composition. Each cartridge is then seen at the distances it was trained at, whatever else is loaded,
and an engine starts the conversation at the total number of slots, as usual.

The first slots of a cartridge are the frozen sink. A composition keeps only the sink of the first cartridge (at
eight cartridges, keeping all sinks cost half of the accuracy in a reproduction by others).
"""

import hashlib
from collections.abc import Sequence

import torch

from cartridges.cartridge import Cartridge


def composed_tokens(sizes: Sequence[tuple[int, int]]) -> int:
    """Number of slots in a composition of cartridges with `(num_tokens, num_frozen_tokens)` each."""
    return sum(tokens - (frozen if index else 0) for index, (tokens, frozen) in enumerate(sizes))


def composed_digest(digests: Sequence[str]) -> str:
    """The digest of a composition of cartridges with these digests, in order."""
    return hashlib.sha256("+".join(digests).encode()).hexdigest()


def compose(cartridges: Sequence[Cartridge], frequencies: torch.Tensor) -> Cartridge:
    """One cartridge with the slots of all `cartridges`, starting with the sink of the first.

    `frequencies` float32 `[head_dim / 2]` are the model's RoPE frequencies in radians per position
    (`cartridges.models.rope_frequencies`). Raises `ValueError` for no cartridges or different shapes.
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
    """`keys` `[..., head_dim]` after RoPE, moved by `positions`: a rotation in each of RoPE's planes.

    A plane pairs dimension `i` with `i + head_dim / 2`, as in Llama- and Qwen-type models. The factor that
    some RoPE variants (YaRN) apply to keys is already in them and unchanged.
    """
    if positions == 0:
        return keys
    angles = (positions * frequencies.double()).to(keys.device)
    cos, sin = angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)
    left, right = keys.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
