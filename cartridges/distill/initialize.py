"""Initialisation of a cartridge (arXiv 2506.06266, section on initialisation).

Measured there on LongHealth: KV of the corpus prefix 55.3, of unrelated text 51.3, random 29.9.
"""

import numpy as np
import torch

from cartridges import artifact
from cartridges.cartridge import Cartridge
from cartridges.config import TrainSettings
from cartridges.distill.attention_matching import match_attention
from cartridges.errors import UserError
from cartridges.forward import prefill
from cartridges.models import BaseModel

UNRELATED = ("Water boils when it is hot enough, and what rises from the pot is steam. A kettle that has no "
             "lid loses heat to the room. Bread keeps longer in a cloth than in the open air. ")
CHUNK_TOKENS = 64
MOST_CHARACTERS = 2**22
"""Most characters of the corpus that are given to `initialize` (`Corpus.spread`); every method reads fewer tokens."""


def initialize(base: BaseModel, text: str, settings: TrainSettings, seed: int) -> Cartridge:
    """A cartridge for the corpus `text`, initialised by `settings.init`. It has `settings.num_tokens` slots, or as many
    as `settings.init_cartridge`.

    Raises `UserError` where the corpus is shorter than p (compaction would be expansion).
    """
    if settings.init == "cartridge":
        before = artifact.load(settings.init_cartridge).cartridge.to(base.device)
        return before.with_frozen_layers(frozen_layers(before.shape.num_layers, settings))
    if settings.init == "attention_matching":
        _check_length(len(base.template.system_ids(text)), settings.num_tokens)
        matched = match_attention(base, text, settings.num_tokens, settings.stretch_tokens,
                                  settings.num_frozen_tokens)
        return Cartridge(*matched, settings.num_frozen_tokens, frozen_layers(len(matched[0]), settings))
    ids = start_ids(base, text, settings, seed)
    kv = prefill(base.model, ids)
    keys, values = kv.keys.float(), kv.values.float()
    if settings.init == "random":
        keys, values = _random_like(keys, seed), _random_like(values, seed + 1)
        # The sink stays what it is: the KV of the first template token.
        keys[:, :, :1], values[:, :, :1] = kv.keys[:, :, :1].float(), kv.values[:, :, :1].float()
    return Cartridge(keys, values, settings.num_frozen_tokens, frozen_layers(len(keys), settings))


def frozen_layers(num_layers: int, settings: TrainSettings) -> int:
    """Number of layers, from the bottom, that `settings.trained_layers` leaves untrained."""
    return num_layers - max(1, round(settings.trained_layers * num_layers))


def start_ids(base: BaseModel, text: str, settings: TrainSettings, seed: int) -> list[int]:
    """The `p` token ids whose KV is the initialisation: a closed system turn."""
    p = settings.num_tokens
    if settings.init == "unrelated":
        return _closed_turn(base, UNRELATED * (p // 20 + 1), p)
    if settings.init == "sampled_chunks" and len(base.template.system_ids(text)) > p:
        return _closed_turn(base, _sample_chunks(base, text, p, seed), p)
    return _closed_turn(base, text, p)


def _closed_turn(base: BaseModel, text: str, p: int) -> list[int]:
    """The system turn around `text`, shortened in its middle to exactly `p` tokens."""
    full, empty = base.template.system_ids(text), base.template.system_ids("")
    _check_length(len(full), p)
    tail = _common_end(full, empty)
    if p <= tail + 1:
        raise UserError(f"num_tokens={p} is too small: the chat template alone takes {len(empty)} tokens")
    return full[: p - tail] + full[len(full) - tail:]


def _check_length(tokens: int, p: int) -> None:
    if tokens < p:
        raise UserError(f"the corpus has {tokens} tokens, fewer than num_tokens={p}; choose a smaller "
                        "--num-tokens (a tenth of the corpus is a good start)")


def _common_end(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def _sample_chunks(base: BaseModel, text: str, p: int, seed: int) -> str:
    """At least `p` tokens in chunks of about `CHUNK_TOKENS`, in order: a random one of each of as many equal parts."""
    ids = base.tokenizer.encode(text, add_special_tokens=False)
    count = max(1, round(p / CHUNK_TOKENS))
    length = -(-p // count) + 1  # one more, because joined text may take fewer tokens than its parts
    parts = np.arange(count) + np.random.default_rng(seed).random(count)
    starts = (parts / count * max(0, len(ids) - length)).astype(int).tolist()
    return "\n".join(base.tokenizer.decode(ids[start:start + length]) for start in starts)


def _random_like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Normal vectors with each layer's and head's mean and standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
    return tensor.mean(dim=2, keepdim=True) + noise * tensor.std(dim=2, keepdim=True)
