"""`cartridges ablate`."""

import argparse
import sys
from typing import Any, TextIO

from cartridges.errors import UserError
from workflows.cli.options import CORPUS, add_command, registry_option, settings_from, settings_options

LABEL_WIDTH = 34
"""Longest settings of a variation that stand beside its figures, in characters."""


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "ablate", run,
                          "what settings are worth on a corpus: cartridges that differ in nothing else, asked the same",
                          lambda result, args: print_ablation(result, sys.stdout), resumable=True)
    command.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    command.add_argument("--vary", action="append", default=[], metavar="STAGE.KEY=VALUE[;...]",
                         help="settings that one more cartridge is made with, such as train.loss=next_token; may be "
                              "repeated")
    command.add_argument("--questions", metavar="FILE", help="JSONL of rows with `questions`; default: the corpus' own")
    command.add_argument("--workdir", metavar="DIR", help="where stages keep their work; default: runs/ablation")
    settings_options(command, "model", "num_tokens", "init", "loss", "budget", "seed", "corpus_id")
    registry_option(command)


def run(args: argparse.Namespace) -> dict[str, Any]:
    given = settings_from(args)
    if not args.vary:
        raise UserError("nothing to compare; give settings with --vary, such as --vary train.loss=next_token")
    from workflows.building.ablate import Variation, ablate

    varied = [Variation(text, _varied(args, text)) for text in args.vary]
    return ablate(args.corpus, given, varied, args.registry, args.questions, args.workdir)


def _varied(args: argparse.Namespace, text: str) -> Any:
    """The settings given, changed by one `--vary`."""
    try:
        return settings_from(args, [one.strip() for one in text.split(";") if one.strip()])
    except UserError as error:
        raise UserError(f"--vary {text}: {error}") from None


def print_ablation(result: dict[str, Any], stream: TextIO) -> None:
    """Each variation's metrics, and their paired differences to the settings given. Long labels are
    spelled out below, so that a row holds all metrics."""
    from workflows.evaluation.report_card_table import interval_cell
    from workflows.runtime.console import print_table

    metrics = list(result["variations"][0]["metrics"])
    names = {one["label"]: one["label"] if len(one["label"]) <= LABEL_WIDTH else f"[{number}]"
             for number, one in enumerate(result["variations"])}

    def cells(of: dict[str, Any], signed: bool = False) -> list[str]:
        return [interval_cell(of.get(metric), signed) for metric in metrics]

    rows = [["cartridge", *metrics, "kept", "steps", "minutes"]]
    if result["full_context"]:
        rows.append(["(full context)", *cells(result["full_context"]), "", "", ""])
    rows += [[names[one["label"]], *cells(one["metrics"]), str(one["kept"]), str(one["steps"]),
              f"{sum(one['seconds'].values()) / 60:.1f}"] for one in result["variations"]]
    print_table(rows, stream)
    print("\npaired differences to the settings given (95 % interval):", file=stream)
    print_table([["variation", *metrics], *([names[one["label"]], *cells(one["paired"], signed=True)]
                                           for one in result["variations"] if "paired" in one)], stream)
    for label, name in names.items():
        if name != label:
            print(f"{name} is {label}", file=stream)
    for one in result["failed"]:
        print(f"{one['label']}: not built: {one['error']}", file=stream)
    print(f"\n{result['questions']['asked']} questions, one run each: a run with another seed "
          "(--vary seed=1) shows what chance does", file=stream)
