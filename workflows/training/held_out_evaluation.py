"""Evaluates the cartridge on the held-out self-study questions during training, and keeps the best one.

A falling loss does not say that the answers get better, so the cartridge that is published can be the one that
answered most held-out questions. `best.safetensors` in the run's directory is that cartridge so far, and tells
in its header at which step and how well it did.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cartridges.config import TrainSettings
from cartridges.engines.base import CartridgePrefix
from cartridges.engines.transformers import TransformersEngine
from cartridges.evaluation.asking import Item, ask, plan_items
from cartridges.files import replacing
from cartridges.records import Question
from workflows.training.held_out_questions import choosing

BEST = "best.safetensors"
MAX_ANSWER_TOKENS = 24


class HeldOutEvaluation:
    """Every `evaluate_every` steps and after the last. A resumed run goes on from the best that is there.

    Half of `questions` are asked; the others are left for a report card. Only who `keeps` writes.
    """

    def __init__(self, base, cartridge, questions: Sequence[Question], settings: TrainSettings, output: Path,
                 keeps: bool = True):
        self.base, self.cartridge, self.every, self.keeps = base, cartridge, settings.evaluate_every, keeps
        self.items = [_gold_alone(item) for item in plan_items(choosing(questions), base.template, 0)]
        self.file = output / BEST

    def due(self, done: int, steps: int) -> bool:
        """Whether to evaluate after `done` of `steps` steps."""
        return bool(self.every and self.items) and (done % self.every == 0 or done == steps)

    def run(self, done: int) -> dict[str, float]:
        """Share of the questions whose answer was said (`contains`), and the gold answers' NLL (nats a token)."""
        prefix = CartridgePrefix(self.cartridge, f"step {done}")
        # An engine of its own each time: what one keeps of a prefix would be of an earlier step.
        answered = ask(TransformersEngine(self.base), self.items, prefix, MAX_ANSWER_TOKENS, lambda _: None)
        found = {name: mean(one.values[name] for one in answered) for name in ("contains", "nll_per_token")}
        if self.keeps and self._better(found):
            self._keep({"step": done, **found})
        return found

    def best(self) -> dict[str, float] | None:
        """Where and how well the best did; None while there is none."""
        if not self.file.is_file():
            return None
        with safe_open(self.file, "pt") as file:
            return {name: float(value) for name, value in file.metadata().items()}

    def restore(self) -> None:
        """Make the cartridge the best one."""
        self.cartridge.load_state_dict(load_file(self.file, device=str(self.cartridge.trainable_keys.device)))

    def _better(self, found: dict[str, float]) -> bool:
        best = self.best()
        # Where as many answers are right, the more likely ones win.
        return best is None or _rank(found) > _rank(best)

    def _keep(self, told: dict[str, float]) -> None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.cartridge.state_dict().items()}
        with replacing(self.file) as temporary:
            save_file(state, temporary, metadata={name: repr(value) for name, value in told.items()})


def _gold_alone(item: Item) -> Item:
    """The item without a choice: only the gold answer is scored."""
    return replace(item, candidates=(item.candidates[item.gold],),
                   candidate_ids=(item.candidate_ids[item.gold],), gold=0)


def _rank(found: dict[str, float]) -> tuple[float, float]:
    return found["contains"], -found["nll_per_token"]
