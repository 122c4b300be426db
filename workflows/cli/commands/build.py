"""`cartridges build`."""

import argparse
import sys
from typing import Any, TextIO

from workflows.cli.options import CORPUS, add_command, registry_option, settings_from, settings_options


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "build", run,
                          "corpus to published cartridge: synthesize, train, evaluate, publish", show, resumable=True)
    add_arguments(command)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The arguments of a build, which `cartridges submit` takes too."""
    command.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    command.add_argument("--name", required=True, metavar="NAME", help="name of the cartridge in the registry")
    command.add_argument("--each", action="store_true",
                         help="a cartridge NAME.ID for each corpus_id of a JSONL or table, or document of a folder, "
                              "trained side by side")
    command.add_argument("--questions", metavar="FILE",
                         help="JSONL of rows with `questions`; default: held-out self-study questions")
    command.add_argument("--workdir", metavar="DIR", help="where stages keep their work; default: runs/NAME")
    settings_options(command, "model", "num_tokens", "init", "loss", "budget", "seed", "corpus_id", "curriculum")
    registry_option(command)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from cartridges.registry import check_name

    check_name(args.name)
    settings = settings_from(args)
    from workflows.building.build import build
    from workflows.building.collection import build_each

    made = build_each if args.each else build
    return made(args.corpus, args.name, settings, args.registry, args.questions, args.workdir)


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    from workflows.evaluation.report_card_table import print_report_card

    if args.each:
        print_collection(result, sys.stdout)
    else:
        print_report_card(result["report_card"], sys.stdout)
        print(f"\npublished {result['name']}@{result['version']} in {args.registry}")


def print_collection(result: dict[str, Any], stream: TextIO) -> None:
    """A line for each cartridge: what it says and how likely it finds the gold answers, beside full context."""
    from workflows.evaluation.report_card_table import mean_cell
    from workflows.runtime.console import human_seconds, print_table

    rows = [["cartridge", "version", "tokens", "p", "contains", "full", "NLL", "full", "choice", "full"]]
    for one in result["cartridges"]:
        card = one["report_card"]
        rows.append([one["name"], one["version"][:8], str(card["corpus"]["tokens"]),
                     str(card["cartridge"]["num_tokens"]),
                     *(mean_cell(card, arm, metric) for metric in ("contains", "nll_per_token", "choice_accuracy")
                       for arm in ("cartridge", "full_context"))])
    print_table(rows, stream)
    for one in result["failed"]:
        print(f"{one['name']}: not built: {one['error']}", file=stream)
    print(f"\npublished {len(result['cartridges'])} cartridges in {result['registry']}; "
          f"{human_seconds(result['seconds'])} in all", file=stream)
