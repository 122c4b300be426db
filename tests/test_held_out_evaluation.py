"""Generation on held-out questions during training: the cartridge that answers most of them is kept."""

from types import SimpleNamespace

import pytest
import torch

from cartridges.config import TrainSettings
from cartridges.distill.initialize import initialize
from cartridges.records import Question
from workflows.training.held_out_evaluation import HeldOutEvaluation
from workflows.training.held_out_questions import choosing, reporting

TEXT = "The harbour master of Quell is Ida Brand. The toll is 41 crowns a ship, and the orchard has 730 trees."
QUESTIONS = (Question("a", "Who is the harbour master?", ("Ida Brand",)), Question("b", "What is the toll?", ("41",)))
SETTINGS = TrainSettings(num_tokens=16, init="prefix", trained_layers=1.0, evaluate_every=3)


@pytest.fixture
def cartridge(tiny_base_model):
    return initialize(tiny_base_model, TEXT, SETTINGS, 0)


def shifted(cartridge, by: float) -> None:
    with torch.no_grad():
        cartridge.trainable_values += by


@pytest.mark.parametrize("best", [3, 6, 9])
def test_the_best_is_kept_and_restored_by_a_run_that_was_killed(tiny_base_model, cartridge, tmp_path, monkeypatch,
                                                                best):
    """The most accurate; of equals, the one whose answers are likelier."""
    told = {3: (0.5, 4.0), 6: (0.5, 5.0), 9: (0.25, 1.0)}
    if best != 3:
        told[best] = (told[best][0] + 0.5, 9.0)

    def answer(engine, items, prefix, *_):
        contains, nll = told[int(prefix.digest.removeprefix("step "))]
        return [SimpleNamespace(values={"contains": contains, "nll_per_token": nll})]

    monkeypatch.setattr("workflows.training.held_out_evaluation.ask", answer)
    assert HeldOutEvaluation(tiny_base_model, cartridge, QUESTIONS, SETTINGS, tmp_path).best() is None
    start = cartridge.trainable_values.detach().clone()
    for step in told:
        shifted(cartridge, float(step))
        HeldOutEvaluation(tiny_base_model, cartridge, QUESTIONS, SETTINGS, tmp_path).run(step)
    held_out_evaluation = HeldOutEvaluation(tiny_base_model, cartridge, QUESTIONS, SETTINGS, tmp_path)
    assert held_out_evaluation.best() == {"step": best, "contains": told[best][0], "nll_per_token": told[best][1]}
    held_out_evaluation.restore()
    torch.testing.assert_close(cartridge.trainable_values.detach(), start + {3: 3, 6: 9, 9: 18}[best])


def test_what_is_asked_is_what_the_cartridge_answers_now(tiny_base_model, cartridge, tmp_path):
    """And of half of the questions: a report card asks the others."""
    held_out_evaluation = HeldOutEvaluation(tiny_base_model, cartridge, QUESTIONS, SETTINGS, tmp_path)
    assert [item.question for item in held_out_evaluation.items] == list(choosing(QUESTIONS)) == [QUESTIONS[0]]
    assert list(reporting(QUESTIONS)) == [QUESTIONS[1]]
    before = held_out_evaluation.run(3)
    shifted(cartridge, 5.0)
    after = held_out_evaluation.run(6)
    assert before != after
    shifted(cartridge, -5.0)
    assert held_out_evaluation.run(9) == pytest.approx(before, abs=1e-4)


def test_it_looks_every_so_many_steps_and_after_the_last(tiny_base_model, cartridge, tmp_path):
    def due(**update):
        settings = SETTINGS.model_copy(update=update)
        held_out_evaluation = HeldOutEvaluation(tiny_base_model, cartridge, QUESTIONS, settings, tmp_path)
        return [step for step in range(1, 9) if held_out_evaluation.due(step, 8)]

    assert due() == [3, 6, 8] and due(evaluate_every=0) == []
    assert not HeldOutEvaluation(tiny_base_model, cartridge, (), SETTINGS, tmp_path).due(3, 8)
