"""One cartridge for each corpus of a collection: synthesized and trained side by side.

    WORKDIR/<name>/                 as for one build, but without build.json
    WORKDIR/together-<fingerprint>/ the synthesis that they share, while it runs
    WORKDIR/cohort-<fingerprint>/   the training that they share, likewise
    WORKDIR/collection.json         the result of the last finished run

The same command goes on where it stopped, and does nothing again for a corpus that has not changed (but with
`cohort.acquainted`, where the company of each is part of what it is).
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from cartridges.collection import Part, names, parts
from cartridges.config import BuildSettings
from cartridges.corpus import ids_with_questions, load_corpus, load_questions
from cartridges.errors import UserError
from cartridges.registry import Registry, check_name
from workflows.building.build import Job, Made, dataset_place, finish, prepare
from workflows.building.planning import say, settle
from workflows.runtime.manifests import Failed, fingerprint, write_manifest
from workflows.synthesis.dataset import MANIFEST as DATASET
from workflows.synthesis.dataset import corpus_tokens
from workflows.synthesis.synthesize_many import DatasetSpec, synthesize_many
from workflows.training.cohort import train_cohort, with_wave_distractors
from workflows.training.records import Member

STEP = 32
"""Cartridges that are sized by their corpora are of a multiple of so many slots: engines share whole blocks."""


def build_each(corpus: str, name: str, settings: BuildSettings, registry: str, questions: str | None = None,
               workdir: str | None = None) -> dict[str, Any]:
    """A cartridge `NAME.<id>` for each corpus at `corpus`: `{cartridges: [{name, version, corpus_id, report_card}],
    failed: [{name, corpus_id, error}], seconds, workdir, registry}`.

    `settings.budget` is shared by all of them, in proportion to their tokens. One that fails does not stop the others.
    Raises `UserError` for whatever is wrong with any corpus, the questions or the settings, before anything begins.
    """
    start, work = time.monotonic(), Path(workdir or f"runs/{name}")
    check_name(name)
    _check(settings)
    chosen = parts(corpus, settings.corpus.corpus_id)
    jobs = _jobs(chosen, names(name, chosen), settings, Registry(registry), questions, work)
    say(f"{len(jobs)} corpora, {sum(job.settings.train.num_tokens for job in jobs)} slots in all; "
        f"{min(len(jobs), settings.cohort.active)} are trained at once")
    jobs = _with_plans(jobs, settings)
    made, failed = _make(jobs, name, settings, work)
    published = []
    for job, one in made:
        try:
            published.append({"corpus_id": job.loaded.corpus_id, **finish(job, one)})
        except UserError as error:  # no question to ask it
            failed.append((job, str(error)))
    result = {
        "cartridges": published,
        "failed": [{"corpus_id": job.loaded.corpus_id, "name": job.name, "error": error} for job, error in failed],
        "registry": registry, "workdir": str(work), "seconds": time.monotonic() - start}
    write_manifest(work / "collection.json", result)
    return result


def _check(settings: BuildSettings) -> None:
    if settings.train.loss == "none" or settings.curriculum.rounds > 1:
        raise UserError("--each trains many cartridges at once: leave --loss none and --curriculum out")
    if settings.train.zero_stage in (1, 2):
        raise UserError(f"train.zero_stage={settings.train.zero_stage} cuts up the optimiser's state of one cartridge; "
                        "with --each use 0 or 3")
    if settings.cohort.acquainted and settings.train.distractors:
        raise UserError("cohort.acquainted makes the members of a wave each other's distractors; leave "
                        "train.distractors out")


def _jobs(chosen: Sequence[Part], called: Sequence[str], settings: BuildSettings, store: Registry,
          questions: str | None, work: Path) -> list[Job]:
    """All of them, checked."""
    asked_of = ids_with_questions(questions) if questions else frozenset()
    ids = {part.corpus_id for part in chosen}
    if questions:
        say(f"{questions} has questions about {len(ids & asked_of)} of the {len(ids)}"
            + (f", and about others: {', '.join(sorted(asked_of - ids)[:4])}" if asked_of - ids else ""))
    jobs = []
    for part, name in zip(chosen, called, strict=True):
        try:
            loaded, own = load_corpus(part.path, part.corpus_id), _settings_of(part, settings)
            if settings.cohort.compression:
                slots = round(corpus_tokens(loaded, own) / settings.cohort.compression / STEP) * STEP
                own = own.model_copy(update={"train": own.train.model_copy(update={"num_tokens": max(STEP, slots)})})
            asked = loaded.questions
            if questions:
                asked = load_questions(questions, part.corpus_id) if part.corpus_id in asked_of else ()
            jobs.append(prepare(part.path, loaded, name, own, store, asked, work / name))
        except UserError as error:
            raise UserError(f"{part.corpus_id}: {error}") from None
    return jobs


def _settings_of(part: Part, settings: BuildSettings) -> BuildSettings:
    return settings.model_copy(update={
        "corpus": settings.corpus.model_copy(update={"corpus_id": part.corpus_id})})


def _with_plans(jobs: Sequence[Job], settings: BuildSettings) -> list[Job]:
    """Each with its share of the budget, by its tokens."""
    from workflows.building.budget import START_SECONDS, parse_budget

    sizes = [corpus_tokens(job.loaded, job.settings) for job in jobs]
    planned = []
    for job, size in zip(jobs, sizes, strict=True):
        seconds = None
        wanted = parse_budget(settings.budget) if settings.budget is not None else None
        if wanted and wanted.unit == "seconds":  # Costs that are paid once are in the plan of each.
            left = max(0.0, wanted.amount - START_SECONDS)
            seconds = START_SECONDS + left * size / sum(sizes)
        elif wanted:
            share = f"{max(1, round(wanted.amount * size / sum(sizes)))}{wanted.unit}"
            job = replace(job, settings=job.settings.model_copy(update={"budget": share}))
        try:
            planned.append(replace(job, settings=settle(job.loaded, job.settings, job.work, seconds)))
        except UserError as error:
            raise UserError(f"of --budget {settings.budget} for {len(jobs)} corpora the share of "
                            f"{job.loaded.corpus_id}, by its tokens: {error} for it alone") from None
    return planned


def _make(jobs: Sequence[Job], name: str, settings: BuildSettings,
          work: Path) -> tuple[list[tuple[Job, Made]], list[tuple[Job, str]]]:
    """Synthesis and training: the jobs with what was made, and those that failed with the reason."""
    from workflows.runtime.local_ray import local_ray

    failed: list[tuple[Job, str]] = []
    ready: list[tuple[Job, dict[str, Any], Member]] = []
    wanted = [DatasetSpec(job.loaded, dataset_place(job)[1], job.settings) for job in jobs]
    with ExitStack() as stack:
        if not all((one.output / DATASET).is_file() for one in wanted):
            stack.enter_context(local_ray())  # one Ray for both stages
        datasets = synthesize_many(wanted, work, name, job=name)
        for job, dataset in zip(jobs, datasets, strict=True):
            try:
                if isinstance(dataset, Failed):
                    raise UserError(dataset.reason)
                ready.append((job, dataset, _member(job)))
            except UserError as error:  # nothing to train on
                failed.append((job, str(error)))
        if not ready:
            raise UserError(f"nothing could be trained; {failed[0][0].name}: {failed[0][1]}")
        members = [member for _, _, member in ready]
        if settings.cohort.acquainted:
            members = [replace(member, output=job.work / f"train-{member.fingerprint}")
                       for (job, _, _), member in zip(ready, with_wave_distractors(members), strict=True)]
        todo = [member.fingerprint for member in members if member.manifest is None]
        together = work / f"cohort-{fingerprint(todo)}"
        manifests = train_cohort(members, together, name, job=name)
    made = []
    for (job, dataset, _), member, manifest in zip(ready, members, manifests, strict=True):
        if isinstance(manifest, Failed):
            failed.append((job, manifest.reason))
        else:
            made.append((job, Made(dataset, manifest, member.output / "cartridge")))
    return made, failed


def _member(job: Job) -> Member:
    from workflows.training.train import member_of, train_fingerprint

    of_dataset, dataset_dir = dataset_place(job)
    output = job.work / f"train-{train_fingerprint(of_dataset, job.settings)}"
    return member_of(str(dataset_dir), job.corpus, job.loaded, str(output), job.settings)
