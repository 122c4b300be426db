"""`cartridges inspect`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cartridges.errors import UserError
from workflows.cli.options import add_command


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "inspect", run, "what is in a data set: its card, and samples", show)
    command.add_argument("dataset", metavar="DATASET", help="output directory of `cartridges synthesize`")
    command.add_argument("--html", metavar="FILE", help="write a page of samples that a person can read")
    command.add_argument("--samples", type=int, default=6, metavar="N",
                         help="kept conversations of each family on the page; default 6")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="draws the samples; default 0")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.samples < 0:
        raise UserError(f"--samples {args.samples} is below 0")
    from workflows.synthesis.inspect_dataset import read_card

    card = read_card(Path(args.dataset))
    if args.html is not None:
        from workflows.synthesis.dataset_page import write_page

        write_page(Path(args.dataset), card, Path(args.html), args.samples, args.seed)
    return card


def show(card: dict[str, Any], args: argparse.Namespace) -> None:
    from workflows.synthesis.inspect_dataset import print_card

    print_card(card, sys.stdout)
