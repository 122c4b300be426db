"""`cartridges evaluate`: the report card of a cartridge that is in the registry."""

import logging
from pathlib import Path
from typing import Any

from cartridges import artifact
from cartridges.artifact import Manifest
from cartridges.config import Arm, BuildSettings
from cartridges.corpus import has_corpus, holds_text, load_corpus, load_questions
from cartridges.evaluation.arms import CORPUS_ARMS, check_arms
from cartridges.records import Corpus
from cartridges.registry import Registry
from workflows.evaluation.base_model import model_of
from workflows.evaluation.report import Examination, report_on
from workflows.runtime.tracking import track

logger = logging.getLogger(__name__)


def evaluate(name: str, registry: str, questions: str, corpus: str | None, settings: BuildSettings,
             arms: tuple[Arm, ...] | None = None, workdir: str | None = None) -> dict[str, Any]:
    """Run the report card of `name` (`name[@version|@alias]`) over the questions file.

    The corpus for the arms that read it is `corpus`, or the questions' rows where they carry `text`.
    Without either these arms are left out, unless `arms` asks for them: then `UserError`. Card and
    rows are kept in `workdir` (default `runs/<name>`) under `evaluate/`. Returns the card.
    """
    store = Registry(registry)
    entry = store.resolve(name)
    loaded = artifact.load(store.get(f"{entry.name}@{entry.version}"))
    asked = load_questions(questions, row_id(questions, settings, loaded.manifest))
    given = _load_given_corpus(questions, corpus, settings, loaded.manifest)
    arms, notes = _possible_arms(arms, settings, given)
    notes += _fingerprint_notes(given, loaded.manifest)
    chosen = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"arms": arms})})
    examination = Examination(entry.name, loaded, given, asked, model_of(loaded.manifest, settings.model), chosen,
                              store, notes=tuple(notes))
    work = Path(workdir or Path("runs") / entry.name)
    with track("evaluate", entry.name, settings.model_dump(), work) as run:
        report = report_on(examination)
        run.report_card(report.card)
    report.save(work / "evaluate")
    for note in report.card["notes"]:
        logger.warning("%s", note)
    return report.card


def row_id(path: str, settings: BuildSettings, manifest: Manifest) -> str | None:
    """Which rows of a JSONL: those the user names, else those the cartridge was built from."""
    if settings.corpus.corpus_id is not None:
        return settings.corpus.corpus_id
    if Path(path).suffix.lower() in (".jsonl", ".ndjson") and Path(path).is_file() \
            and has_corpus(path, manifest.corpus.id):
        return manifest.corpus.id
    return None


def _load_given_corpus(questions: str, corpus: str | None, settings: BuildSettings,
                       manifest: Manifest) -> Corpus | None:
    if corpus is not None:
        return load_corpus(corpus, row_id(corpus, settings, manifest))
    if holds_text(questions):
        return load_corpus(questions, row_id(questions, settings, manifest))
    return None


def _possible_arms(arms: tuple[Arm, ...] | None, settings: BuildSettings,
                   given: Corpus | None) -> tuple[tuple[Arm, ...], list[str]]:
    if arms is not None:
        arms = tuple(dict.fromkeys(arms))
        check_arms(arms, has_text=given is not None)
        return arms, []
    if given is not None:
        return settings.evaluate.arms, []
    kept = tuple(arm for arm in settings.evaluate.arms if arm not in CORPUS_ARMS)
    return kept, [f"no corpus text was given (--corpus): left out {', '.join(sorted(CORPUS_ARMS))}"]


def _fingerprint_notes(given: Corpus | None, manifest: Manifest) -> list[str]:
    if given is None or given.fingerprint == manifest.corpus.fingerprint:
        return []
    return [f"the corpus given ({given.fingerprint[:12]}) is not the one the cartridge was built from "
            f"({manifest.corpus.fingerprint[:12]})"]
