"""Generation on held-out questions during training: the cartridge that answers most of them is kept."""

import pytest
import torch

from cartridges.config import TrainSettings
from cartridges.distill.initialize import initialize
from cartridges.records import Question
from workflows.checkups import Checkups

TEXT = "The harbour master of Quell is Ida Brand. The toll is 41 crowns a ship, and the orchard has 730 trees."
QUESTIONS = (Question("a", "Who is the harbour master?", ("Ida Brand",)), Question("b", "What is the toll?", ("41",)))
SETTINGS = TrainSettings(num_tokens=16, init="prefix", trained_layers=1.0, evaluate_every=3)


@pytest.fixture
def cartridge(tiny_base_model):
    return initialize(tiny_base_model, TEXT, SETTINGS, 0)


def shifted(cartridge, by: float) -> None:
    with torch.no_grad():
        cartridge.trainable_values += by


def test_the_best_is_kept_and_restored_by_a_run_that_was_killed(tiny_base_model, cartridge, tmp_path):
    checkups = Checkups(tiny_base_model, cartridge, QUESTIONS, SETTINGS, tmp_path)
    assert checkups.best() is None
    start = cartridge.trainable_values.detach().clone()
    found = {3: checkups.run(3)}
    for step, by in ((6, 5.0), (9, -11.0)):
        shifted(cartridge, by)
        found[step] = Checkups(tiny_base_model, cartridge, QUESTIONS, SETTINGS, tmp_path).run(step)
    assert len({one["nll_per_token"] for one in found.values()}) == 3
    right = max(found, key=lambda step: (found[step]["contains"], -found[step]["nll_per_token"]))
    assert checkups.best() == {"step": right, **found[right]}
    checkups.restore()
    expected = {3: start, 6: start + 5.0, 9: start - 6.0}[right]
    torch.testing.assert_close(cartridge.trainable_values.detach(), expected)
    assert checkups.run(12) == pytest.approx(found[right])


def test_it_looks_every_so_many_steps_and_after_the_last(tiny_base_model, cartridge, tmp_path):
    def due(**update):
        settings = SETTINGS.model_copy(update=update)
        checkups = Checkups(tiny_base_model, cartridge, QUESTIONS, settings, tmp_path)
        return [step for step in range(1, 9) if checkups.due(step, 8)]

    assert due() == [3, 6, 8] and due(evaluate_every=0) == []
    assert not Checkups(tiny_base_model, cartridge, (), SETTINGS, tmp_path).due(3, 8)
