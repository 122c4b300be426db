"""Shared by the commands: the parser, common options, and the settings that are read from them."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from cartridges.errors import UserError
from workflows.cli.output import show_summary

if TYPE_CHECKING:
    from cartridges.config import BuildSettings

REFERENCE = "NAME, NAME@VERSION or NAME@ALIAS"
CORPUS = "folder, text/Markdown/HTML/PDF file, JSONL, Parquet, or Hugging Face dataset on disk"
DIALS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("model.name", {"metavar": "ID", "help": "hub id or directory of the base model"}),
    "num_tokens": ("train.num_tokens", {"type": int, "metavar": "P", "help": "slots of the cartridge (p)"}),
    "pack_tokens": ("train.pack_tokens", {"type": int, "metavar": "N", "help": "tokens of a pack (a micro batch)"}),
    "init": ("train.init", {"metavar": "METHOD", "help": "start of training, such as sampled_chunks or "
                            "attention_matching"}),
    "loss": ("train.loss", {"metavar": "LOSS", "help": "distillation, next_token, or none (publish the start)"}),
    "budget": ("budget", {"metavar": "BUDGET",
                          "help": "how much to do: a time (10m), 2000conversations or 500000tokens"}),
    "seed": ("seed", {"type": int, "metavar": "N", "help": "seed of everything random"}),
    "curriculum": ("curriculum.rounds", {"action": "store_const", "const": 4, "help": "up to four rounds: each asks "
                   "more where the cartridge so far knows least, and goes on from it"}),
    "corpus_id": ("corpus.corpus_id", {"metavar": "ID", "help": "row of a JSONL corpus, or a pattern that joins "
                                       "several"}),
    "host": ("serve.host", {"metavar": "HOST", "help": "address to listen on; default 127.0.0.1"}),
    "port": ("serve.port", {"type": int, "metavar": "PORT", "help": "default 8000"}),
    "engine": ("serve.engine", {"metavar": "ENGINE", "help": "auto, transformers or vllm"}),
}
"""Options that are short for a setting of `BuildSettings`: the setting, and how argparse reads the option."""

Run = Callable[[argparse.Namespace], dict[str, Any] | None]
Show = Callable[[dict[str, Any], argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"cartridges: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def add_command(parsers: Any, name: str, run: Run, about: str, show: Show = show_summary, resumable: bool = False,
                **options: Any) -> argparse.ArgumentParser:
    """The parser of one command. `run` returns the result, `show` prints it for a person; `resumable`: after an
    interruption the same command goes on where it stopped."""
    # allow_abbrev=False: an abbreviation would change its meaning when an option is added.
    command = parsers.add_parser(name, help=about, description=about, allow_abbrev=False, **options)
    command.add_argument("--json", action="store_true", help="one JSON object on stdout, logs on stderr")
    command.set_defaults(run=run, show=show, resumable=resumable)
    return command


def add_group(parsers: Any, name: str, about: str, metavar: str) -> Any:
    """Subparsers of a command that has actions of its own, such as `keys add`."""
    group = parsers.add_parser(name, help=about, description=about, allow_abbrev=False)
    return group.add_subparsers(dest="action", required=True, metavar=metavar, parser_class=Parser)


def registry_option(command: argparse.ArgumentParser) -> None:
    default = os.environ.get("CARTRIDGES_REGISTRY") or "runs/registry"
    command.add_argument("--registry", default=default, metavar="ROOT",
                         help="path or URL (s3://...); default: CARTRIDGES_REGISTRY or runs/registry")


def settings_options(command: argparse.ArgumentParser, *dials: str) -> None:
    """`--config`, `--set`, and the named dials."""
    for dial in dials:
        command.add_argument(f"--{dial.replace('_', '-')}", **DIALS[dial][1])
    command.add_argument("--config", metavar="FILE", help="YAML of settings")
    command.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE",
                         help="one setting, such as train.epochs=4; may be repeated")


def settings_from(args: argparse.Namespace, more: list[str] | None = None) -> "BuildSettings":
    """`BuildSettings`: defaults < `--config` < dials < `--set` < `more`, which is written as for `--set`."""
    from cartridges.config import BuildSettings
    from cartridges.settings import load

    given = vars(args)
    dials = [f"{key}={json.dumps(given[dial])}" for dial, (key, _) in DIALS.items() if given.get(dial) is not None]
    return load(BuildSettings, args.config, dials + args.set + (more or []))


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(option: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {text!r} is not a list of whole numbers, such as 1024,4096")
    return [int(part) for part in parts]


def names(text: str) -> list[str]:
    """`A, B` as a list; empty parts are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]
