"""Composed cartridges are the model's own KV side by side, and every slot stands where it should."""

import pytest
import torch
from transformers import DynamicCache

from cartridges.cartridge import Cartridge
from cartridges.compose import compose, composed_tokens, rotate
from cartridges.models import ModelIdentity, rope_frequencies

SIZES = (9, 14, 6)


def kv_at(model, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own KV of `ids` read from position `start` on."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[None], position_ids=start + torch.arange(len(ids))[None], past_key_values=cache)
    return tuple(torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in ("keys", "values"))


def identity_of(model) -> ModelIdentity:
    config = model.config
    return ModelIdentity("tiny", "", "", "", "", dict(config.rope_parameters), 2, 2, 16, config.vocab_size,
                         config.max_position_embeddings)


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 300, (size,), generator=generator) for size in SIZES]


def test_it_is_the_concatenation_by_hand(any_tiny_model, texts):
    model = any_tiny_model
    composed = compose([Cartridge(*kv_at(model, ids, 0)) for ids in texts], rope_frequencies(identity_of(model)))
    total = 9 + 13 + 5
    assert composed.num_tokens == total == composed_tokens([(size, 1) for size in SIZES])
    assert composed.num_frozen_tokens == 1
    # By hand: each text read where its last token stands at total - 1, without the sinks of all but one.
    by_hand = [kv_at(model, ids, total - len(ids)) for ids in texts]
    for kind, tensor in enumerate(composed.keys_values()):
        expected = torch.cat([kv[kind][:, :, 1 if index else 0:] for index, kv in enumerate(by_hand)], dim=2)
        torch.testing.assert_close(tensor, expected, atol=2e-5, rtol=1e-4)


def test_each_is_seen_from_where_it_was_trained(tiny_model, texts):
    """What a query makes of one cartridge's keys does not depend on what else is loaded."""
    parts = [Cartridge(*kv_at(tiny_model, ids, 0)) for ids in texts]
    frequencies = rope_frequencies(identity_of(tiny_model))
    composed = compose(parts, frequencies)
    query = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for part, slots in zip(parts[1:], (slice(9, 22), slice(22, 27)), strict=True):
        alone = part.keys_values()[0][:, :, 1:] @ rotate(query, frequencies, part.num_tokens)
        together = composed.keys_values()[0][:, :, slots] @ rotate(query, frequencies, composed.num_tokens)
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


def test_one_alone_is_unchanged(tiny_model, texts):
    alone = Cartridge(*kv_at(tiny_model, texts[0], 0), num_frozen_tokens=3)
    composed = compose([alone], rope_frequencies(identity_of(tiny_model)))
    assert all(torch.equal(one, other) for one, other in
               zip(composed.keys_values(), alone.keys_values(), strict=True))
    assert composed.num_frozen_tokens == 3


def test_other_shapes_are_refused(tiny_model, texts):
    frequencies = rope_frequencies(identity_of(tiny_model))
    keys, values = kv_at(tiny_model, texts[0], 0)
    for wrong in ([], [Cartridge(keys, values), Cartridge(keys[:1], values[:1])]):
        with pytest.raises(ValueError, match="cannot compose"):
            compose(wrong, frequencies)
