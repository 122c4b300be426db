"""Rounds of synthesis and training: each asks more where the cartridge so far knows least, and goes on from it.

    WORKDIR/synthesize-<fingerprint>/, WORKDIR/train-<fingerprint>/    one of each a round
    WORKDIR/train-<fingerprint>/remaining.json                         what the round left to be learned

Later rounds train on the conversations of the earlier ones too, and never on the questions that the first
round held out. A round that does not lower those questions' NLL is the last, and its cartridge is not taken.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.records import Corpus, Question
from workflows.runtime.manifests import read_manifest, write_manifest
from workflows.synthesis.dataset import dataset_fingerprint
from workflows.synthesis.synthesize import synthesize
from workflows.training.held_out_questions import HELD_OUT, read_held_out
from workflows.training.train import train, train_fingerprint

HELD_OUT_QUESTIONS = 64


@dataclass(frozen=True)
class Round:
    """One finished round. `nll` is of the held-out questions, nats a token; `weights` are the next round's."""

    dataset_dir: Path
    train_dir: Path
    dataset: dict[str, Any]
    trained: dict[str, Any]
    nll: float
    weights: dict[str, float]


def run_rounds(corpus: str, loaded: Corpus, name: str, settings: BuildSettings, work: Path,
               say: Callable[[str], None]) -> list[Round]:
    """The rounds that helped, in order; the last one's cartridge is the best. Resumes; done is done.

    `say` is told how each round went. Raises `UserError` where self-study gave no question that could be held out.
    """
    rounds: list[Round] = []
    for number in range(settings.curriculum.rounds):
        one = _run_round(corpus, loaded, name, _settings_of(settings, rounds), work, rounds)
        if one is None:
            say(f"round {number + 1} found no new conversation; the cartridge of the one before is taken")
            break
        say(f"round {number + 1}: held-out NLL {one.nll:.3f} nats a token, "
            f"{one.dataset['conversations']['kept']} new conversations")
        if rounds and rounds[-1].nll - one.nll < settings.curriculum.min_gain:
            say(f"round {number + 1} gained less than curriculum.min_gain; the cartridge of the one before is taken")
            break
        rounds.append(one)
    return rounds


def _settings_of(settings: BuildSettings, rounds: Sequence[Round]) -> BuildSettings:
    """Settings of the next round: another seed and, from the second round on, the cartridge so far as the start."""
    held_out = max(settings.train.held_out, HELD_OUT_QUESTIONS)
    update: dict[str, Any] = {"held_out": held_out}
    if rounds:
        update |= {"init": "cartridge", "init_cartridge": str((rounds[-1].train_dir / "cartridge").resolve())}
    return settings.model_copy(update={
        "seed": settings.seed + len(rounds), "train": settings.train.model_copy(update=update)})


def _run_round(corpus: str, loaded: Corpus, name: str, settings: BuildSettings, work: Path,
               rounds: Sequence[Round]) -> Round | None:
    """The round after `rounds`, or None where all that it made had been there before."""
    weights = rounds[-1].weights if rounds else None
    earlier = tuple(str(one.dataset_dir) for one in rounds)
    held_out = str(rounds[0].train_dir / HELD_OUT) if rounds else None
    of_dataset = dataset_fingerprint(loaded, settings, weights, earlier)
    dataset_dir = work / f"synthesize-{of_dataset}"
    train_dir = work / f"train-{train_fingerprint(of_dataset, settings, earlier, held_out)}"
    dataset = synthesize(loaded, str(dataset_dir), settings, job=name, weights=weights, earlier=earlier)
    if rounds and dataset["conversations"]["kept"] == 0:
        return None
    trained = train(str(dataset_dir), corpus, loaded, str(train_dir), settings, job=name, earlier=earlier,
                    held_out=held_out)
    told = read_manifest(train_dir / "remaining.json")
    if told is None:
        told = _measure(dataset_dir, train_dir, settings)
        write_manifest(train_dir / "remaining.json", told)
    return Round(dataset_dir, train_dir, dataset, trained, told["held_out_nll"], told["weights"])


def _measure(dataset_dir: Path, train_dir: Path, settings: BuildSettings) -> dict[str, Any]:
    """NLL of the held-out questions, and the KL that is left on each chunk of the round's conversations."""
    from cartridges import artifact
    from cartridges.distill.remaining import chunk_weights, remaining_kl
    from cartridges.distill.student import Student
    from cartridges.models import load_base_model
    from cartridges.selfstudy.storage import load_conversations

    base, loaded = load_base_model(settings.model), artifact.load(train_dir / "cartridge")
    nll = held_out_nll(base, loaded, _questions(train_dir / HELD_OUT))
    student = Student(base.model, loaded.cartridge.to(base.device))
    kl = remaining_kl(student, load_conversations(dataset_dir / "shards"), settings.train, settings.seed, base.device)
    return {"held_out_nll": nll, "kl": kl, "weights": chunk_weights(kl, settings.curriculum.sharpness)}


def _questions(file: Path) -> tuple[Question, ...]:
    questions = read_held_out(file)
    if not questions:
        raise UserError("the curriculum has nothing to judge its rounds by: no self-study question with a short "
                        "answer could be held out; plan more conversations or add the family anchored")
    return tuple(questions)


def held_out_nll(base, loaded, questions: Sequence[Question]) -> float:
    """Mean over `questions` of the gold answer's NLL (nats a token) after the artifact's cartridge."""
    from cartridges.engines.base import CartridgePrefix
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.evaluation.asking import plan_items, score_requests

    prefix = CartridgePrefix(loaded.cartridge, loaded.digest)
    requests = [score_requests([item], prefix)[item.gold] for item in plan_items(questions, base.template, 0)]
    scores = TransformersEngine(base).score(requests)
    return -sum(float(score.logprobs.mean()) for score in scores) / len(scores)


def joined(rounds: Sequence[Round]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(data set manifest, training manifest)` of all `rounds` together, for the report card."""
    dropped: Counter = Counter()
    for one in rounds:
        dropped.update(one.dataset["conversations"]["dropped"])
    dataset = {
        **rounds[0].dataset, "planned": sum(one.dataset["planned"] for one in rounds),
        "seconds": sum(one.dataset["seconds"] for one in rounds),
        "conversations": {"kept": sum(one.dataset["conversations"]["kept"] for one in rounds),
                          "dropped": dict(dropped)},
        "tokens": {kind: sum(one.dataset["tokens"][kind] for one in rounds) for kind in ("input", "loss")},
    }
    trained = {**rounds[-1].trained, "seconds": sum(one.trained["seconds"] for one in rounds),
               "steps": sum(one.trained["steps"] for one in rounds),
               "rounds": [{"held_out_nll": one.nll, "kept": one.dataset["conversations"]["kept"]} for one in rounds]}
    return dataset, trained
