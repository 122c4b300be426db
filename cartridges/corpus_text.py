"""The corpus' text beside a cartridge: `corpus.txt`, named and hashed by the manifest.

A cartridge does not need it. With it a service can give the full-context answer for comparison, without
opening a path that a client sent. It is not part of the version: the same cartridge can be published with
or without it, and exported archives never contain it.
"""

import hashlib
from pathlib import Path

from cartridges.artifact import Manifest, TextRecord, read_manifest, write_manifest
from cartridges.errors import UserError
from cartridges.files import write_atomically

TEXT = "corpus.txt"


def keep_text(directory: str | Path, text: str) -> Manifest:
    """Add `text` to an artifact that is not published yet."""
    data = text.encode()
    record = TextRecord(digest=hashlib.sha256(data).hexdigest(), file_bytes=len(data))
    write_atomically(Path(directory) / TEXT, data)
    manifest = read_manifest(directory).model_copy(update={"corpus_text": record})
    write_manifest(directory, manifest)
    return manifest


def check_text(data: bytes | None, record: TextRecord, where: str) -> str:
    """`data` as text. Raises `UserError` if it is missing or does not match `record`."""
    if data is None:
        raise UserError(f"{where} is missing: publish the cartridge again")
    if hashlib.sha256(data).hexdigest() != record.digest:
        raise UserError(f"{where} is damaged: its digest is not the manifest's; publish the cartridge again")
    return data.decode()
