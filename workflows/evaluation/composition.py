"""`cartridges compose-test`: may this cartridge be served together with others? The manifest records it."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.corpus import ids_with_questions, load_questions
from cartridges.errors import UserError
from cartridges.records import Question
from cartridges.registry import Entry, Registry
from workflows.evaluation.base_model import model_of
from workflows.evaluation.evaluate import row_id
from workflows.evaluation.report import load_prefix

DIRECTORY = "runs/compose-test"


def compose_test(name: str, partners: Sequence[str], questions: str, registry: str, settings: BuildSettings,
                 workdir: str | None = None) -> dict[str, Any]:
    """Ask the questions of `name` with 1, 3 and 7 of `partners` loaded beside it, and write down in its
    manifest with how many it held: `{name, version, composition, partners, card}`.

    Both may be shell patterns. Where `name` is one, each cartridge that it matches is tested with the partners that
    follow it: `{cartridges: [as above], card, skipped}`, the card over all their questions; those without questions are
    skipped. A later test replaces an earlier one, and one that was killed goes on: answers are kept in `workdir` until
    it is done. Raises `UserError` for an unknown or unfitting cartridge.
    """
    store = Registry(registry)
    subjects, others = _found(store, [name]), _found(store, partners)
    if not _is_pattern(name):
        (entry,) = subjects
        if entry in others and not any(map(_is_pattern, partners)):
            raise UserError(f"{name} cannot be its own partner; name others with --with")
        asked = load_questions(questions, row_id(questions, settings, entry.manifest))
        (result,), _ = _run(store, [(entry, asked)], {_ref(entry): _beside(entry, others)}, settings,
                            Path(workdir or DIRECTORY))
        return result
    asked_of = ids_with_questions(questions)
    having = [entry for entry in subjects if entry.manifest.corpus.id in asked_of]
    if not having:
        raise UserError(f"{questions} has no questions about any of {name}")
    beside = {_ref(entry): _beside(entry, others) for entry in having}
    results, card = _run(store, [(entry, load_questions(questions, entry.manifest.corpus.id)) for entry in having],
                         beside, settings, Path(workdir or DIRECTORY))
    return {"cartridges": results, "card": card, "skipped": [entry.name for entry in subjects if entry not in having]}


def _run(store: Registry, subjects: Sequence[tuple[Entry, tuple[Question, ...]]], beside: dict[str, list[Entry]],
         settings: BuildSettings, work: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`(what is told of each, the card of all)`."""
    from cartridges import artifact
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.evaluation.asking import num_requests, plan_items
    from cartridges.evaluation.composition import LOADED, collapse_test, pooled
    from cartridges.models import load_base_model, load_identity, resolve_model_dir
    from workflows.evaluation.answer_cache import AnswerCache
    from workflows.runtime.progress import Progress

    used = model_of(subjects[0][0].manifest, settings.model)
    identity = load_identity(resolve_model_dir(used))
    for entry, _ in subjects:
        if not beside[_ref(entry)]:
            raise UserError(f"there is no other cartridge to load beside {entry.name}; name some with --with")
        for one in (entry, *beside[_ref(entry)]):
            try:
                artifact.check_compatible(one.manifest, identity)
            except UserError as error:
                raise UserError(f"{one.name}: {error}") from None
    base = load_base_model(used)
    how = settings.evaluate
    kept = AnswerCache(work, TransformersEngine(base), base, how)
    items = [plan_items(asked, base.template, settings.seed, how.max_questions) for _, asked in subjects]
    counts = [2 + 2 * sum(count <= len(beside[_ref(entry)]) + 1 for count in LOADED) for entry, _ in subjects]
    total = sum(arms * num_requests(of) for arms, of in zip(counts, items, strict=True))
    results, tests = [], []
    with Progress(total, "compose-test", "requests") as bar:
        for (entry, _), of in zip(subjects, items, strict=True):
            others = beside[_ref(entry)]
            subject, *loaded = [load_prefix(store, _ref(one), base) for one in (entry, *others[:max(LOADED) - 1])]
            tests.append(collapse_test(lambda prefix, of=of: kept.ask(of, prefix, bar.update), base, subject, loaded))
            card = tests[-1].card(how, settings.seed) | {"partners": [_ref(one) for one in others[:len(loaded)]]}
            store.annotate(_ref(entry), composition=card["passed_partners"], composition_card=card)
            results.append({"name": entry.name, "version": entry.version, "composition": card["passed_partners"],
                            "partners": card["partners"], "card": card})
    kept.forget()
    return results, pooled(tests).card(how, settings.seed)


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _found(store: Registry, names: Sequence[str]) -> list[Entry]:
    """The entries that `names` mean now, each once; a pattern stands for all that it matches, in the order of names."""
    listed = store.list() if any(map(_is_pattern, names)) else ()
    found: dict[tuple[str, str], Entry] = {}
    for name in names:
        matching = ([entry for entry in listed if fnmatch.fnmatchcase(entry.name, name)] if _is_pattern(name)
                    else [store.resolve(name)])
        if not matching:
            raise UserError(f"no cartridge in the registry is called {name}")
        found |= {(entry.name, entry.version): entry for entry in matching}
    return list(found.values())


def _beside(entry: Entry, others: Sequence[Entry]) -> list[Entry]:
    """Those of `others` that stand beside it, beginning behind its own place among them: where all are tested with
    all, each has company of its own."""
    if entry not in others:
        return list(others)
    place = others.index(entry)
    return [*others[place + 1:], *others[:place]]


def _ref(entry: Entry) -> str:
    return f"{entry.name}@{entry.version}"
