"""What saves memory in training changes nothing: FlexAttention in place of whole scores, layers computed again."""

import functools

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from cartridges import attention, flex_attention
from cartridges.attention import AttentionContext, causal_bias, prefix_attention
from cartridges.distill.student import Student
from cartridges.distill.trainer import forward_packs
from tests.test_distill import cartridge, conversation, gradients, packs


@pytest.fixture
def unfused(monkeypatch):
    """Training takes FlexAttention as on a GPU, but without its kernels, which CPUs lack for the backward pass."""
    calls = []

    def attend(*arguments, **options):
        calls.append(1)
        return flex.flex_attention(*arguments, **options)

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_fused", lambda: attend)
    monkeypatch.setattr(flex_attention, "supports", lambda *_: torch.is_grad_enabled())
    return calls


@pytest.mark.parametrize(("groups", "rows", "heads", "per_head", "padded"),
                         [(1, 3, 3, 3, False), (2, 2, 2, 1, True)])
def test_flex_attention_is_prefix_attention_with_its_gradients(unfused, groups, rows, heads, per_head, padded):
    T, P, D, B = 24, 40, 16, groups * rows
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    inputs = (tensor(B, heads * per_head, T, D), tensor(B, heads, T, D), tensor(B, heads, T, D),
              tensor(groups, heads, P, D), tensor(groups, heads, P, D))
    closed = torch.rand(groups, P, generator=generator) < 0.4
    bias = torch.zeros(groups, P).masked_fill(closed, float("-inf")) if padded else None
    own_bias = causal_bias(T, T, torch.float32, "cpu").expand(B, T, T)
    upstream = torch.randn(B, T, heads * per_head, D, generator=generator)
    blocks = flex_attention.block_masks(bias, own_bias, rows)
    ours = flex_attention.flex_attention(*inputs, blocks, 0.3)
    expected = prefix_attention(*inputs, bias, own_bias, 0.3)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(one, inputs, upstream) for one in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [0, 11])
def test_students_learn_the_same_through_flex_attention(tiny_model, request, shared):
    """A cohort of cartridges of different lengths, read in one pass."""
    students = [Student(tiny_model, cartridge(p, seed, num_frozen_layers=1)) for seed, p in enumerate((8, 5))]
    members = [packs([conversation(10 * i + j, shared) for j in range(4)], 0)[0] for i in range(2)]
    expected = [gradients(student, [pack]) for student, pack in zip(students, members, strict=True)]
    calls = request.getfixturevalue("unfused")
    for student in students:
        student.zero_grad()
    sums = forward_packs(students, dict(enumerate(members)), joined=True)
    sum(one.loss / members[index].num_loss_tokens for index, one in sums.items()).backward()
    assert calls
    for student, (_, grads) in zip(students, expected, strict=True):
        own = student.cartridge
        torch.testing.assert_close([own.trainable_keys.grad, own.trainable_values.grad], grads, atol=1e-5, rtol=1e-3)


def test_block_masks_are_made_once_for_all_layers_and_anew_for_other_biases():
    bias = causal_bias(8, 8, torch.float32, "cpu").expand(2, 8, 8)
    context = AttentionContext(own_bias=bias)
    first = context.block_masks(bias, 2)
    assert context.block_masks(bias.clone(), 2) is first
    context.own_bias = bias.clone()
    assert context.block_masks(context.own_bias, 2) is not first


@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("num_frozen_layers", [0, 1])
def test_layers_computed_again_give_the_same_gradients(any_tiny_model, shared, num_frozen_layers):
    made = packs([conversation(i, shared) for i in range(8)], 0)
    passes: list[int] = []
    hook = any_tiny_model.base_model.layers[1].register_forward_pre_hook(lambda *_: passes.append(1))
    found = []
    for recompute in (False, True):
        passes.clear()
        student = Student(any_tiny_model, cartridge(num_frozen_layers=num_frozen_layers), recompute=recompute)
        found.append((*gradients(student, made), len(passes)))
    hook.remove()
    (loss, grads, once), (loss_again, grads_again, twice) = found
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert once < twice <= 2 * once  # what no gradient goes through is not computed again
    torch.testing.assert_close(grads_again, grads, atol=1e-6, rtol=1e-4)


def test_compiled_attention_keeps_many_shapes(monkeypatch):
    """Torch's own limit is 8 shapes of a compiled function; what comes after runs unfused."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flex_attention._fused.cache_clear()
    attend = flex_attention._fused()
    try:
        for tokens in range(16, 16 + 12 * 8, 8):
            query = torch.randn(1, 2, tokens, 16)
            attend(query, query, query)
    finally:
        flex_attention._fused.cache_clear()
        torch._dynamo.reset()
    assert len(compiled) == 12


def test_on_a_cpu_training_does_not_take_it():
    query = torch.zeros(1, 2, 4, 8, requires_grad=True)
    assert not flex_attention.supports(query, query) and attention.supports(query)
