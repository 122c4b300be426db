"""Context distillation: the loss, packing, the trainer."""

import dataclasses

import numpy as np
import pytest
import torch

from cartridges.cartridge import Cartridge
from cartridges.compose import compose, rotate
from cartridges.config import OptimizerSettings, TrainSettings
from cartridges.distill.course import Course
from cartridges.distill.losses import distillation, next_token
from cartridges.distill.optimizer import OrthogonalAdam, orthogonalized
from cartridges.distill.packing import collate, count_truncated, own_lengths, plan_packs, with_label
from cartridges.distill.schedule import Order, learning_rate
from cartridges.distill.student import Student
from cartridges.distill.trainer import TorchStepper, Trainer, forward_packs
from cartridges.errors import NonFiniteLoss
from cartridges.records import Conversation

V, K = 320, 20


def conversation(index: int, shared: int = 0, own: int | None = None) -> Conversation:
    """Random tokens (the first `shared` the same in all) and a random teacher."""
    rng = np.random.default_rng(index)
    own = own or int(rng.integers(6, 30))
    start = np.random.default_rng(10_000).integers(3, V, shared)
    ids = np.concatenate([start, rng.integers(3, V, own)]).astype(np.int32)
    mask = np.zeros(len(ids), bool)
    mask[-5:-1] = True
    logprobs = np.sort(rng.dirichlet(np.ones(K + 1), 4)[:, :K], axis=1)[:, ::-1]
    topk_ids = np.stack([rng.permutation(np.arange(3, V))[:K] for _ in range(4)]).astype(np.int32)
    return Conversation(f"c{index}", "chunk", "family", (), ids, mask, topk_ids,
                        np.log(logprobs).astype(np.float32), shared)


def cartridge(p: int = 8, seed: int = 0, num_frozen_layers: int = 0) -> Cartridge:
    generator = torch.Generator().manual_seed(seed)
    return Cartridge(*(torch.randn(2, 2, p, 16, generator=generator) for _ in range(2)),
                     num_frozen_layers=num_frozen_layers)


def gradients(student: Student, packs) -> tuple[float, list[torch.Tensor]]:
    student.zero_grad()
    total = sum(float(pack.num_loss_tokens) for pack in packs)
    loss = 0.0
    for pack in packs:
        sums = student(pack)
        (sums.loss / total).backward()
        loss += float(sums.loss.detach()) / total
    return loss, [student.cartridge.trainable_keys.grad.clone(), student.cartridge.trainable_values.grad.clone()]


def test_loss_against_itself_is_the_teachers_entropy():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 16, generator=generator), torch.randn(V, 16, generator=generator)
    top = (hidden @ head.t()).log_softmax(-1).topk(K)
    sums = distillation(hidden, head, top.indices, top.values)
    assert float(sums.kl) == pytest.approx(0, abs=1e-3)
    assert float(sums.loss) == pytest.approx(float(sums.entropy), rel=1e-4)


@pytest.mark.parametrize("positions", [1, 127, 128, 300])
def test_sliced_loss_and_gradient_equal_the_plain_ones(positions):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(positions, 16, generator=generator, requires_grad=True)
    head = torch.randn(V, 16, generator=generator)
    top = torch.randn(positions, V, generator=generator).log_softmax(-1).topk(K)
    distillation(hidden, head, top.indices, top.values).loss.backward()
    sliced, hidden.grad = hidden.grad, None
    logprobs = (hidden @ head.t()).log_softmax(-1)
    chosen, teacher = logprobs.gather(1, top.indices), top.values.exp()
    tail = (1 - chosen.exp().sum(-1)).log()
    plain = -(teacher * chosen).sum() - ((1 - teacher.sum(-1)) * tail).sum()
    plain.backward()
    torch.testing.assert_close(sliced, hidden.grad, atol=1e-4, rtol=1e-3)


