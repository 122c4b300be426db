"""API keys at rest: who may use which corpora. The keys themselves are nowhere, only their hashes.

A key is 256 random bits, so that its SHA-256 cannot be reversed by guessing and needs no salt or slow
hash; it is shown once, when it is made.
"""

import hashlib
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path

import yaml
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cartridges.errors import UserError
from cartridges.files import write_atomically

PREFIX = "ck_"
"""Beginning of every key, so that people and secret scanners know one when they see it."""


class KeyRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = Field(min_length=1, max_length=64)
    """Names the key in lists and in the audit log; not a secret."""
    tenant: str = Field(min_length=1, max_length=64)
    """Whose it is. What an engine caches of prompts is never shared between tenants."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    corpora: tuple[str, ...] = ("*",)
    """Shell patterns of the cartridge names that it may use. The base model is open to every key."""
    requests_per_minute: float = Field(0, ge=0)
    """0 is no limit. Several ingress replicas count apart."""
    manage: bool = False
    """May load, unload, pin and scale cartridges, and read the metrics."""
    created: str = ""


class KeyFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    keys: tuple[KeyRecord, ...] = ()


def hash_key(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[KeyRecord, ...]:
    """Raises `UserError` for a missing or malformed file. JSON is YAML, so both are read."""
    try:
        loaded = yaml.safe_load(path.read_text())
        return KeyFile.model_validate(loaded or {}).keys
    except FileNotFoundError:
        raise UserError(f"there is no keys file {path}; `cartridges keys add` makes one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read keys file {path}: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"keys file {path}: {where}: {first['msg']}") from None


def add_key(path: Path, tenant: str, corpora: tuple[str, ...], requests_per_minute: float,
            manage: bool) -> tuple[KeyRecord, str]:
    """A new key in the file (made if need be), and the key itself, which is not kept."""
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        record = KeyRecord(id=f"k{secrets.token_hex(4)}", tenant=tenant, sha256=hash_key(key), corpora=corpora,
                           requests_per_minute=requests_per_minute, manage=manage,
                           created=datetime.now(UTC).isoformat(timespec="seconds"))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][0]}: {first['msg']}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        kept = read_keys(path) if path.exists() else ()
        _write(path, (*kept, record))
    return record, key


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Take a key out; a running service notices within a second."""
    with _locked(path):
        kept = read_keys(path)
        found = [record for record in kept if record.id == key_id]
        if not found:
            raise UserError(f"no key {key_id!r} in {path}; `cartridges keys list` shows them")
        _write(path, tuple(record for record in kept if record.id != key_id))
    return found[0]


def _locked(path: Path) -> FileLock:
    if not path.parent.is_dir():
        raise UserError(f"there is no keys file {path}; `cartridges keys add` makes one")
    return FileLock(path.with_name(f".{path.name}.lock"))


def _write(path: Path, records: tuple[KeyRecord, ...]) -> None:
    plain = KeyFile(keys=records).model_dump(mode="json")
    text = json.dumps(plain, indent=1) if path.suffix == ".json" else yaml.safe_dump(plain, sort_keys=False)
    # Nobody but the owner: hashes are no keys, but who has which corpora is not for everyone.
    write_atomically(path, text, mode=0o600)
