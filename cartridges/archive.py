"""A cartridge as one tar file: `<name>/cartridge.safetensors` and `<name>/manifest.json`.

It never contains the corpus' text, even if the registry keeps it. Archives are untrusted: only these two regular
files are read, streamed to paths that we choose. Links, sparse files, other members and sizes that differ from the
manifest's are refused.
"""

import io
import shutil
import tarfile
from pathlib import Path

from cartridges.artifact import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    TENSORS,
    load,
    manifest_bytes,
    parse_manifest,
    verify,
)
from cartridges.errors import UserError
from cartridges.files import replacing


def pack(directory: Path, name: str, output: Path) -> None:
    """Write the artifact in `directory` to the tar `output`, by rename. The same input gives the same bytes."""
    if not output.parent.is_dir():
        raise UserError(f"cannot write {output}: there is no directory {output.parent}")
    manifest = manifest_bytes(verify(directory).model_copy(update={"corpus_text": None}))
    with (replacing(output) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar,
          open(directory / TENSORS, "rb") as tensors):
        for file, size, data in ((MANIFEST, len(manifest), io.BytesIO(manifest)),
                                 (TENSORS, (directory / TENSORS).stat().st_size, tensors)):
            member = tarfile.TarInfo(f"{name}/{file}")
            member.size = size
            tar.addfile(member, data)


def unpack(archive: Path, directory: Path) -> str:
    """Read the tar `archive` into the existing `directory`, verify the cartridge and return its name.

    Raises `UserError` for anything but a complete cartridge.
    """
    if not archive.is_file():
        raise UserError(f"{archive} is not a file; give a tar written by `cartridges export`")
    try:
        with tarfile.open(archive, "r:") as tar:
            name, members = _members(tar, archive)
            _extract(tar, members[MANIFEST], directory / MANIFEST)
            manifest = parse_manifest((directory / MANIFEST).read_bytes(), f"{archive}: {MANIFEST}")
            if members[TENSORS].size != manifest.file_bytes:
                raise UserError(f"{archive}: {TENSORS} has {members[TENSORS].size} bytes, its manifest "
                                f"says {manifest.file_bytes}; export it again")
            _extract(tar, members[TENSORS], directory / TENSORS)
    except tarfile.TarError as error:
        raise UserError(f"{archive} is not a whole tar file ({error}); export it again") from None
    load(directory)
    return name


def _members(tar: tarfile.TarFile, archive: Path) -> tuple[str, dict[str, tarfile.TarInfo]]:
    """The folder's name and its two members. Raises `UserError` for anything else in the archive."""
    found: dict[str, tarfile.TarInfo] = {}
    folders = set()
    for member in tar:
        folder, _, file = member.name.partition("/")
        if file not in (MANIFEST, TENSORS) or file in found or folder in ("", ".", ".."):
            raise UserError(f"{archive} holds {member.name!r}; a cartridge archive holds only "
                            f"NAME/{MANIFEST} and NAME/{TENSORS}, once each")
        if not member.isreg() or member.issparse():
            raise UserError(f"{archive}: {member.name!r} is not a regular file")
        if file == MANIFEST and member.size > MAX_MANIFEST_BYTES:
            raise UserError(f"{archive}: {member.name!r} has {member.size} bytes, more than the "
                            f"{MAX_MANIFEST_BYTES} a manifest may have")
        found[file] = member
        folders.add(folder)
    if len(found) != 2 or len(folders) != 1:
        raise UserError(f"{archive} does not hold one cartridge (NAME/{MANIFEST} and NAME/{TENSORS})")
    return folders.pop(), found


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None, "a regular file has data"
    with source, open(target, "wb") as output:
        shutil.copyfileobj(source, output)
