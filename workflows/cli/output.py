"""Prints a command's result: for a person, or as one JSON object on an otherwise clean stdout."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def report(args: argparse.Namespace, result: dict[str, Any] | None) -> None:
    """Print `result` by the command's own `show`, or as JSON. None prints nothing, or an empty object."""
    if args.json:
        from workflows.runtime.console import to_json

        print(to_json(result if result is not None else {}), flush=True)
    elif result is not None:
        args.show(result, args)
        sys.stdout.flush()


def show_summary(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The result as indented `key: value` lines."""
    from workflows.runtime.console import print_summary

    print_summary(result, sys.stdout)


@contextlib.contextmanager
def clean_stdout(as_json: bool) -> Iterator[None]:
    """While a stage runs under `--json`, stdout is stderr, for its libraries and processes too."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
