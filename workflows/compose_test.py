"""`cartridges compose-test`: may this cartridge be served together with others? The manifest records it."""

from collections.abc import Sequence
from typing import Any, TextIO

from cartridges.config import BuildSettings
from cartridges.corpus import load_questions
from cartridges.errors import UserError
from workflows.evaluate import load_prefix, model_of, row_id


def compose_test(name: str, partners: Sequence[str], questions: str, registry: str,
                 settings: BuildSettings) -> dict[str, Any]:
    """Ask the questions of `name` with 1, 3 and 7 of `partners` loaded beside it, and write down in its
    manifest with how many it held: `{name, version, composition, partners, card}`.

    A later test replaces an earlier one. Raises `UserError` for an unknown or unfitting cartridge.
    """
    from cartridges import artifact
    from cartridges.engines.transformers import TransformersEngine
    from cartridges.evaluation.asking import num_requests, plan_items
    from cartridges.evaluation.composition import LOADED, collapse_test
    from cartridges.models import load_base_model
    from cartridges.registry import Registry
    from workflows.console import Progress

    store = Registry(registry)
    entry = store.resolve(name)
    others = _distinct(store, entry, partners)
    asked = load_questions(questions, row_id(questions, settings, entry.manifest))
    base = load_base_model(model_of(entry.manifest, settings))
    artifact.check_compatible(entry.manifest, base.identity)
    subject, *beside = [load_prefix(store, ref, base) for ref in (_ref(entry), *map(_ref, others))]
    items = plan_items(asked, base.template, settings.seed, settings.evaluate.max_questions)
    arms = 2 + 2 * sum(count <= len(others) + 1 for count in LOADED)
    with Progress(arms * num_requests(items), "compose-test", "requests") as bar:
        card = collapse_test(TransformersEngine(base), base, subject, beside, items, settings.evaluate,
                             settings.seed, bar.update)
    card["partners"] = [_ref(other) for other in others]
    store.annotate(_ref(entry), composition=card["passed_partners"], composition_card=card)
    return {"name": entry.name, "version": entry.version, "composition": card["passed_partners"],
            "partners": card["partners"], "card": card}


def print_card(result: dict[str, Any], stream: TextIO) -> None:
    from workflows.console import print_table

    card = result["card"]
    rows = [["loaded", "place", "accuracy", "nll", "passed"]]
    rows += [[label, "", *_cells(card[arm]), ""] for label, arm in (("none", "closed_book"), ("alone", "alone"))]
    rows += [[str(row["loaded"]), place, *_cells(row[place]), "yes" if row["passed"] else "no"]
             for row in card["loaded"] for place in ("first", "last")]
    print_table(rows, stream)
    if card["alone"]["accuracy"]["mean"] <= card["closed_book"]["accuracy"]["mean"]:
        print("alone it answers no better than the model without it: nothing to keep, so nothing was passed",
              file=stream)
    print(f"{result['name']}@{result['version']} may be served with {result['composition']} others "
          f"(it must keep {card['share']:.0%} of its gain)", file=stream)


def _cells(arm: dict[str, Any]) -> list[str]:
    return [f"{arm[metric]['mean']:.2f} ({arm[metric]['low']:.2f} to {arm[metric]['high']:.2f})"
            for metric in ("accuracy", "nll_per_token")]


def _distinct(store, entry, partners: Sequence[str]) -> list:
    """The partners' registry entries, each once, `entry` not among them."""
    found = {(other.name, other.version): other for other in map(store.resolve, partners)}
    if (entry.name, entry.version) in found:
        raise UserError(f"{entry.name} cannot be its own partner; name others with --with")
    return list(found.values())


def _ref(entry) -> str:
    return f"{entry.name}@{entry.version}"
