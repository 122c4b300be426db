"""The report card of one cartridge: engine, subject and the cartridges it is compared with."""

from dataclasses import dataclass
from typing import Any

from cartridges import artifact
from cartridges.artifact import Artifact
from cartridges.config import BuildSettings, ModelSettings
from cartridges.engines.base import CartridgePrefix
from cartridges.engines.transformers import TransformersEngine
from cartridges.evaluation.arms import text_for_arms
from cartridges.evaluation.decoy import DECOY
from cartridges.evaluation.report_card import QuestionsSource, Report, Subject, report_card
from cartridges.models import BaseModel, load_base_model, load_identity, resolve_model_dir
from cartridges.records import Corpus, Question
from cartridges.registry import Registry
from workflows.runtime.progress import Progress


@dataclass(frozen=True)
class Examination:
    """A cartridge and the questions it is asked. `settings.evaluate` and `settings.seed` say how.

    `corpus` is the text for the arms that read it; None where only the cartridge is at hand. `store` has the
    cartridge of the arm wrong_cartridge.
    """

    name: str
    subject: Artifact
    corpus: Corpus | None
    questions: tuple[Question, ...]
    model: ModelSettings
    settings: BuildSettings
    store: Registry
    questions_source: QuestionsSource = "user"
    notes: tuple[str, ...] = ()


def report_on(one: Examination, build: dict[str, Any] | None = None) -> Report:
    """Load the model and run the arms; `build` goes into the card. Raises `UserError` for a model that does not fit."""
    manifest = one.subject.manifest
    artifact.check_compatible(manifest, load_identity(resolve_model_dir(one.model)))
    base = load_base_model(one.model)
    subject = Subject(
        one.name, CartridgePrefix(one.subject.cartridge, one.subject.digest), manifest.corpus.id,
        manifest.corpus.fingerprint, manifest.corpus.tokens,
        None if one.corpus is None else text_for_arms(one.corpus, base), manifest.version)
    with Progress(None, "evaluate", "requests") as progress:
        return report_card(
            TransformersEngine(base), base, subject, one.questions, one.settings.evaluate, one.settings.seed,
            wrong=wrong_cartridge(one.store, one.subject, base, one.settings.evaluate.wrong_cartridge),
            questions_source=one.questions_source, build=build, notes=one.notes, progress=progress.callback)


def wrong_cartridge(store: Registry, subject: Artifact, base: BaseModel, wanted: str | None) -> CartridgePrefix | None:
    """The cartridge of the arm wrong_cartridge, or None for the bundled decoy.

    That is `wanted` of the registry; else the decoy where it has p tokens; else the registry's cartridge of the
    same model that is nearest in size.
    """
    if wanted is not None:
        return load_prefix(store, wanted, base)
    p = subject.cartridge.num_tokens
    if len(base.template.system_ids(DECOY)) >= p:
        return None
    others = [entry for entry in store.list()
              if entry.manifest.model.weights_digest == subject.manifest.model.weights_digest
              and entry.manifest.corpus.fingerprint != subject.manifest.corpus.fingerprint]
    if not others:
        return None
    nearest = min(others, key=lambda entry: abs(entry.manifest.num_tokens - p))
    return load_prefix(store, f"{nearest.name}@{nearest.version}", base)


def load_prefix(store: Registry, ref: str, base: BaseModel) -> CartridgePrefix:
    loaded = artifact.load(store.get(ref))
    artifact.check_compatible(loaded.manifest, base.identity)
    return CartridgePrefix(loaded.cartridge, loaded.digest)
