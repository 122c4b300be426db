"""The self-study questions that a training kept back, beside its manifest."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cartridges.records import Question
from workflows.runtime.manifests import read_manifest, write_manifest

HELD_OUT = "held_out.json"


def choosing(questions: Sequence[Question]) -> Sequence[Question]:
    """The half by which the best cartridge of a training is chosen."""
    return questions[::2]


def reporting(questions: Sequence[Question]) -> Sequence[Question]:
    """The other half: a report on the questions that chose the cartridge would flatter it."""
    return questions[1::2]


def write_held_out(file: Path, questions: Sequence[Question]) -> None:
    write_manifest(file, {"questions": [asdict(question) for question in questions]})


def read_held_out(file: Path) -> list[Question]:
    rows = read_manifest(file)["questions"]
    return [Question(row["question_id"], row["question"], tuple(row["answers"])) for row in rows]
