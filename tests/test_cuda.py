"""What only a GPU can show: the fused kernels against the definition, and training and decoding there against a CPU.

Skipped without CUDA. On a machine with one: `pytest tests/test_cuda.py` (a few minutes, most of it compiling).
"""

import pytest
import torch

from cartridges import flex_attention
from cartridges.config import OptimizerSettings, TrainSettings
from cartridges.distill.course import Course
from cartridges.distill.student import Student
from cartridges.distill.trainer import TorchStepper, Trainer, forward_packs
from cartridges.forward import extend, prefill
from cartridges.norms import fuse_norms
from tests.conftest import make_tiny
from tests.test_distill import cartridge, conversation, gradients, packs
from tests.test_train_memory import dense

DEVICE = "cuda"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPES = [(lengths, rows, tokens, shared) for lengths in ((40,), (256,), (96, 40, 256))
          for rows, tokens in ((4, 32), (2, 128)) for shared in (0, 50)]
"""With both dtypes more than the 8 variants of one function that torch compiles unless told."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "rows", "tokens", "shared"), SHAPES)
def test_fused_attention_is_the_definition_with_its_gradients(lengths, rows, tokens, shared, dtype):
    generator = torch.Generator(DEVICE).manual_seed(0)
    segments = torch.randint(0, 3, (len(lengths), rows, tokens), generator=generator, device=DEVICE).sort(-1).values
    owner = torch.stack([flex_attention.owners(one.flip(-1), shared) for one in segments])
    N, Q, P, D = *owner.shape, max(lengths), 64
    inputs = [torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype).requires_grad_() for shape in (
        (N, 9, Q, D), *[(N, 3, Q, D)] * 2, *[(N, 3, P, D)] * 2)]
    ours = flex_attention.flat_attention(*inputs, flex_attention.flat_mask(owner, lengths), D ** -0.5)
    exact = [one.detach().double().requires_grad_() for one in inputs]
    expected = dense(*exact, owner, lengths, D ** -0.5)
    upstream = torch.randn(ours.shape, generator=generator, device=DEVICE, dtype=dtype)
    found = [ours, *torch.autograd.grad(ours, inputs, upstream)]
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    limit = 5e-2 if dtype == torch.bfloat16 else 5e-3  # float32 products may be TF32
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.double() - theirs).norm() < limit * theirs.norm()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("shared", [0, 11])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_student_has_the_gradients_that_it_has_on_a_cpu(kind, shared, recompute):
    made = packs([conversation(i, shared) for i in range(8)], 0)
    expected = gradients(Student(make_tiny(kind), cartridge(num_frozen_layers=1)), made)
    student = Student(make_tiny(kind), cartridge(num_frozen_layers=1), recompute=recompute).to(DEVICE)
    fuse_norms(student.model)  # as models are loaded to a GPU
    loss, grads = gradients(student, [pack.to(DEVICE) for pack in made])
    assert loss == pytest.approx(expected[0], rel=1e-2)
    for mine, theirs in zip(grads, expected[1], strict=True):
        assert (mine.cpu() - theirs).norm() < 2e-2 * theirs.norm()


def test_a_cohort_is_read_in_one_pass_as_each_is_alone():
    model = make_tiny("llama").to(DEVICE)
    students = [Student(model, cartridge(p, seed).to(DEVICE)) for seed, p in enumerate((8, 5, 13))]
    members = [packs([conversation(10 * i + j) for j in range(4)], 0)[0].to(DEVICE) for i in range(3)]
    alone = [float(student(pack).loss.detach()) for student, pack in zip(students, members, strict=True)]
    together = forward_packs(students, dict(enumerate(members)))
    assert [float(together[i].loss) for i in range(3)] == pytest.approx(alone, rel=1e-2)


def test_training_lowers_the_loss():
    settings = TrainSettings(num_tokens=8, row_tokens=32, pack_tokens=64, steps=12, packs_per_step=2,
                             optimizer=OptimizerSettings(lr=0.05))
    student = Student(make_tiny("llama"), cartridge()).to(DEVICE)
    losses: list[float] = []
    course = Course([conversation(i) for i in range(10)], settings, 0)
    Trainer(TorchStepper([student], settings), [course], DEVICE).run(lambda metrics: losses.append(metrics.kl))
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3


def test_a_prefix_is_read_as_on_a_cpu():
    ids = list(range(3, 90))
    expected = prefill(make_tiny("llama"), ids)
    model = make_tiny("llama").to(DEVICE)
    found = extend(model, prefill(model, ids[:40]), ids[40:])
    torch.testing.assert_close(found.keys.cpu(), expected.keys, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found.values.cpu(), expected.values, atol=2e-2, rtol=2e-2)
