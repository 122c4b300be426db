"""`cartridges submit`: a build as a job on a Ray cluster."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from cartridges.errors import UserError
from workflows.cli.commands import build
from workflows.cli.options import Parser, add_command, settings_from


def add_to(parsers: Any) -> None:
    command = add_command(parsers, "submit", run, "run `build` as a job on a Ray cluster",
                          usage="cartridges submit [--address URL] [--no-wait] [--env KEY=VALUE] [--driver-gpus N] "
                                "[--json] [--] CORPUS --name NAME --registry ROOT [build options]")
    # `--` separates the options of the job from those of the build; argparse would take all after it as positional.
    command.parse_known_args = lambda words, namespace=None: Parser.parse_known_args(
        command, _without_separator(words), namespace)
    command.add_argument("--address", metavar="URL",
                         help="the cluster's dashboard; default: RAY_API_SERVER_ADDRESS")
    command.add_argument("--no-wait", action="store_true", help="return once the job is submitted")
    command.add_argument("--env", action="append", default=[], metavar="KEY=VALUE",
                         help="the job's environment (not for secrets); may be repeated")
    command.add_argument("--driver-gpus", type=float, default=0, metavar="N",
                         help="GPUs of the job's driver, which makes the report card; default: 0")
    build.add_arguments(command)
    # The cluster does not have this machine's runs/registry.
    command.set_defaults(registry=os.environ.get("CARTRIDGES_REGISTRY"))


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings_from(args)  # mistakes are named here, not minutes later on the cluster
    env = dict(_pair(pair) for pair in args.env)
    from workflows.job.client import submit

    if args.driver_gpus < 0:
        raise UserError(f"--driver-gpus {args.driver_gpus:g} is negative; give 0 or more")
    job = submit(args, build_words, args.address, not args.no_wait, env, args.driver_gpus)
    if job["status"] in ("FAILED", "STOPPED"):
        raise SystemExit(f"cartridges: job {job['job_id']} {job['status']}: {job['message']}")
    return job


def build_words(args: argparse.Namespace) -> list[str]:
    """The command line of `cartridges build` that parses to `args`, without the command itself."""
    parser = Parser(add_help=False)
    build.add_arguments(parser)
    words: list[str] = []
    for action in parser._actions:  # argparse has no public list of a parser's arguments
        value = getattr(args, action.dest)
        if not action.option_strings:
            words = [str(value), *words]
        elif action.nargs == 0:
            words += action.option_strings[:1] if value else []
        else:
            values = value if isinstance(value, list) else [value] if value is not None else []
            # One word each, so that a value may begin with a dash.
            words += [f"{action.option_strings[0]}={one}" for one in values]
    return words


def _without_separator(words: Sequence[str]) -> list[str]:
    place = words.index("--") if "--" in words else len(words)
    return [*words[:place], *words[place + 1:]]


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--env {text!r} is not KEY=VALUE")
    return key, value
