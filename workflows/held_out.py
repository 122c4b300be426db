"""The self-study questions that a training kept back, beside its manifest."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cartridges.records import Question
from workflows.stage import read_manifest, write_manifest

HELD_OUT = "held_out.json"


def write_held_out(file: Path, questions: Sequence[Question]) -> None:
    write_manifest(file, {"questions": [asdict(question) for question in questions]})


def read_held_out(file: Path) -> list[Question]:
    rows = read_manifest(file)["questions"]
    return [Question(row["question_id"], row["question"], tuple(row["answers"])) for row in rows]
