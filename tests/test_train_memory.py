"""What saves time or memory in training changes nothing: flat packs on a GPU, layers computed again."""

import functools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cartridges import attention, flex_attention
from cartridges.distill.student import Student
from cartridges.distill.trainer import forward_packs
from cartridges.models import SUPPORTED_TYPES
from cartridges.norms import fuse_norms
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


def dense(query, key, value, prefix_key, prefix_value, owner, lengths, scaling):
    """Attention of a flat pack by its whole score matrix."""
    (N, HG, Q, _), H, P = query.shape, key.shape[1], prefix_key.shape[2]
    keys, values = (torch.cat(pair, 2).repeat_interleave(HG // H, 1)
                    for pair in ((prefix_key, key), (prefix_value, value)))
    of_prefix = torch.arange(P, device=query.device) < torch.tensor(lengths, device=query.device)[:, None]
    own = (owner[:, None] == 0) | (owner[:, None] == owner[:, :, None])
    ahead = torch.ones(Q, Q, dtype=torch.bool, device=query.device).tril()
    seen = torch.cat([of_prefix[:, None].expand(N, Q, P), own & ahead], 2)[:, None]
    scores = (query @ keys.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(1, 2)


@pytest.mark.parametrize(("lengths", "shared", "heads", "per_head"),
                         [((40,), 0, 3, 3), ((40,), 9, 3, 3), ((40, 25), 9, 2, 1)])
def test_a_flat_pack_attends_as_its_definition_with_its_gradients(unfused, lengths, shared, heads, per_head):
    segments = torch.tensor([[1] * 10 + [2] * 9 + [0] * 5, [1] * 20 + [0] * 4])
    owner = flex_attention.owners(segments, shared).expand(len(lengths), -1)
    N, Q, P, D = *owner.shape, max(lengths), 16
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).requires_grad_() for shape in (
        (N, heads * per_head, Q, D), *[(N, heads, Q, D)] * 2, *[(N, heads, P, D)] * 2)]
    upstream = torch.randn(N, Q, heads * per_head, D, generator=generator)
    ours = flex_attention.flat_attention(*inputs, flex_attention.flat_mask(owner, lengths), 0.3)
    expected = dense(*inputs, owner, lengths, 0.3)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(*(torch.autograd.grad(one, inputs, upstream) for one in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("lengths", "rows", "tokens", "shared"), [((40,), 4, 32, 0), ((256,), 2, 128, 50),
                                                                  ((96, 40, 256), 4, 128, 50), ((512,), 16, 128, 7)])
def test_the_blocks_are_those_that_torch_finds(lengths, rows, tokens, shared):
    """Torch asks the definition of each pair."""
    generator = torch.Generator().manual_seed(0)
    segments = torch.randint(0, 3, (len(lengths), rows, tokens), generator=generator).sort(-1).values.flip(-1)
    mask = flex_attention.flat_mask(torch.stack([flex_attention.owners(one, shared) for one in segments]), lengths)
    N, _, Q, K = mask.shape[0], *mask.shape[1:]
    expected = flex.create_block_mask(mask.mask_mod, N, None, Q, K, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        counts, indices = getattr(mask, name), name.replace("num_blocks", "indices")
        assert torch.equal(counts, getattr(expected, name))
        for one, other, count in zip(getattr(mask, indices).flatten(0, 2), getattr(expected, indices).flatten(0, 2),
                                     counts.flatten(), strict=True):
            assert set(one[:count].tolist()) == set(other[:count].tolist())
    assert mask.seq_lengths == expected.seq_lengths == (shared + rows * tokens, max(lengths) + Q)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_norms_are_those_of_the_model(kind, dtype, limit):
    """All of them: one that was left out would be slow, and nothing else would tell."""
    config = CONFIG_MAPPING[kind](hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2, head_dim=8, vocab_size=50)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    for module in norms.values():
        torch.nn.init.uniform_(module.weight, 0.5, 2)
    states = {name: torch.randn(1, 5, len(module.weight), dtype=dtype) for name, module in norms.items()}
    expected = {name: module(states[name]) for name, module in norms.items()}
    fuse_norms(model)
    for name, module in norms.items():
        assert "forward" in vars(module)
        torch.testing.assert_close(module(states[name]), expected[name], atol=limit, rtol=limit)
    assert len(norms) == 2 * (4 if kind == "qwen3" else 2) + 1


def test_padding_is_of_its_row():
    """Rows apart have nothing in common, so that their blocks are skipped."""
    owner = flex_attention.owners(torch.tensor([[1, 1, 0], [1, 2, 0]]), 2)
    assert owner[:2].tolist() == [0, 0]
    assert len(set(owner[2:].tolist())) == 5 and (owner[2:] != 0).all() and owner[2] == owner[3]


@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("distractors", [(), (0,)])
def test_students_learn_the_same_from_flat_packs(tiny_model, request, shared, recompute, distractors):
    """A cohort of cartridges of different lengths, read in one pass."""
    students = [Student(tiny_model, cartridge(p, seed, num_frozen_layers=1), recompute=recompute,
                        distractors=[cartridge(6, 9)]) for seed, p in enumerate((8, 5))]
    members = [packs([conversation(10 * i + j, shared) for j in range(4)], 0)[0] for i in range(2)]
    members = [replace(pack, distractors=torch.tensor(distractors, dtype=torch.long)) for pack in members]
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
            for number in range(2):  # who sees whom is another matter in every pack, and no other kernel
                query = torch.randn(1, 2, tokens, 16)
                owner = 1 + torch.arange(tokens)[None] // (4 + number)
                mask = flex_attention.flat_mask(owner, [8])
                flex_attention.flat_attention(*[query] * 3, *[query[:, :, :8]] * 2, mask, 0.25, attend)
    finally:
        flex_attention._fused.cache_clear()
        torch._dynamo.reset()
    assert len(compiled) == 12


def test_on_a_cpu_training_does_not_take_it():
    prefix = torch.zeros(1, 2, 4, 8, requires_grad=True)
    assert not flex_attention.supports(prefix) and attention.supports(prefix)
