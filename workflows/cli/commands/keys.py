"""`cartridges keys add | list | revoke`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from workflows.cli.options import add_command, add_group, names

if TYPE_CHECKING:
    from workflows.serving.keys import KeyRecord


def add_to(parsers: Any) -> None:
    actions = add_group(parsers, "keys", "API keys of the HTTP service", "ACTION")
    add = add_command(actions, "add", run_add, "make a key; it is printed once and kept nowhere")
    add.add_argument("tenant", metavar="TENANT", help="whose key it is")
    add.add_argument("--corpora", default="*", metavar="A,B*",
                     help="names or shell patterns of the cartridges it may use; default: all")
    add.add_argument("--rate", type=float, default=0, metavar="N", help="requests a minute; default: no limit")
    add.add_argument("--manage", action="store_true", help="may load, pin and scale cartridges, read metrics")
    listed = add_command(actions, "list", run_list, "the keys, without the keys themselves",
                         lambda result, args: print_keys(result, sys.stdout))
    revoke = add_command(actions, "revoke", run_revoke, "take a key out; it stops within a second")
    revoke.add_argument("id", metavar="ID", help="as `cartridges keys list` shows it")
    for action in (add, listed, revoke):
        action.add_argument("--file", default=os.environ.get("CARTRIDGES_KEYS") or "runs/keys.yaml", metavar="FILE",
                            help="serve.keys_file; default: CARTRIDGES_KEYS or runs/keys.yaml")


def run_add(args: argparse.Namespace) -> dict[str, Any]:
    """A new key. `key` in the result is the only place where it is ever shown."""
    from workflows.serving.keys import add_key

    record, key = add_key(Path(args.file), args.tenant, tuple(names(args.corpora)), args.rate, args.manage)
    return {"key": key, **_line(record), "file": args.file}


def run_list(args: argparse.Namespace) -> dict[str, Any]:
    from workflows.serving.keys import read_keys

    return {"file": args.file, "keys": [_line(record) for record in read_keys(Path(args.file))]}


def run_revoke(args: argparse.Namespace) -> dict[str, Any]:
    from workflows.serving.keys import revoke_key

    return {"revoked": _line(revoke_key(Path(args.file), args.id)), "file": args.file}


def print_keys(result: dict[str, Any], stream: TextIO) -> None:
    from workflows.runtime.console import print_table

    rows = [["id", "tenant", "corpora", "a minute", "manage", "created"]]
    rows += [[key["id"], key["tenant"], ",".join(key["corpora"]), f"{key['requests_per_minute']:g}",
              "yes" if key["manage"] else "", key["created"]] for key in result["keys"]]
    print_table(rows, stream)


def _line(record: "KeyRecord") -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"sha256"})
