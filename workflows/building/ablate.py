"""`cartridges ablate`: what settings are worth on a corpus, by the answers of cartridges that differ in nothing else.

    WORKDIR/                the work of a build (`building.build`); stages that a variation does not change are shared
    WORKDIR/ablation.json   the result of the last finished run

Nothing is published.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus, load_questions
from cartridges.errors import UserError
from cartridges.evaluation.bootstrap import interval, paired_interval
from cartridges.registry import Registry
from workflows.building.build import REPORT_CARD, Job, examine, make, prepare
from workflows.building.planning import say, settle
from workflows.runtime.local_ray import one_local_ray
from workflows.runtime.manifests import read_manifest, write_manifest

NAME = "ablation"
GIVEN = "as given"
METRICS = ("contains", "nll_per_token", "choice_accuracy")


@dataclass(frozen=True)
class Variation:
    """Settings that differ from those given by what `label` says."""

    label: str
    settings: BuildSettings


def ablate(corpus: str, given: BuildSettings, varied: Sequence[Variation], registry: str,
           questions: str | None = None, workdir: str | None = None) -> dict[str, Any]:
    """Train with the settings `given` and with each of `varied`, and ask all the same questions:
    `{full_context, variations: [{label, metrics, paired, kept, steps, seconds}], failed, seconds}`, the given ones
    first; `paired` is variation minus given, by question.

    All are examined alike: by `given.evaluate`, drawn by its seed. Raises `UserError` for whatever is wrong before
    anything is made; a variation that cannot be built is listed under `failed`.
    """
    start, work = time.monotonic(), Path(workdir or f"runs/{NAME}")
    jobs = _jobs(corpus, [Variation(GIVEN, given), *varied], Registry(registry), questions, work)
    with one_local_ray():
        tried, failed = _try_each(jobs, given)
    card = tried[0]["card"]
    full = card["arms"].get("full_context", {"metrics": {}})["metrics"]
    result = {"full_context": {metric: full[metric] for metric in METRICS if metric in full},
              "variations": [_against(tried[0], one, given) for one in tried], "failed": failed,
              "questions": card["questions"], "machine": card["machine"], "workdir": str(work),
              "seconds": time.monotonic() - start}
    write_manifest(work / "ablation.json", result)
    return result


def _jobs(corpus: str, all_of_them: Sequence[Variation], store: Registry, questions: str | None,
          work: Path) -> dict[str, Job]:
    """The jobs by label, checked. Raises `UserError`."""
    given, jobs, seen = all_of_them[0].settings, {}, []
    loaded = load_corpus(corpus, given.corpus.corpus_id)
    asked = load_questions(questions, given.corpus.corpus_id) if questions else loaded.questions
    if not asked:  # those of self-study would be others for each
        raise UserError(f"{corpus} has no questions to compare by; give some with --questions")
    if "cartridge" not in given.evaluate.arms:
        raise UserError("evaluate.arms leaves the cartridge out, which is what is compared")
    for one in all_of_them:
        what = one.settings.model_dump(exclude={"serve", "cohort"})
        if what in seen:
            raise UserError(f"--vary {one.label} changes nothing, or is given twice")
        if (one.settings.evaluate, one.settings.corpus) != (given.evaluate, given.corpus):
            raise UserError(f"--vary {one.label}: corpus and evaluate must be the same for all")
        if one.settings.model.name != given.model.name:
            raise UserError(f"--vary {one.label}: likelihoods of another model's tokens cannot be compared")
        try:
            jobs[one.label] = prepare(corpus, loaded, NAME, one.settings, store, asked, work)
        except UserError as error:
            raise UserError(f"{one.label}: {error}") from None
        seen.append(what)
    return jobs


def _try_each(jobs: dict[str, Job], given: BuildSettings) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The results, those of the given settings first, and the failures."""
    base = _try(GIVEN, jobs.pop(GIVEN), given)
    tried, failed = [base], []
    for number, (label, job) in enumerate(jobs.items(), 1):
        say(f"{label} ({number} of {len(jobs)} variations)")
        try:
            tried.append(_try(label, _as_many(job, base["settings"], given), given))
        except (UserError, RuntimeError) as error:  # a loss that is not finite, too many conversations that raise
            failed.append({"label": label, "error": str(error)})
            say(f"{label}: {error}")
    return tried, failed


def _as_many(job: Job, settled: BuildSettings, given: BuildSettings) -> Job:
    """With as many conversations as the given settings came to, where nothing that they are made of differs: then they
    are the same ones, whatever a budget would plan for it now."""
    own = job.settings
    if (own.model, own.synthesize, own.seed, own.budget) != (given.model, given.synthesize, given.seed, given.budget):
        return job
    return replace(job, settings=own.model_copy(update={"synthesize": settled.synthesize}))


def _try(label: str, job: Job, given: BuildSettings) -> dict[str, Any]:
    job = replace(job, settings=settle(job.loaded, job.settings, job.work))
    made = make(job)
    evaluate = given.evaluate
    if label != GIVEN:  # the other arms do not change
        evaluate = evaluate.model_copy(update={"arms": ("cartridge",)})
    examined = replace(job, settings=job.settings.model_copy(update={"evaluate": evaluate, "seed": given.seed}))
    place = examine(examined, made)
    return {"label": label, "card": read_manifest(place / REPORT_CARD), "rows": _rows(place / "rows.jsonl"),
            "settings": job.settings, "kept": made.conversations["kept"], "steps": made.training["steps"],
            "seconds": made.seconds}


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of the arm `cartridge`, one a question."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["arm"] == "cartridge"]


def _against(base: dict[str, Any], one: dict[str, Any], given: BuildSettings) -> dict[str, Any]:
    how = (given.evaluate.bootstrap_samples, given.seed)
    metrics, paired = {}, {}
    for metric in METRICS:
        both = [(mine[metric], theirs[metric]) for mine, theirs in zip(one["rows"], base["rows"], strict=True)
                if metric in mine and metric in theirs]
        if both:
            mine, theirs = np.array(both, float).T
            metrics[metric], paired[metric] = interval(mine, *how), paired_interval(mine, theirs, *how)
    return {key: one[key] for key in ("label", "kept", "steps", "seconds")} | {
        "metrics": metrics, **({"paired": paired} if one is not base else {})}
