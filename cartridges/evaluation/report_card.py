"""The report card: the same questions in every arm, with confidence intervals and paired differences."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cartridges.config import EvaluateSettings
from cartridges.engines.base import CartridgePrefix, Engine
from cartridges.errors import UserError
from cartridges.evaluation.arms import ArmPrefix, build_arm, check_arms, window_room
from cartridges.evaluation.asking import Answered, Item, Progress, ask, num_requests, plan_items
from cartridges.evaluation.bootstrap import interval, mean_statistic, paired_interval
from cartridges.evaluation.metrics import CHRF_ORDER, chrf_score
from cartridges.files import write_atomically
from cartridges.models import BaseModel
from cartridges.records import Question

METRICS = ("contains", "exact_match", "f1", "nll_per_token", "choice_accuracy",
           "choice_accuracy_per_token", "chrf")
QuestionsSource = Literal["user", "held_out_self_study"]


@dataclass(frozen=True)
class Subject:
    """The cartridge under test and its corpus. Without `corpus_text` (`arms.text_for_arms`) the arms that read the
    corpus cannot run. `version` is None before it is known."""

    name: str
    cartridge: CartridgePrefix
    corpus_id: str
    corpus_fingerprint: str
    corpus_tokens: int
    corpus_text: str | None
    version: str | None = None


@dataclass(frozen=True)
class Report:
    """`card` is the JSON for the manifest; `rows` has one JSON object per question and arm."""

    card: dict[str, Any]
    rows: list[dict[str, Any]]

    def save(self, directory: str | Path) -> None:
        """Write `rows.jsonl` and then `report_card.json` into `directory`, each by rename."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        write_atomically(directory / "rows.jsonl", lines)
        write_atomically(directory / "report_card.json", json.dumps(self.card, indent=1) + "\n")


def report_card(engine: Engine, base: BaseModel, subject: Subject, questions: Sequence[Question],
                settings: EvaluateSettings, seed: int, *, wrong: CartridgePrefix | None = None,
                questions_source: QuestionsSource = "user", build: dict[str, Any] | None = None,
                notes: Sequence[str] = (), progress: Progress | None = None) -> Report:
    """Run `settings.arms` over `questions` and assemble the card.

    `wrong` is the wrong_cartridge arm's cartridge; None uses the bundled decoy. `build` is included
    unchanged. Raises `UserError` without questions, or for an arm that cannot be built.
    """
    if not questions:
        raise UserError("there are no questions to ask; give some with --questions")
    check_arms(settings.arms, has_text=subject.corpus_text is not None)
    items = plan_items(questions, base.template, seed, settings.max_questions)
    arms, answered, seconds = {}, {}, {}
    tick = _Ticker(progress, total=num_requests(items) * len(settings.arms))
    for arm in settings.arms:
        tick.label, start = arm, time.monotonic()
        arms[arm] = build_arm(arm, base, subject.cartridge, wrong, subject.corpus_text,
                              _room(base, items, settings))
        answered[arm] = ask(engine, items, arms[arm].prefix, settings.max_answer_tokens, tick)
        seconds[arm] = time.monotonic() - start
    card = {
        "corpus": {"id": subject.corpus_id, "fingerprint": subject.corpus_fingerprint,
                   "tokens": subject.corpus_tokens},
        "cartridge": _cartridge_part(subject, base),
        "arms": {arm: _arm_part(arms[arm], answered[arm], base, settings, seed) | {"seconds": seconds[arm]}
                 for arm in arms},
        "paired": _paired_part(answered, settings, seed),
        "controls": _controls(answered),
        "questions": {"asked": len(items), "given": len(questions), "source": questions_source,
                      "seed": seed, "max_answer_tokens": settings.max_answer_tokens},
        "build": build or {},
        "machine": machine(base),
        "notes": [*notes, *_arm_notes(arms.values(), subject)],
    }
    return Report(card, [_row(arm, one) for arm in answered for one in answered[arm]])


def machine(base: BaseModel) -> dict[str, Any]:
    """The model, machine and versions with which the figures were measured."""
    import torch

    device = torch.cuda.get_device_name() if base.device.startswith("cuda") else base.device
    return {"model": base.identity.name, "device": device, "dtype": str(base.dtype).removeprefix("torch."),
            "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.platform(),
            "torch": torch.__version__}


