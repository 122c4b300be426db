"""`cartridges train`."""

import argparse
from typing import Any

from cartridges.errors import UserError
from workflows.cli.options import add_command, settings_from, settings_options


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "train", run, "conversations to cartridge", resumable=True)
    command.add_argument("dataset", metavar="DATASET", help="output directory of `cartridges synthesize`")
    command.add_argument("--corpus", required=True, metavar="CORPUS", help="the corpus of the conversations")
    command.add_argument("--output", required=True, metavar="DIR", help="where the cartridge goes")
    settings_options(command, "model", "num_tokens", "init", "loss", "seed", "corpus_id")


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = settings_from(args)
    if settings.budget is not None:
        raise UserError("train has no budget: it goes by --set train.epochs=N or train.steps=N; `cartridges build "
                        "--budget` plans steps for a time")
    from cartridges.corpus import load_corpus
    from workflows.training.train import train

    return train(args.dataset, args.corpus, load_corpus(args.corpus, settings.corpus.corpus_id), args.output, settings)
