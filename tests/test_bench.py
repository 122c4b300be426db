"""`cartridges bench`: the sides do the same work, the yardstick counts what is done, the ratios are right."""


import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cartridges.config import BuildSettings, ModelSettings, TrainSettings
from cartridges.distill.packing import collate
from cartridges.models import load_base_model
from test_distill import conversation
from workflows.bench.conversations import choose_work
from workflows.bench.matmul import computed, flops, needed, step_products
from workflows.bench.padded import pad
from workflows.bench.sides import make_side

TRAIN = TrainSettings(num_tokens=40, row_tokens=64, pack_tokens=256)


@pytest.fixture
def settings(tiny_model_dir):
    return BuildSettings(model=ModelSettings(name=str(tiny_model_dir), dtype="float32"), train=TRAIN)


@pytest.fixture
def work(settings):
    """One step: short conversations, half of them after ten shared tokens."""
    return choose_work([conversation(i, shared=10 * (i % 2)) for i in range(6)], settings, steps=1)


@pytest.mark.parametrize("name", ["peft", "padded"])
def test_every_side_has_the_gradient_of_ours(settings, work, name):
    if name == "peft":
        pytest.importorskip("peft")
    side = make_side(name, load_base_model(settings.model, "cpu"), work, settings)
    batch = pad(work.chosen, 64, TRAIN.label_share)
    loss = side.loss(batch)
    loss.backward()
    ours = make_side("ours", load_base_model(settings.model, "cpu"), work, settings)
    cartridge = ours.trainer.stepper.student.cartridge
    packs = [collate(work.conversations, plan, TRAIN.pack_tokens, TRAIN.label_share) for plan in work.plans[0]]
    sums = [ours.trainer.stepper.forward_backward(pack, len(batch["topk_ids"])) for pack in packs]
    assert sum(float(s.loss.detach()) for s in sums) / len(batch["topk_ids"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    theirs = _gradients(side)
    for one, other in zip((cartridge.trainable_keys.grad, cartridge.trainable_values.grad), theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def _gradients(side):
    """As `[layers, heads, p, head_dim]` for keys and values."""
    if hasattr(side, "cartridge"):
        return side.cartridge.trainable_keys.grad, side.cartridge.trainable_values.grad
    flat = side.model.prompt_encoder["default"].trainable_embedding.grad
    both = flat.view(len(flat), 2, 2, 2, 16).permute(1, 2, 3, 0, 4)  # layer, key or value, head, slot, dim
    return both[:, 0], both[:, 1]


def test_a_round_of_each_side_trains(settings, work):
    pytest.importorskip("peft")
    for name in ("ours", "peft", "padded"):
        side = make_side(name, load_base_model(settings.model, "cpu"), work, settings)
        assert side.round() > 0 and side.round() > 0


def test_the_yardstick_runs_what_the_formula_counts(settings, work):
    base = load_base_model(settings.model, "cpu")
    pack = collate(work.conversations, work.plans[0][0], TRAIN.pack_tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for left, right in step_products(base, pack, TRAIN.num_tokens):
            torch.matmul(left, right)
    assert counter.get_total_flops() == flops(base.model, computed(pack, TRAIN.num_tokens))


@pytest.mark.parametrize("shared", [0, 10])
def test_needed_products_are_those_of_the_real_tokens(tiny_model, shared):
    """Of one conversation that fills its row, only the masked half of its own attention is not needed."""
    pack = collate([conversation(0, shared=shared, own=64)],
                   choose_work([conversation(0, shared=shared, own=64)], BuildSettings(
                       train=TRAIN.model_copy(update={"pack_tokens": 64})), 1).plans[0][0], 64)
    wanted, whole = needed(pack, 8), computed(pack, 8)
    assert wanted.tokens == whole.tokens == 64 + shared
    assert whole.pairs - wanted.pairs == 64 * 63 // 2 + shared * (shared - 1) // 2
    assert wanted.losses == 4 and flops(tiny_model, wanted) < flops(tiny_model, whole)
