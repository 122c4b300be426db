"""The arms of a report card: the prefix before the questions, and its number of KV slots.

    closed_book      the base model alone, for its knowledge without the corpus
    full_context     the corpus as a system turn (cut to the model's window)
    truncated        the beginning of the corpus that fits in the cartridge's p slots
    cartridge        the cartridge
    wrong_cartridge  a cartridge of another text, for the effect of *any* cartridge
    exact_kv         full_context's KV as a cartridge; the results must equal full_context
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cartridges.cartridge import Cartridge
from cartridges.config import Arm
from cartridges.engines.base import CartridgePrefix, Prefix, TextPrefix
from cartridges.errors import UserError
from cartridges.evaluation.decoy import DECOY
from cartridges.models import BaseModel
from cartridges.records import Corpus
from cartridges.template import MAX_CHARACTERS_PER_TOKEN

CORPUS_ARMS = frozenset({"full_context", "truncated", "exact_kv"})
"""Arms that need the corpus' text."""


@dataclass(frozen=True)
class ArmPrefix:
    """`prefix` takes `num_tokens` KV slots. If the corpus did not fit in the window, `truncated_to_window` is the
    number of slots that were available for it."""

    arm: Arm
    prefix: Prefix
    num_tokens: int
    truncated_to_window: int | None = None


def build_arm(arm: Arm, base: BaseModel, cartridge: CartridgePrefix, wrong: CartridgePrefix | None,
              corpus_text: str | None, room: int) -> ArmPrefix:
    """The prefix of `arm`. `room` is the maximum number of tokens for question and answer after it.

    `wrong` None uses the decoy. Raises `UserError` if an arm of `CORPUS_ARMS` has no `corpus_text`,
    or if the window is too small.
    """
    check_arms([arm], has_text=corpus_text is not None)
    if arm == "closed_book":
        return ArmPrefix(arm, None, len(base.template.default_ids()))
    if arm == "cartridge":
        return _of_cartridge(arm, cartridge)
    if arm == "wrong_cartridge":
        return _of_cartridge(arm, wrong or decoy_cartridge(base, cartridge.cartridge.num_tokens))
    if arm == "truncated":
        text = base.template.cut(corpus_text, cartridge.cartridge.num_tokens)
        return ArmPrefix(arm, TextPrefix(text), len(base.template.system_ids(text)))
    text, cut = _fit_window(base, corpus_text, room)
    if arm == "exact_kv":
        exact = exact_cartridge(base, text)
        return ArmPrefix(arm, exact, exact.cartridge.num_tokens, cut)
    return ArmPrefix(arm, TextPrefix(text), len(base.template.system_ids(text)), cut)


def text_for_arms(corpus: Corpus, base: BaseModel) -> str:
    """The part of the corpus' text that the arms may need."""
    return corpus.beginning(MAX_CHARACTERS_PER_TOKEN * base.identity.max_position_embeddings)


def check_arms(arms: Sequence[Arm], has_text: bool) -> None:
    """Raise `UserError` for an arm that needs a corpus text if there is none."""
    needy = [arm for arm in arms if arm in CORPUS_ARMS]
    if needy and not has_text:
        raise UserError(f"arm {needy[0]} needs the corpus text; give it with --corpus, or leave the arm "
                        "out with --arms")


def exact_cartridge(base: BaseModel, text: str) -> CartridgePrefix:
    """The untrained KV of `text`'s system turn as a cartridge, computed with Hugging Face's own cache.

    It does not use the engine's prefill, because the arm must reveal errors in the engine's prefix path.
    """
    import torch
    from transformers import DynamicCache

    ids = base.template.system_ids(text)
    cache = DynamicCache(config=base.model.config)
    with torch.no_grad():
        base.model.base_model(input_ids=torch.tensor([ids], device=base.device), past_key_values=cache,
                              use_cache=True)
    keys = torch.stack([layer.keys[0] for layer in cache.layers])
    values = torch.stack([layer.values[0] for layer in cache.layers])
    digest = hashlib.sha256(f"exact:{base.identity.weights_digest}:{ids}".encode()).hexdigest()
    return CartridgePrefix(Cartridge(keys, values, num_frozen_tokens=len(ids)), digest)


def decoy_cartridge(base: BaseModel, num_tokens: int) -> CartridgePrefix:
    """The exact KV of the bundled unrelated text, cut to at most `num_tokens` slots."""
    return exact_cartridge(base, base.template.cut(DECOY, num_tokens))


def window_room(base: BaseModel, conversations: Sequence[Sequence[int]], max_answer_tokens: int) -> int:
    """Tokens to reserve after any prefix: for the longest of `conversations` and an answer."""
    return max(len(ids) for ids in conversations) + max_answer_tokens


def _of_cartridge(arm: Arm, prefix: CartridgePrefix) -> ArmPrefix:
    return ArmPrefix(arm, prefix, prefix.cartridge.num_tokens)


def _fit_window(base: BaseModel, text: str, room: int) -> tuple[str, int | None]:
    limit = base.identity.max_position_embeddings - room
    if limit <= len(base.template.system_ids("")):
        raise UserError(f"the longest question takes {room} tokens with its answer and leaves no room in "
                        f"{base.identity.name}'s window of {base.identity.max_position_embeddings}")
    if len(base.template.system_ids(text)) <= limit:
        return text, None
    return base.template.cut(text, limit), limit
