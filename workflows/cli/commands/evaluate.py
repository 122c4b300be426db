"""`cartridges evaluate`."""

import argparse
import sys
from typing import Any, get_args

from cartridges.errors import UserError
from workflows.cli.options import REFERENCE, add_command, registry_option, settings_from, settings_options


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "evaluate", run, "report card of a published cartridge", show)
    command.add_argument("name", metavar="NAME", help=REFERENCE)
    command.add_argument("--questions", required=True, metavar="FILE", help="JSONL of rows with `questions`")
    command.add_argument("--corpus", metavar="CORPUS", help="where the questions' rows have no `text`")
    command.add_argument("--arms", metavar="A,B", help="such as closed_book,cartridge; default: all")
    settings_options(command, "model", "seed", "corpus_id")
    registry_option(command)


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    arms = None if args.arms is None else _arms(args.arms)
    from workflows.evaluation.evaluate import evaluate

    return evaluate(args.name, args.registry, args.questions, args.corpus, settings, arms)


def show(card: dict[str, Any], args: argparse.Namespace) -> None:
    from workflows.evaluation.report_card_table import print_report_card

    print_report_card(card, sys.stdout)


def _arms(text: str) -> tuple[Any, ...]:
    from cartridges.config import Arm

    arms = tuple(arm.strip() for arm in text.split(","))
    unknown = [arm for arm in arms if arm not in get_args(Arm)]
    if unknown:
        raise UserError(f"--arms: no arm {unknown[0]!r}; there are {', '.join(get_args(Arm))}")
    return arms
