"""`cartridges evaluate`: the report card of a cartridge that is in the registry."""

import logging
from pathlib import Path
from typing import Any

from cartridges.config import DEFAULT_MODEL, Arm, BuildSettings, ModelSettings
from cartridges.corpus import has_corpus, holds_text, load_corpus, load_questions
from cartridges.records import Corpus

logger = logging.getLogger(__name__)


def evaluate(name: str, registry: str, questions: str, corpus: str | None, settings: BuildSettings,
             arms: tuple[Arm, ...] | None = None, workdir: str | None = None) -> dict[str, Any]:
    """Run the report card of `name` (`name[@version|@alias]`) over the questions file.

    The corpus for the arms that read it is `corpus`, or the questions' rows where they carry `text`.
    Without either these arms are left out, unless `arms` asks for them: then `UserError`. Card and
    rows are kept in `workdir` (default `runs/<name>`) under `evaluate/`. Returns the card.
    """
    from cartridges import artifact
    from cartridges.registry import Registry

    store = Registry(registry)
    entry = store.resolve(name)
    loaded = artifact.load(store.get(f"{entry.name}@{entry.version}"))
    asked = load_questions(questions, row_id(questions, settings, loaded.manifest))
    given = _load_given_corpus(questions, corpus, settings, loaded.manifest)
    arms, notes = _possible_arms(arms, settings, given)
    notes += _fingerprint_notes(given, loaded.manifest)

    report = _run(store, entry, loaded, asked, given, arms, notes, settings,
                  Path(workdir or Path("runs") / entry.name))
    for note in report.card["notes"]:
        logger.warning("%s", note)
    return report.card


def _run(store, entry, loaded, asked, given, arms, notes, settings: BuildSettings, workdir: Path):
    from cartridges.artifact import check_compatible
    from cartridges.engines.base import CartridgePrefix
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.evaluation.arms import text_for_arms
    from cartridges.evaluation.report_card import Subject, report_card
    from cartridges.models import load_base_model, load_identity, resolve_model_dir
    from workflows.runtime.progress import Progress
    from workflows.runtime.tracking import track

    model = model_of(loaded.manifest, settings)
    check_compatible(loaded.manifest, load_identity(resolve_model_dir(model)))
    base = load_base_model(model)
    built, text = loaded.manifest.corpus, None if given is None else text_for_arms(given, base)
    subject = Subject(entry.name, CartridgePrefix(loaded.cartridge, loaded.digest), built.id,
                      built.fingerprint, built.tokens, text, entry.version)
    chosen = settings.evaluate.model_copy(update={"arms": arms})
    wrong = wrong_cartridge(store, loaded, base, settings)
    with track("evaluate", entry.name, settings.model_dump(), workdir) as run, \
            Progress(None, "evaluate", "requests") as progress:
        report = report_card(TransformersEngine(base), base, subject, asked, chosen, settings.seed,
                             wrong=wrong, notes=notes, progress=progress.callback)
        run.report_card(report.card)
    report.save(workdir / "evaluate")
    return report


def wrong_cartridge(store, loaded, base, settings: BuildSettings):
    """The wrong_cartridge arm's `CartridgePrefix`, or None for the bundled decoy.

    The registry's `settings.evaluate.wrong_cartridge`; else the decoy where it has p tokens; else the
    registry's cartridge of the same model that is nearest in size.
    """
    from cartridges.evaluation.decoy import DECOY

    if settings.evaluate.wrong_cartridge is not None:
        return load_prefix(store, settings.evaluate.wrong_cartridge, base)
    p = loaded.cartridge.num_tokens
    if len(base.template.system_ids(DECOY)) >= p:
        return None
    others = [entry for entry in store.list()
              if entry.manifest.model.weights_digest == loaded.manifest.model.weights_digest
              and entry.manifest.corpus.fingerprint != loaded.manifest.corpus.fingerprint]
    if not others:
        return None
    nearest = min(others, key=lambda entry: abs(entry.manifest.num_tokens - p))
    return load_prefix(store, f"{nearest.name}@{nearest.version}", base)


def load_prefix(store, ref: str, base):
    from cartridges import artifact
    from cartridges.engines.base import CartridgePrefix

    loaded = artifact.load(store.get(ref))
    artifact.check_compatible(loaded.manifest, base.identity)
    return CartridgePrefix(loaded.cartridge, loaded.digest)


def model_of(manifest, settings: BuildSettings) -> ModelSettings:
    """The cartridge's own model, unless the settings name another than the default."""
    if settings.model.name != DEFAULT_MODEL:
        return settings.model
    return settings.model.model_copy(update={"name": manifest.model.name})


def row_id(path: str, settings: BuildSettings, manifest) -> str | None:
    """Which rows of a JSONL: those the user names, else those the cartridge was built from."""
    if settings.corpus.corpus_id is not None:
        return settings.corpus.corpus_id
    if Path(path).suffix.lower() in (".jsonl", ".ndjson") and Path(path).is_file() \
            and has_corpus(path, manifest.corpus.id):
        return manifest.corpus.id
    return None


def _load_given_corpus(questions: str, corpus: str | None, settings: BuildSettings,
                       manifest) -> Corpus | None:
    if corpus is not None:
        return load_corpus(corpus, row_id(corpus, settings, manifest))
    if holds_text(questions):
        return load_corpus(questions, row_id(questions, settings, manifest))
    return None


def _possible_arms(arms: tuple[Arm, ...] | None, settings: BuildSettings,
                   given: Corpus | None) -> tuple[tuple[Arm, ...], list[str]]:
    from cartridges.evaluation.arms import CORPUS_ARMS, check_arms

    if arms is not None:
        arms = tuple(dict.fromkeys(arms))
        check_arms(arms, has_text=given is not None)
        return arms, []
    if given is not None:
        return settings.evaluate.arms, []
    kept = tuple(arm for arm in settings.evaluate.arms if arm not in CORPUS_ARMS)
    return kept, [f"no corpus text was given (--corpus): left out {', '.join(sorted(CORPUS_ARMS))}"]


def _fingerprint_notes(given: Corpus | None, manifest) -> list[str]:
    if given is None or given.fingerprint == manifest.corpus.fingerprint:
        return []
    return [f"the corpus given ({given.fingerprint[:12]}) is not the one the cartridge was built from "
            f"({manifest.corpus.fingerprint[:12]})"]
