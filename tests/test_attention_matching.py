"""Slots in closed form: as many as the corpus has are the corpus' own KV, fewer answer its queries best."""

import pytest
import torch

from cartridges.config import TrainSettings
from cartridges.distill import attention_matching
from cartridges.distill.attention_matching import match_attention
from cartridges.distill.initialize import initialize
from cartridges.engines.base import CartridgePrefix, ScoreRequest, TextPrefix
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import UserError
from cartridges.forward import prefill
from cartridges.models import load_base_model

TEXT = "".join(f"Lot {i}: {i * 37 % 101} crates of {name} from berth {i * 13 % 17}. "
               for i, name in enumerate(["tar", "wool", "salt", "rope", "hops", "slate"] * 5))


@pytest.fixture(scope="module", params=["llama", "qwen3-untied"])
def any_base(request, tiny_base_model, tiny_qwen3_dir):
    from cartridges.config import ModelSettings

    if request.param == "llama":
        return tiny_base_model
    return load_base_model(ModelSettings(name=str(tiny_qwen3_dir), dtype="float32"), device="cpu")


def test_with_a_slot_for_every_token_it_is_the_exact_kv(any_base):
    ids = any_base.template.system_ids(TEXT)
    keys, values = match_attention(any_base, TEXT, len(ids), stretch_tokens=4096)
    exact = prefill(any_base.model, ids)
    torch.testing.assert_close(keys, exact.keys.float(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(values, exact.values.float(), atol=1e-3, rtol=1e-2)


def test_fewer_slots_say_what_the_whole_text_says_better_than_its_beginning_does(any_base):
    """Mean squared difference of the text's own logprobs to those with the whole text in context."""
    engine, rows = TransformersEngine(any_base), any_base.tokenizer.encode(TEXT, add_special_tokens=False)[:120]

    def logprobs(prefix) -> torch.Tensor:
        mask = (True,) * (len(rows) - 1) + (False,)
        return torch.as_tensor(engine.score([ScoreRequest(tuple(rows), mask, prefix)])[0].logprobs)

    whole = logprobs(TextPrefix(TEXT))
    away = {}
    for init in ("attention_matching", "prefix", "sampled_chunks", "random"):
        settings = TrainSettings(num_tokens=48, init=init, stretch_tokens=4096)
        start = initialize(any_base, TEXT, settings, seed=0)
        assert start.num_tokens == 48
        away[init] = float((logprobs(CartridgePrefix(start, init)) - whole).square().mean())
    assert away["attention_matching"] < 0.7 * min(away["prefix"], away["sampled_chunks"], away["random"]), away


def test_stretches_are_read_alone_and_leave_one_sink(any_base):
    keys, values = match_attention(any_base, TEXT, 48, stretch_tokens=100)
    sink = prefill(any_base.model, any_base.template.system_ids(TEXT)[:1])
    torch.testing.assert_close(keys[:, :, :1], sink.keys.float(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(values[:, :, :1], sink.values.float())
    same = (values - sink.values.float()).abs().amax(dim=-1) < 1e-6  # a token's first-layer value has no context
    assert (same[0].sum(dim=-1) == 1).all(), "the other stretches' sinks are not among the slots"
    again = match_attention(any_base, TEXT, 48, stretch_tokens=100)
    assert torch.equal(keys, again[0]) and torch.equal(values, again[1])
    at_once = match_attention(any_base, TEXT, 48, stretch_tokens=4096)
    assert not torch.allclose(keys, at_once[0])


def test_frozen_slots_are_the_templates_first_tokens(any_base):
    keys, values = match_attention(any_base, TEXT, 48, stretch_tokens=100, num_frozen_tokens=3)
    first = prefill(any_base.model, any_base.template.system_ids(TEXT)[:3])
    torch.testing.assert_close(keys[:, :, :3], first.keys.float(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(values[:, :, :3], first.values.float())


def test_of_a_long_corpus_only_so_much_is_read(tiny_base_model, monkeypatch):
    monkeypatch.setattr(attention_matching, "MOST_TOKENS", 400)
    read: list[int] = []
    hook = tiny_base_model.model.base_model.embed_tokens.register_forward_hook(
        lambda _, inputs, __: read.append(inputs[0].numel()))
    keys, _ = match_attention(tiny_base_model, TEXT * 10, 48, stretch_tokens=100)
    hook.remove()
    assert keys.shape[2] == 48
    # Four or five stretches of at most 100, each once in its turn of the template and once in a row of 128.
    assert len(read) in (8, 10) and sum(read) < 5 * (150 + 128)


def test_a_corpus_shorter_than_the_cartridge_is_refused(tiny_base_model):
    with pytest.raises(UserError, match="fewer than num_tokens"):
        initialize(tiny_base_model, "Short.", TrainSettings(num_tokens=64, init="attention_matching"), seed=0)
