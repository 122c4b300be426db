"""Fingerprints, and manifests that a stage writes last, by rename.

A stage is done when its manifest is there and holds the fingerprint of what it would do now.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges.errors import UserError
from cartridges.files import write_atomically


def fingerprint(content: Any) -> str:
    """Hex, 16 digits, over JSON-able `content`; the order of keys plays no part."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """A reader sees the old file, the new one or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, sort_keys=True))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, or None where the stage has not finished (or not begun)."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError:
        raise UserError(f"{path} is damaged (not JSON); delete {path.parent} and run again") from None


def require_match(found: dict[str, Any] | None, expected: str, directory: Path) -> None:
    """Raise `UserError` if `directory` holds what other settings, corpus or model made."""
    if found is not None and found["fingerprint"] != expected:
        raise UserError(f"{directory} was made with other settings, another corpus or another model; "
                        "give another directory, or delete this one")


@dataclass(frozen=True)
class Failed:
    """Why one training or synthesis of several came to nothing; the others went on."""

    reason: str


def write_failed(file: Path, failed: Failed) -> None:
    write_manifest(file, {"failed": failed.reason})


def read_failed(file: Path) -> Failed | None:
    """The failure that `file` tells of; None where there is none or no file."""
    told = read_manifest(file) or {}
    return Failed(told["failed"]) if "failed" in told else None


class Clock:
    """Seconds that a stage has run, the runs that were killed included. `save` now and then."""

    def __init__(self, path: Path):
        self.path = path
        before = read_manifest(path)
        self._before = before["seconds"] if before else 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def save(self) -> None:
        write_manifest(self.path, {"seconds": self.seconds})