def test_next_token_is_cross_entropy():
    hidden, head = torch.randn(9, 16), torch.randn(V, 16)
    targets = torch.arange(9) + 5
    expected = torch.nn.functional.cross_entropy(hidden @ head.t(), targets, reduction="sum")
    assert float(next_token(hidden, head, targets).loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("shared", [0, 11])
def test_packed_equals_one_by_one(any_tiny_model, shared):
    made = [conversation(i, shared) for i in range(12)]
    student = Student(any_tiny_model, cartridge())
    packed = [collate(made, plan, 128) for plan in plan_packs(made, 32, 128, seed=0)]
    alone = [collate([one], plan_packs([one], 32, 32, 0)[0], 32) for one in made]
    loss, grads = gradients(student, packed)
    loss_alone, grads_alone = gradients(student, alone)
    assert loss == pytest.approx(loss_alone, rel=1e-4)
    for a, b in zip(grads, grads_alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_sharing_the_first_turns_changes_nothing(tiny_model):
    made = [conversation(i, shared=11, own=15) for i in range(6)]
    whole = [dataclasses.replace(one, shared_tokens=0) for one in made]
    student = Student(tiny_model, cartridge())
    shared = gradients(student, [collate(made, plan, 128) for plan in plan_packs(made, 32, 128, 0)])
    plain = gradients(student, [collate(whole, plan, 128) for plan in plan_packs(whole, 32, 128, 0)])
    assert shared[0] == pytest.approx(plain[0], rel=1e-4)
    torch.testing.assert_close(shared[1][0], plain[1][0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("shared", [0, 11])
def test_states_kept_below_the_trained_layers_change_nothing(any_tiny_model, shared):
    made = [conversation(i % 11, shared) for i in range(12)]  # one of them twice
    loss, grads = gradients(Student(any_tiny_model, cartridge()), packs(made, seed=0))
    student = Student(any_tiny_model, cartridge(num_frozen_layers=1))
    gradients(student, packs(made[:3], seed=0))
    for seed in (0, 0, 5):  # computed but for three, read again, read in other packs
        upper_loss, upper = gradients(student, packs(made, seed))
        assert upper_loss == pytest.approx(loss, rel=1e-4)
        for whole, part in zip(grads, upper, strict=True):
            torch.testing.assert_close(part, whole[1:], atol=1e-5, rtol=1e-3)


def packs(made, seed):
    return [collate(made, plan, 128) for plan in plan_packs(made, 32, 128, seed)]


@torch.no_grad()
def test_states_are_read_and_not_computed_again(tiny_model):
    made = packs([conversation(i) for i in range(12)], 0)
    passes: list[int] = []
    hook = tiny_model.base_model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    student = Student(tiny_model, cartridge(num_frozen_layers=1))
    first = [float(student(pack).loss) for pack in made]
    computed = len(passes)
    assert [float(student(pack).loss) for pack in made] == pytest.approx(first, rel=1e-4)
    assert computed and len(passes) == computed
    student = Student(tiny_model, cartridge(num_frozen_layers=1))
    student.lower.most_bytes = 0
    for _ in range(2):
        assert [float(student(pack).loss) for pack in made] == pytest.approx(first, rel=1e-4)
    hook.remove()
    assert len(passes) == 3 * computed, "without memory they are computed each time"


def loud(p: int, seed: int) -> Cartridge:
    """One that a model of random weights cannot fail to notice."""
    keys, values = cartridge(p, seed).keys_values()
    return Cartridge(keys, 20 * values)


@pytest.mark.parametrize("num_frozen_layers", [0, 1])
@pytest.mark.parametrize("shared", [0, 11])
def test_a_distractor_stands_beside_as_in_a_composition(any_tiny_model, shared, num_frozen_layers):
    """Same loss as the composition's, and the own slots get its gradients, turned back to where they are trained."""
    frequencies = any_tiny_model.base_model.rotary_emb.inv_freq
    own, others = cartridge(num_frozen_layers=num_frozen_layers), [loud(5, seed=1), loud(9, seed=2)]
    made = [conversation(i, shared) for i in range(6)]
    plain = packs(made, 0)
    with_both = [dataclasses.replace(pack, distractors=torch.tensor([1, 0])) for pack in plain]
    student = Student(any_tiny_model, own, distractors=others)
    loss, grads = gradients(student, with_both)
    whole = compose([own, others[1], others[0]], frequencies).with_frozen_layers(num_frozen_layers)
    expected, (keys, values) = gradients(Student(any_tiny_model, whole), plain)
    assert loss == pytest.approx(expected, rel=1e-5)
    own_slots = own.num_tokens - 1
    turned = rotate(keys[:, :, :own_slots], frequencies, own.num_tokens - whole.num_tokens)
    torch.testing.assert_close(grads[0], turned, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(grads[1], values[:, :, :own_slots], atol=1e-5, rtol=1e-3)
    assert gradients(student, with_both)[0] == pytest.approx(loss, rel=1e-5), "met again, from what was kept"
    assert loss != pytest.approx(gradients(student, plain)[0], rel=1e-3), "what stands beside is seen"
    assert {name for name, _ in student.named_parameters() if "cartridge" in name} == {
        "cartridge.trainable_keys", "cartridge.trainable_values"}


def test_distractors_are_drawn_by_seed_and_step():
    settings = SETTINGS.model_copy(update={"distractors": tuple("abcde"), "distractor_share": 0.25,
                                           "max_distractors": 3, "steps": 400})
    made = [conversation(i) for i in range(8)]
    drawn = [plan.distractors for step in range(400) for plan in Order(made, settings, 0).plans(step)]
    again = Order(made, settings, 0)
    backwards = {step: [plan.distractors for plan in again.plans(step)] for step in reversed(range(400))}
    assert [one for step in range(400) for one in backwards[step]] == drawn
    loaded = [one for one in drawn if one]
    assert 0.2 < len(loaded) / len(drawn) < 0.3
    assert {len(one) for one in loaded} == {1, 2, 3} and all(len(set(one)) == len(one) for one in loaded)
    assert {index for one in loaded for index in one} == set(range(5))
    assert drawn != [plan.distractors for step in range(400) for plan in Order(made, settings, 1).plans(step)]


def test_training_leaves_distractors_as_they_are(tiny_model):
    settings = SETTINGS.model_copy(update={"distractors": ("a",), "distractor_share": 1.0})
    other, own = cartridge(5, seed=1), cartridge()
    made = [conversation(i) for i in range(8)]
    student = Student(tiny_model, own, distractors=[other])
    Trainer(TorchStepper([student], settings), [Course(made, settings, 0)]).run()
    assert all(map(torch.equal, other.keys_values(), cartridge(5, seed=1).keys_values()))
    alone = cartridge()
    Trainer(TorchStepper([Student(tiny_model, alone)], SETTINGS), [Course(made, SETTINGS, 0)]).run()
    assert not torch.allclose(own.trainable_keys, alone.trainable_keys), "the steps saw it"


def test_frozen_layers_stay_and_the_others_learn(tiny_model):
    made = [conversation(i) for i in range(8)]
    student = Student(tiny_model, cartridge(num_frozen_layers=1))
    Trainer(TorchStepper([student], SETTINGS), [Course(made, SETTINGS, 0)]).run()
    for before, after in zip(cartridge().keys_values(), student.cartridge.keys_values(), strict=True):
        assert torch.equal(before[0], after[0])
        assert not torch.equal(before[1], after[1])
    assert student.cartridge.shape == cartridge().shape
    assert student.cartridge.num_tokens == 8


def test_an_orthogonal_step_moves_every_direction_alike():
    generator = torch.Generator().manual_seed(0)
    strengths = torch.logspace(0, -1.5, 16)
    matrices = torch.linalg.qr(torch.randn(3, 2, 40, 16, generator=generator)).Q * strengths
    values = torch.linalg.svdvals(orthogonalized(matrices)) / 40**0.5
    assert values.max() < 1.25 and values.min() > 0.6
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity(
        orthogonalized(matrices).flatten(2), (left @ right).flatten(2), dim=-1)
    assert cosine.min() > 0.97
    assert torch.equal(orthogonalized(torch.zeros(2, 5, 4)), torch.zeros(2, 5, 4))


@pytest.mark.parametrize("slots", [40, 6])
def test_orthogonal_adam_takes_adams_direction(slots):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, slots, 16, generator=generator)
    one, other = start.clone().requires_grad_(), start.clone().requires_grad_()
    ours = OrthogonalAdam([one], lr=0.1, betas=(0.9, 0.99))
    adam = torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.99))
    for _ in range(3):
        gradient = torch.randn(2, slots, 16, generator=generator)
        before, adams = one.detach().clone(), other.detach().clone()
        for parameter, optimizer in ((one, ours), (other, adam)):
            parameter.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(before - one.detach(), 0.1 * orthogonalized(adams - other.detach()),
                                   atol=1e-4, rtol=1e-3)


def test_only_trainable_slots_get_gradient_and_the_sink_stays(tiny_model):
    made = [conversation(i) for i in range(8)]
    before = cartridge()
    student = Student(tiny_model, cartridge())
    Trainer(TorchStepper([student], SETTINGS), [Course(made, SETTINGS, 0)]).run()
    keys, values = student.cartridge.keys_values()
    expected_keys, expected_values = before.keys_values()
    assert torch.equal(keys[:, :, 0], expected_keys[:, :, 0])
    assert torch.equal(values[:, :, 0], expected_values[:, :, 0])
    assert not torch.equal(keys[:, :, 1:], expected_keys[:, :, 1:])
    assert {name for name, p in student.named_parameters() if p.requires_grad} == {
        "cartridge.trainable_keys", "cartridge.trainable_values"}


SETTINGS = TrainSettings(num_tokens=8, row_tokens=32, pack_tokens=64, steps=12, packs_per_step=2,
                         checkpoint_every=4, optimizer=OptimizerSettings(lr=0.05))


def test_training_lowers_the_loss_and_resumes_to_the_same_curve(tiny_model, tmp_path):
    made = [conversation(i) for i in range(10)]

    def fresh():
        return Trainer(TorchStepper([Student(tiny_model, cartridge())], SETTINGS), [Course(made, SETTINGS, 0)])

    losses: list[float] = []
    fresh().run(lambda m: losses.append(m.kl))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    first = fresh()
    resumed: list[float] = []
    first.run(lambda m: resumed.append(m.kl), until=5)
    first.stepper.save(tmp_path)
    second = fresh()
    second.stepper.load(tmp_path)
    second.next_step = 5
    second.run(lambda m: resumed.append(m.kl))
    assert resumed == pytest.approx(losses, rel=1e-4)


def test_non_finite_loss_stops_before_the_update(tiny_model):
    bad = dataclasses.replace(conversation(0), topk_logprobs=np.full((4, K), np.nan, np.float32))
    student = Student(tiny_model, cartridge())
    before = student.cartridge.trainable_keys.clone()
    with pytest.raises(NonFiniteLoss, match="lower train.optimizer.lr"):
        Trainer(TorchStepper([student], SETTINGS), [Course([bad], SETTINGS, 0)]).run()
    assert torch.equal(before, student.cartridge.trainable_keys)


@pytest.mark.parametrize("num_frozen_layers", [0, 1])
@pytest.mark.parametrize("shared", [0, 11])
def test_a_cohort_reads_together_what_each_reads_alone(any_tiny_model, shared, num_frozen_layers):
    """Cartridges of different lengths; for each the loss and the gradients that it has alone."""
    students = [Student(any_tiny_model, cartridge(p, seed, num_frozen_layers)) for seed, p in enumerate((8, 5, 13))]
    members = [packs([conversation(10 * i + j, shared) for j in range(4)], 0)[0] for i in range(3)]
    expected = [gradients(student, [pack]) for student, pack in zip(students, members, strict=True)]
    for joined in (True, False, None):
        for student in students:
            student.zero_grad()
        sums = forward_packs(students, dict(enumerate(members)), joined)
        sum(one.loss / members[index].num_loss_tokens for index, one in sums.items()).backward()
        for index, (loss, grads) in enumerate(expected):
            assert float(sums[index].loss.detach()) / members[index].num_loss_tokens == pytest.approx(loss, rel=1e-5)
            own = students[index].cartridge
            torch.testing.assert_close([own.trainable_keys.grad, own.trainable_values.grad], grads, atol=1e-6,
                                       rtol=1e-4)


def test_a_cohort_learns_what_its_members_learn_alone(tiny_model, tmp_path):
    """Of different lengths and numbers of steps, and though it was interrupted."""
    settings = [SETTINGS, SETTINGS.model_copy(update={"steps": 7})]
    made = [[conversation(100 * i + j) for j in range(9)] for i in range(2)]
    starts = [lambda: cartridge(8, 0), lambda: cartridge(5, 1)]

    def of(members) -> Trainer:
        students = [Student(tiny_model, starts[i]()) for i in members]
        return Trainer(TorchStepper(students, SETTINGS), [Course(made[i], settings[i], i) for i in members])

    alone = []
    for i in range(2):
        trainer = of([i])
        trainer.run()
        alone.append(trainer.stepper.students[0].cartridge.trainable_keys.detach())
    first, rows = of([0, 1]), []
    first.run(rows.append, until=5)
    first.stepper.save(tmp_path)
    cohort = of([0, 1])
    cohort.stepper.load(tmp_path)
    cohort.next_step = 5
    cohort.run(rows.append)
    for student, expected in zip(cohort.stepper.students, alone, strict=True):
        torch.testing.assert_close(student.cartridge.trainable_keys.detach(), expected, atol=1e-5, rtol=1e-4)
    assert [(row.member, row.step) for row in rows] == [
        (member, step) for step in range(12) for member in range(2) if step < (12, 7)[member]]


def test_a_member_that_fails_stays_and_the_others_go_on(tiny_model):
    bad = dataclasses.replace(conversation(0), topk_logprobs=np.full((4, K), np.nan, np.float32))
    good = [conversation(i) for i in range(8)]
    students = [Student(tiny_model, cartridge(seed=seed)) for seed in range(2)]
    trainer = Trainer(TorchStepper(students, SETTINGS), [Course([bad], SETTINGS, 0), Course(good, SETTINGS, 0)])
    trainer.run()
    assert list(trainer.failed) == [0] and "lower train.optimizer.lr" in trainer.failed[0]
    assert torch.equal(students[0].cartridge.trainable_keys, cartridge(seed=0).trainable_keys)
    alone = Student(tiny_model, cartridge(seed=1))
    Trainer(TorchStepper([alone], SETTINGS), [Course(good, SETTINGS, 0)]).run()
    torch.testing.assert_close(students[1].cartridge.trainable_keys, alone.cartridge.trainable_keys)


def test_live_distractors_are_seen_as_they_are_by_then(tiny_model):
    own, other = cartridge(), loud(5, seed=1)
    pack = dataclasses.replace(packs([conversation(i) for i in range(6)], 0)[0], distractors=torch.tensor([0]))
    live = Student(tiny_model, own, distractors=[other], live=True)
    before = float(live(pack).loss.detach())
    with torch.no_grad():
        other.trainable_values.mul_(-1)
    after = live(pack).loss
    assert float(after.detach()) != pytest.approx(before, rel=1e-3)
    assert float(after.detach()) == pytest.approx(
        float(Student(tiny_model, own, distractors=[other])(pack).loss.detach()), rel=1e-6)
    after.backward()
    assert other.trainable_values.grad is None and own.trainable_values.grad is not None


@pytest.mark.parametrize("seed", range(5))
def test_packs_hold_every_conversation_once(seed):
    made = [conversation(i, shared=(i % 2) * 7, own=3 + (i * 37 + seed) % 150) for i in range(90)]
    plans = plan_packs(made, 32, 128, seed)
    assert sorted(i for plan in plans for row in plan.rows for i in row) == list(range(90))
    lengths = own_lengths(made)
    for plan in plans:
        assert len(plan.rows) <= 128 // plan.row_tokens
        assert all(sum(min(lengths[i], plan.row_tokens) for i in row) <= plan.row_tokens for row in plan.rows)
    assert plans == plan_packs(made, 32, 128, seed) != plan_packs(made, 32, 128, seed + 1)
    assert count_truncated(made, 128) == sum(length > 128 for length in lengths)


def test_targets_are_the_tokens_that_the_rows_predict():
    made = [conversation(i, shared=4) for i in range(9)]
    for plan in plan_packs(made, 32, 64, 0):
        pack = collate(made, plan, 64)
        assert torch.equal(pack.input_ids.flatten()[pack.loss_positions + 1], pack.targets)
        assert (pack.segment_ids.flatten()[pack.loss_positions] > 0).all()


def test_label_share_moves_mass_to_the_known_token():
    one = conversation(0)
    targets = np.array([one.topk_ids[0, 3], 1, one.topk_ids[2, 0], 2])
    ids, logprobs = with_label(one.topk_ids, one.topk_logprobs, targets, 0.5)
    probabilities = np.exp(logprobs) * (ids == targets[:, None])
    assert (probabilities.sum(1) >= 0.5 - 1e-6).all() and (np.exp(logprobs).sum(1) <= 1 + 1e-5).all()
    assert probabilities[0].sum() == pytest.approx(0.5 + 0.5 * np.exp(one.topk_logprobs[0, 3]), rel=1e-4)
    assert with_label(one.topk_ids, one.topk_logprobs, targets, 0)[0] is one.topk_ids


def test_learning_rate_warms_up_and_decays():
    settings = OptimizerSettings(lr=1.0, warmup_share=0.1, final_lr_share=0.02)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[-1] < 0.04
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_order_derives_steps_from_epochs():
    made = [conversation(i) for i in range(40)]
    settings = TrainSettings(num_tokens=8, row_tokens=32, pack_tokens=64, epochs=3, packs_per_step=1)
    order = Order(made, settings, seed=0)
    assert order.steps == pytest.approx(3 * order.per_epoch, abs=1)
    seen = [i for step in range(order.per_epoch) for plan in order.plans(step) for row in plan.rows for i in row]
    assert sorted(seen) == list(range(40))
