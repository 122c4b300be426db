"""`cartridges serve`."""

import argparse
from typing import Any

from workflows.cli.options import add_command, registry_option, settings_from, settings_options


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "serve", run, "the OpenAI-compatible HTTP service")
    settings_options(command, "model", "host", "port", "engine")
    registry_option(command)


def run(args: argparse.Namespace) -> None:
    settings = settings_from(args)
    from workflows.serving.serve import serve

    serve(args.registry, settings)
