"""`cartridges list | show | promote | delete | export | import`: the registry."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from workflows.cli.options import REFERENCE, add_command, registry_option

if TYPE_CHECKING:
    from cartridges.registry import Entry, Registry


def add_to(parsers: Any) -> None:
    registry_option(add_command(parsers, "list", run_list, "names in the registry",
                                lambda result, args: print_list(result, sys.stdout)))
    show = add_command(parsers, "show", run_show, "a cartridge's manifest and report card",
                       lambda result, args: print_shown(result, sys.stdout))
    promote = add_command(parsers, "promote", run_promote, "let an alias mean a version")
    delete = add_command(parsers, "delete", run_delete, "delete a version, or a name with all of them")
    export = add_command(parsers, "export", run_export, "write a version to a tar file")
    for command in (show, promote, delete, export):
        command.add_argument("name", metavar="NAME", help=REFERENCE)
        registry_option(command)
    promote.add_argument("version", nargs="?", metavar="VERSION", help="default: the latest")
    promote.add_argument("--alias", default="prod", metavar="ALIAS",
                         help="default: prod, which a bare NAME means")
    delete.add_argument("--force", action="store_true", help="delete a version that an alias means")
    export.add_argument("--output", metavar="FILE", help="default: NAME-VERSION.tar")
    import_ = add_command(parsers, "import", run_import, "publish a tar file written by `export`")
    import_.add_argument("file", metavar="FILE")
    import_.add_argument("--name", metavar="NAME", help="default: the name it was exported with")
    registry_option(import_)


def _opened(args: argparse.Namespace) -> "Registry":
    from cartridges.registry import Registry

    return Registry(args.registry)


def run_list(args: argparse.Namespace) -> dict[str, Any]:
    """Every name with the version it means now."""
    return {"registry": args.registry, "cartridges": [_line(entry) for entry in _opened(args).list()]}


def run_show(args: argparse.Namespace) -> dict[str, Any]:
    """One version: its manifest (with `report_card`), aliases and place, and its sister versions."""
    registry = _opened(args)
    entry = registry.resolve(args.name)
    versions = [{"version": other.version, "aliases": list(other.aliases),
                 "created": other.manifest.created} for other in registry.versions(entry.name)]
    return {**_line(entry), "location": entry.location, "versions": versions,
            **entry.manifest.model_dump(mode="json")}


def run_promote(args: argparse.Namespace) -> dict[str, Any]:
    """NAME is `name@version`, or a name with VERSION apart; without either, its latest."""
    name, _, selector = args.name.partition("@")
    return _line(_opened(args).promote(name, args.version or selector or "latest", args.alias))


def run_delete(args: argparse.Namespace) -> dict[str, Any]:
    deleted = _opened(args).delete(args.name, args.force)
    return {"name": args.name.partition("@")[0], "deleted": list(deleted)}


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    registry = _opened(args)
    entry = registry.resolve(args.name)
    path = Path(args.output or f"{entry.name}-{entry.version}.tar")
    registry.export(f"{entry.name}@{entry.version}", path)
    return {"name": entry.name, "version": entry.version, "path": str(path), "bytes": path.stat().st_size}


def run_import(args: argparse.Namespace) -> dict[str, Any]:
    return _line(_opened(args).import_(args.file, args.name))


def print_list(result: dict[str, Any], stream: TextIO) -> None:
    from workflows.runtime.console import human_bytes, print_table

    if not result["cartridges"]:
        print(f"the registry {result['registry']} is empty", file=stream)
        return
    rows = [["name", "version", "aliases", "tokens", "size", "corpus tokens", "model", "created"]]
    rows += [[entry["name"] + (" (draft)" if entry["draft"] else ""), entry["version"],
              ",".join(entry["aliases"]), str(entry["num_tokens"]), human_bytes(entry["bytes"]),
              str(entry["corpus_tokens"]), entry["base_model"], entry["created"]]
             for entry in result["cartridges"]]
    print_table(rows, stream)


def print_shown(result: dict[str, Any], stream: TextIO) -> None:
    from workflows.evaluation.report_card_table import print_report_card
    from workflows.runtime.console import print_summary

    if result["report_card"] is None:
        print(f"{result['name']}@{result['version']}, {result['num_tokens']} tokens, no report card; "
              f"`cartridges evaluate {result['name']} --questions FILE` prints one", file=stream)
    else:
        print_report_card(result["report_card"], stream)
    if result["draft"]:
        print("a draft: the start of a training that was not run", file=stream)
    print(file=stream)
    shown = ("aliases", "base_model", "dtype", "corpus", "seed", "composition", "licence", "created",
             "location")
    print_summary({key: result[key] for key in shown}, stream)
    for other in result["versions"]:
        aliases = ",".join(other["aliases"])
        print(f"version {other['version']}  {other['created']}  {aliases}".rstrip(), file=stream)


def _line(entry: "Entry") -> dict[str, Any]:
    manifest = entry.manifest
    return {"name": entry.name, "version": entry.version, "aliases": list(entry.aliases),
            "num_tokens": manifest.num_tokens, "bytes": manifest.kv_bytes,
            "base_model": manifest.model.name, "corpus_id": manifest.corpus.id,
            "corpus_tokens": manifest.corpus.tokens, "draft": manifest.is_draft,
            "compression_ratio": manifest.corpus.tokens / manifest.num_tokens, "created": manifest.created}
