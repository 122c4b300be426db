"""Exact KV through the prefix path is the text itself, in logits and in what is generated."""

import pytest
import torch

from cartridges.attention import AttentionContext, causal_bias, install, prefix_attention
from cartridges.cartridge import Cartridge
from cartridges.config import ModelSettings, TrainSettings
from cartridges.distill.initialize import initialize
from cartridges.engines.base import CartridgePrefix, Request, ScoreRequest, TextPrefix
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import UserError
from cartridges.forward import extend, hidden_states, prefill, stack_prefixes
from cartridges.merged_attention import merged_attention
from cartridges.models import load_base_model

TEXT = "The well of Sallow was dug in 1655 by Amalie Roux. It is 31 yards deep. "


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def stock_logits(model, input_ids: list[int]) -> torch.Tensor:
    """`[T, V]` by Hugging Face's own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([input_ids])).logits[0]


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_exact_prefix_equals_the_whole_text(any_tiny_model, length):
    prefix, own = ids(0, length), ids(1, 20)
    expected = stock_logits(any_tiny_model, prefix + own)[length:]
    install(any_tiny_model)
    context = stack_prefixes([prefill(any_tiny_model, prefix)])
    positions = length + torch.arange(20)[None]
    hidden = hidden_states(any_tiny_model, torch.tensor([own]), positions, context)
    logits = any_tiny_model.get_output_embeddings()(hidden[0])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_groups_of_different_prefixes_do_not_mix(tiny_model):
    prefixes, own = [ids(0, 10), ids(1, 70)], [ids(2, 8), ids(3, 8), ids(4, 8), ids(5, 8)]
    expected = [stock_logits(tiny_model, prefixes[n // 2] + row)[-8:] for n, row in enumerate(own)]
    install(tiny_model)
    context = stack_prefixes([prefill(tiny_model, prefix) for prefix in prefixes])
    positions = torch.tensor([10, 10, 70, 70])[:, None] + torch.arange(8)[None]
    hidden = hidden_states(tiny_model, torch.tensor(own), positions, context)
    logits = tiny_model.get_output_embeddings()(hidden)
    torch.testing.assert_close(logits, torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_extend_equals_prefill_of_both(tiny_model):
    install(tiny_model)
    whole = prefill(tiny_model, ids(0, 90))
    extended = extend(tiny_model, prefill(tiny_model, ids(0, 90)[:60]), ids(0, 90)[60:])
    torch.testing.assert_close(extended.keys, whole.keys, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(extended.values, whole.values, atol=1e-4, rtol=1e-4)


def test_gradient_reaches_the_prefix_only_through_attention(tiny_model):
    install(tiny_model)
    kv = prefill(tiny_model, ids(0, 12))
    keys = kv.keys.clone().requires_grad_()
    context = AttentionContext(list(keys.unsqueeze(1)), list(kv.values.unsqueeze(1)))
    hidden_states(tiny_model, torch.tensor([ids(1, 5)]), 12 + torch.arange(5)[None], context).sum().backward()
    assert keys.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


@pytest.fixture(scope="module")
def engine(tiny_base_model):
    return TransformersEngine(tiny_base_model, max_rows=8)


def requests(base, prefixes):
    questions = ["Who dug the well?", "How deep is the well of Sallow, in yards?", "When?"]
    return [Request(tuple(base.template.conversation_ids([{"role": "user", "content": question}])), prefix,
                    max_tokens=12, topk=5) for prefix in prefixes for question in questions]


def test_generate_equals_stock_generation(engine, tiny_base_model):
    base = tiny_base_model
    made = requests(base, [TextPrefix(TEXT), None])
    completions = engine.generate(made)
    for request, completion in zip(made, completions, strict=True):
        before = base.template.system_ids(TEXT) if request.prefix else base.template.default_ids()
        prompt = [*before, *request.input_ids]
        logits = stock_logits(base.model, prompt + list(completion.output_ids))[len(prompt) - 1:-1]
        install(base.model)
        # Greedy where the margin is clear; random models have near ties.
        assert (logits.gather(1, torch.tensor(completion.output_ids)[:, None])[:, 0]
                >= logits.max(-1).values - 1e-3).all()
        expected = logits.log_softmax(-1).topk(5).values
        torch.testing.assert_close(torch.from_numpy(completion.topk_logprobs), expected, atol=1e-3, rtol=1e-3)


def test_exact_cartridge_answers_as_the_text(engine, tiny_base_model):
    kv = prefill(tiny_base_model.model, tiny_base_model.template.system_ids(TEXT))
    exact = CartridgePrefix(Cartridge(kv.keys, kv.values), "exact")
    by_text = engine.generate(requests(tiny_base_model, [TextPrefix(TEXT)]))
    by_cartridge = engine.generate(requests(tiny_base_model, [exact]))
    assert [c.output_ids for c in by_text] == [c.output_ids for c in by_cartridge]


def test_batching_does_not_change_answers(engine, tiny_base_model):
    made = requests(tiny_base_model, [TextPrefix(TEXT), TextPrefix(TEXT * 3), None])
    sampled = [Request(r.input_ids, r.prefix, max_tokens=8, temperature=0.8, top_p=0.9, seed=i)
               for i, r in enumerate(made)]
    alone = [engine.generate([request])[0].output_ids for request in sampled]
    assert [c.output_ids for c in engine.generate(sampled)] == alone


def test_score_is_what_generate_saw(engine, tiny_base_model):
    made = requests(tiny_base_model, [TextPrefix(TEXT)])
    for request, completion in zip(made, engine.generate(made), strict=True):
        ids_ = request.input_ids + completion.output_ids
        mask = tuple(len(request.input_ids) - 1 <= i < len(ids_) - 1 for i in range(len(ids_)))
        (score,) = engine.score([ScoreRequest(ids_, mask, request.prefix, 5)])
        assert abs(score.logprobs - completion.logprobs).max() < 1e-3


def test_stop_string_is_cut(engine, tiny_base_model):
    (request, *_) = requests(tiny_base_model, [None])
    (free,) = engine.generate([request])
    stop = free.text.strip()[3:5]
    (stopped,) = engine.generate([Request(request.input_ids, None, max_tokens=12, stop=(stop,))])
    assert stopped.finish_reason == "stop" and stop not in stopped.text


@pytest.mark.parametrize("init", ["attention_matching", "prefix", "sampled_chunks", "unrelated", "random"])
def test_starts_have_exactly_p_slots_and_the_same_sink(tiny_base_model, init):
    settings = TrainSettings(num_tokens=48, init=init)
    cartridge = initialize(tiny_base_model, TEXT * 10, settings, seed=3)
    assert cartridge.num_tokens == 48
    sink = prefill(tiny_base_model.model, tiny_base_model.template.system_ids(TEXT)).keys[:, :, :1]
    torch.testing.assert_close(cartridge.keys_values()[0][:, :, :1], sink.float(), atol=1e-5, rtol=1e-5)
    again = initialize(tiny_base_model, TEXT * 10, settings, seed=3)
    assert torch.equal(cartridge.trainable_keys, again.trainable_keys)


def test_corpus_shorter_than_the_cartridge_is_refused(tiny_base_model):
    with pytest.raises(UserError, match="fewer than num_tokens=512"):
        initialize(tiny_base_model, TEXT, TrainSettings(num_tokens=512), seed=0)


@pytest.mark.quality
def test_real_model_answers_the_same_from_exact_kv(base_model_dir):
    base = load_base_model(ModelSettings(name=str(base_model_dir), dtype="float32"), device="cpu")
    engine = TransformersEngine(base)
    kv = prefill(base.model, base.template.system_ids(TEXT))
    exact = CartridgePrefix(Cartridge(kv.keys, kv.values), "exact")
    by_text = engine.generate(requests(base, [TextPrefix(TEXT)]))
    assert [c.output_ids for c in engine.generate(requests(base, [exact]))] == [c.output_ids for c in by_text]
    prompt = [*base.template.system_ids(TEXT), *requests(base, [None])[0].input_ids]
    base.model.set_attn_implementation("sdpa")
    stock = base.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt):]
    assert by_text[0].output_ids == tuple(stock.tolist())


@pytest.mark.parametrize(("groups", "rows", "heads", "per_head", "padded"),
                         [(1, 3, 3, 3, False), (2, 2, 2, 1, True), (1, 1, 1, 2, True)])
def test_merged_attention_is_prefix_attention_with_its_gradients(groups, rows, heads, per_head, padded):
    T, S, P, D, B = 5, 9, 13, 16, groups * rows
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = (tensor(B, heads * per_head, T, D), tensor(B, heads, S, D), tensor(B, heads, S, D),
              tensor(groups, heads, P, D), tensor(groups, heads, P, D))
    closed = torch.rand(groups, P, generator=generator) < 0.4
    bias = torch.zeros(groups, P, dtype=torch.float64).masked_fill(closed, float("-inf")) if padded else None
    own_bias = causal_bias(T, S, torch.float64, "cpu").expand(B, T, S)
    upstream = torch.randn(B, T, heads * per_head, D, generator=generator, dtype=torch.float64)

    def run(attend):
        output = attend(*inputs, bias, own_bias, 0.3)
        return output, *torch.autograd.grad(output, inputs, upstream)

    for mine, expected in zip(run(merged_attention), run(prefix_attention), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-7)


def test_the_share_of_prefixes_that_was_not_computed_again(tiny_base_model):
    engine = TransformersEngine(tiny_base_model, max_rows=8)
    texts = [TextPrefix("The well is deep."), TextPrefix("The well is dry.")]
    for _ in range(2):
        engine.generate([Request((5, 6, 7 + number), text, max_tokens=1) for number in range(4) for text in texts])
    assert engine.prefix_hit_share() == pytest.approx(14 / 16)
