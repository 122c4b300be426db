"""`cartridges list | show | promote | delete | export | import`: plain values in, JSON-able out."""

from pathlib import Path
from typing import Any, TextIO

from cartridges.registry import Entry, Registry
from workflows.console import human_bytes, print_report_card, print_summary, print_table


def list_cartridges(registry: str) -> dict[str, Any]:
    """Every name with the version it means now."""
    return {"registry": registry, "cartridges": [_line(entry) for entry in Registry(registry).list()]}


def show(ref: str, registry: str) -> dict[str, Any]:
    """One version: its manifest (with `report_card`), aliases and place, and its sister versions."""
    opened = Registry(registry)
    entry = opened.resolve(ref)
    versions = [{"version": other.version, "aliases": list(other.aliases),
                 "created": other.manifest.created} for other in opened.versions(entry.name)]
    return {**_line(entry), "location": entry.location, "versions": versions,
            **entry.manifest.model_dump(mode="json")}


def promote(ref: str, version: str | None, alias: str, registry: str) -> dict[str, Any]:
    """`ref` is `name@version`, or a name with `version` apart; without either, its latest."""
    name, _, selector = ref.partition("@")
    return _line(Registry(registry).promote(name, version or selector or "latest", alias))


def delete(ref: str, registry: str, force: bool) -> dict[str, Any]:
    deleted = Registry(registry).delete(ref, force)
    return {"name": ref.partition("@")[0], "deleted": list(deleted)}


def export(ref: str, output: str | None, registry: str) -> dict[str, Any]:
    """`output` None is `NAME-VERSION.tar` in the current directory."""
    opened = Registry(registry)
    entry = opened.resolve(ref)
    path = Path(output or f"{entry.name}-{entry.version}.tar")
    opened.export(f"{entry.name}@{entry.version}", path)
    return {"name": entry.name, "version": entry.version, "path": str(path), "bytes": path.stat().st_size}


def import_archive(path: str, name: str | None, registry: str) -> dict[str, Any]:
    return _line(Registry(registry).import_(path, name))


def print_list(result: dict[str, Any], stream: TextIO) -> None:
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
    if result["report_card"] is None:
        print(f"{result['name']}@{result['version']}, {result['num_tokens']} tokens, no report card; "
              f"`cartridges evaluate {result['name']}` makes one", file=stream)
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


def _line(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {"name": entry.name, "version": entry.version, "aliases": list(entry.aliases),
            "num_tokens": manifest.num_tokens, "bytes": manifest.kv_bytes,
            "base_model": manifest.model.name, "corpus_id": manifest.corpus.id,
            "corpus_tokens": manifest.corpus.tokens, "draft": manifest.is_draft,
            "compression_ratio": manifest.corpus.tokens / manifest.num_tokens, "created": manifest.created}
