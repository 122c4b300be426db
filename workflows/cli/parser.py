"""The parser of all commands, each of which a module of `workflows.cli.commands` adds."""

import argparse
from typing import Any

from cartridges import __version__
from workflows.cli.commands import (
    ablate,
    bench,
    build,
    chat,
    compose_test,
    evaluate,
    inspect,
    keys,
    registry,
    serve,
    submit,
    synthesize,
    train,
)
from workflows.cli.options import Parser

COMMANDS = (build, ablate, synthesize, inspect, train, evaluate, compose_test, serve, chat, keys, submit, registry,
            bench)
"""In the order of `--help`. A module's `add_to(parsers)` adds its commands."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="cartridges",
                    description="Small KV caches, trained by self-study to stand in for a corpus.")
    parser.add_argument("--version", action="version", version=f"cartridges {__version__}")
    parsers: Any = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add_to(parsers)
    return parser
