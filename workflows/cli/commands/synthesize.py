"""`cartridges synthesize`."""

import argparse
from pathlib import Path
from typing import Any

from workflows.cli.options import CORPUS, add_command, settings_from, settings_options


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "synthesize", run, "corpus to conversations", resumable=True)
    command.add_argument("corpus", metavar="CORPUS", help=CORPUS)
    command.add_argument("--output", required=True, metavar="DIR", help="where the conversations go")
    settings_options(command, "model", "seed", "corpus_id", "budget")


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    from cartridges.corpus import load_corpus
    from workflows.building.planning import settle_synthesis
    from workflows.synthesis.synthesize import synthesize

    corpus = load_corpus(args.corpus, settings.corpus.corpus_id)
    if settings.budget is not None:
        settings = settle_synthesis(corpus, settings, Path(args.output))
    return synthesize(corpus, args.output, settings)