class _Ticker:
    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done, self.label = progress, total, 0, ""

    def __call__(self, count: int) -> None:
        self.done += count
        if self.progress:
            self.progress(self.done, self.total, self.label)


def _room(base: BaseModel, items: Sequence[Item], settings: EvaluateSettings) -> int:
    scored = [item.input_ids + ids for item in items for ids in item.candidate_ids]
    return window_room(base, scored, settings.max_answer_tokens)


def _bytes_per_token(base: BaseModel) -> int:
    return base.shape.bytes_per_token(base.dtype.itemsize)


def _cartridge_part(subject: Subject, base: BaseModel) -> dict[str, Any]:
    num_tokens = subject.cartridge.cartridge.num_tokens
    part = {"name": subject.name, "num_tokens": num_tokens,
            "bytes": num_tokens * _bytes_per_token(base),
            "compression_ratio": subject.corpus_tokens / num_tokens}
    return part if subject.version is None else part | {"version": subject.version}


def _arm_part(arm: ArmPrefix, answered: list[Answered], base: BaseModel, settings: EvaluateSettings,
              seed: int) -> dict[str, Any]:
    figures = {metric: interval(values, settings.bootstrap_samples, seed, statistic)
               for metric, (values, statistic) in _columns(answered).items()}
    part = {"metrics": figures, "kv_bytes": arm.num_tokens * _bytes_per_token(base),
            "num_tokens": arm.num_tokens}
    if arm.truncated_to_window is not None:
        part["truncated_to_window"] = arm.truncated_to_window
    return part


def _paired_part(answered: dict[str, list[Answered]], settings: EvaluateSettings,
                 seed: int) -> dict[str, Any]:
    if "cartridge" not in answered:
        return {}
    ours = _columns(answered["cartridge"])
    return {f"cartridge-{arm}": {
        metric: paired_interval(values, theirs[metric][0], settings.bootstrap_samples, seed, statistic)
        for metric, (values, statistic) in ours.items()}
        for arm, theirs in ((arm, _columns(answered[arm])) for arm in answered if arm != "cartridge")}


def _columns(answered: list[Answered]) -> dict[str, tuple[np.ndarray, Any]]:
    """Per-question values and statistic of each metric. Questions for which a metric is not defined are omitted;
    this depends only on the question, so the arms remain paired."""
    columns = {}
    for metric in METRICS:
        having = [one for one in answered if metric in one.values]
        if not having:
            continue
        if metric == "chrf":
            columns[metric] = (np.stack([one.chrf_statistics.ravel() for one in having]), _corpus_chrf)
        else:
            columns[metric] = (np.array([one.values[metric] for one in having]), mean_statistic)
    return columns


def _corpus_chrf(means: np.ndarray) -> np.ndarray:
    return chrf_score(means.reshape(*means.shape[:-1], CHRF_ORDER, 3))


def _controls(answered: dict[str, list[Answered]]) -> dict[str, float]:
    """How far exact_kv, which uses the cartridge path, differs from full_context; it must be equal."""
    if not {"exact_kv", "full_context"} <= answered.keys():
        return {}
    pairs = list(zip(answered["exact_kv"], answered["full_context"], strict=True))
    gaps = [abs(left.values["nll_per_token"] - right.values["nll_per_token"]) for left, right in pairs]
    same = [left.output == right.output for left, right in pairs if left.output is not None]
    controls = {"exact_kv_max_nll_gap": max(gaps)}
    return controls | {"exact_kv_same_outputs": sum(same) / len(same)} if same else controls


def _arm_notes(arms, subject: Subject) -> list[str]:
    notes = [f"{arm.arm}: the corpus is longer than the model's window; its first part was read, "
             f"{arm.truncated_to_window} tokens" for arm in arms if arm.truncated_to_window is not None]
    p = subject.cartridge.cartridge.num_tokens
    notes += [f"wrong_cartridge has {arm.num_tokens} tokens, the cartridge {p}" for arm in arms
              if arm.arm == "wrong_cartridge" and arm.num_tokens < 0.9 * p]
    return notes


def _row(arm: str, one: Answered) -> dict[str, Any]:
    item = one.item
    return {"arm": arm, "question_id": item.question.question_id, "question": item.question.question,
            "answers": list(item.question.answers), "output": one.output,
            "finish_reason": one.finish_reason, "candidates": list(item.candidates), **one.values}
