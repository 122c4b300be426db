"""`cartridges keys add | list | revoke`: plain values in, JSON-able out."""

from pathlib import Path
from typing import Any, TextIO

from workflows.serving.keys import KeyRecord, add_key, read_keys, revoke_key


def add(tenant: str, file: str, corpora: tuple[str, ...], rate: float, manage: bool) -> dict[str, Any]:
    """A new key. `key` in the result is the only place where it is ever shown."""
    record, key = add_key(Path(file), tenant, corpora, rate, manage)
    return {"key": key, **_line(record), "file": file}


def list_keys(file: str) -> dict[str, Any]:
    return {"file": file, "keys": [_line(record) for record in read_keys(Path(file))]}


def revoke(key_id: str, file: str) -> dict[str, Any]:
    return {"revoked": _line(revoke_key(Path(file), key_id)), "file": file}


def print_keys(result: dict[str, Any], stream: TextIO) -> None:
    from workflows.runtime.console import print_table

    rows = [["id", "tenant", "corpora", "a minute", "manage", "created"]]
    rows += [[key["id"], key["tenant"], ",".join(key["corpora"]), f"{key['requests_per_minute']:g}",
              "yes" if key["manage"] else "", key["created"]] for key in result["keys"]]
    print_table(rows, stream)


def _line(record: KeyRecord) -> dict[str, Any]:
    return record.model_dump(mode="json", exclude={"sha256"})
