"""`cartridges compose-test`."""

import argparse
import sys
from typing import Any, TextIO

from workflows.cli.options import REFERENCE, add_command, names, registry_option, settings_from, settings_options


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "compose-test", run,
                          "does a cartridge still answer with others loaded beside it?",
                          lambda result, args: print_composition(result, sys.stdout), resumable=True)
    command.add_argument("name", metavar="NAME", help=f"{REFERENCE}; or a pattern ('kb.*'): each that it matches")
    command.add_argument("--with", required=True, dest="partners", metavar="A,B",
                         help="other cartridges, or patterns; 1, 3 and 7 of them are loaded beside it")
    command.add_argument("--questions", required=True, metavar="FILE", help="JSONL of NAME's `questions`")
    command.add_argument("--workdir", metavar="DIR", help="where answers are kept until it is done; default: "
                                                          "runs/compose-test")
    settings_options(command, "model", "seed", "corpus_id")
    registry_option(command)


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    from workflows.evaluation.composition import compose_test

    return compose_test(args.name, names(args.partners), args.questions, args.registry, settings, args.workdir)


def print_composition(result: dict[str, Any], stream: TextIO) -> None:
    """One cartridge's test; of several, all their questions together and a line for each."""
    from workflows.runtime.console import print_table

    card = result["card"]
    rows = [["loaded", "place", "accuracy", "nll", "passed"]]
    rows += [[label, "", *_cells(card[arm]), ""] for label, arm in (("none", "closed_book"), ("alone", "alone"))]
    rows += [[str(row["loaded"]), place, *_cells(row[place]), "yes" if row["passed"] else "no"]
             for row in card["loaded"] for place in ("first", "last")]
    print_table(rows, stream)
    if "cartridges" in result:
        print(f"\nall {card['questions']} questions; what each may be served with:", file=stream)
    elif card["alone"]["accuracy"]["mean"] <= card["closed_book"]["accuracy"]["mean"]:
        print("alone it answers no better than the model without it: nothing to keep, so nothing was passed",
              file=stream)
    for one in result.get("cartridges", [result]):
        print(f"{one['name']}@{one['version']} may be served with {one['composition']} others "
              f"(it must keep {one['card']['share']:.0%} of its gain)", file=stream)
    for name in result.get("skipped", []):
        print(f"{name} was not tested: there are no questions about it", file=stream)


def _cells(arm: dict[str, Any]) -> list[str]:
    return [f"{arm[metric]['mean']:.2f} ({arm[metric]['low']:.2f} to {arm[metric]['high']:.2f})"
            for metric in ("accuracy", "nll_per_token")]
