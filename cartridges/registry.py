"""The registry: named, versioned cartridges on any fsspec path.

    <root>/<name>/<version>/cartridge.safetensors
    <root>/<name>/<version>/corpus.txt             only if the manifest lists it
    <root>/<name>/<version>/manifest.json          written last: the version exists once this does
    <root>/<name>/aliases.json                     {"latest": version, "prod": version, ...}

A version is the content hash of its manifest. So it never changes, publishing is idempotent, and two
publishers of one cartridge write the same bytes.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges import archive
from cartridges.artifact import (
    MANIFEST,
    PROVENANCE,
    TENSORS,
    Manifest,
    manifest_bytes,
    parse_manifest,
    read_manifest,
    verify,
)
from cartridges.corpus_text import TEXT, check_text
from cartridges.errors import UserError
from cartridges.store import Store

log = logging.getLogger(__name__)

LONGEST_NAME = 64
NAME = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{LONGEST_NAME - 1}}}")
VERSION = re.compile(r"[0-9a-f]{16}")
VERSION_PREFIX = re.compile(r"[0-9a-f]{6,16}")
DEFAULT_ALIASES = ("prod", "latest")
"""A bare name resolves to the first of these aliases that is set, else to the newest version."""


@dataclass(frozen=True)
class Entry:
    """One version in the registry. `location` is its directory, a local path or a URL."""

    name: str
    version: str
    aliases: tuple[str, ...]
    manifest: Manifest
    location: str


class Registry:
    """Publishes, finds and fetches cartridges under `root`. Mistakes of the user raise `UserError`."""

    def __init__(self, root: str | Path, cache: str | Path | None = None):
        """`cache` is the directory of downloads by `get`; None is `$CARTRIDGES_HOME/registry`."""
        self.root = str(root)
        self._store = Store(self.root)
        self._cache = Path(cache) if cache is not None else _default_cache()

    def publish(self, name: str, directory: str | Path, aliases: Iterable[str] = ("latest",)) -> str:
        """Add the artifact in `directory` as a version of `name` and move `aliases` to it.

        An existing version keeps its tensors and gets the new provenance (report card, text). Returns the version.
        """
        check_name(name)
        aliases = tuple(_checked_alias(alias) for alias in aliases)
        manifest = verify(directory)
        version = manifest.version
        if manifest.corpus_text is not None:
            file = Path(directory) / TEXT
            check_text(file.read_bytes() if file.is_file() else None, manifest.corpus_text, str(file))
        with self._store.lock(name):
            if not self._is_published(name, version, manifest):
                self._upload(name, version, Path(directory), manifest)
            self._write_aliases(name, self.aliases(name) | dict.fromkeys(aliases, version))
        return version

    def corpus_text(self, entry: Entry) -> str | None:
        """The text of the version's corpus; None if it was not kept."""
        if entry.manifest.corpus_text is None:
            return None
        data = self._store.read(entry.name, entry.version, TEXT)
        return check_text(data, entry.manifest.corpus_text, f"{entry.location}/{TEXT}")

    def resolve(self, ref: str) -> Entry:
        """The entry of `name`, `name@version`, `name@alias`, or `name@` and six or more digits of a version."""
        name, _, selector = ref.partition("@")
        check_name(name)
        if "@" in ref and not selector:
            raise UserError(f"{ref!r} ends in @; give {name}@VERSION, {name}@ALIAS or just {name}")
        aliases = self.aliases(name)
        version = self._select(name, selector, aliases) if selector else self._default(name, aliases)
        manifest = self._manifest(name, version)
        if manifest is None:
            raise UserError(f"{name}@{selector or version} points to version {version}, which is gone; "
                            f"publish it again or promote another version")
        return self._entry(name, version, aliases, manifest)

    def get(self, ref: str) -> Path:
        """A local directory with the version's two files, downloaded and verified if the registry is remote.

        `artifact.load` verifies the digest again at each load.
        """
        entry = self.resolve(ref)
        if self._store.is_local:
            return Path(entry.location)
        root = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        directory = self._cache / root / entry.name / entry.version
        if not (directory / MANIFEST).is_file() or read_manifest(directory) != entry.manifest:
            self._download(entry, directory)
        return directory

    def is_there(self) -> bool:
        """Whether a local root exists. Always True for other file systems, which raise their own errors."""
        return not self._store.is_local or Path(self._store.full()).exists()

    def names(self) -> tuple[str, ...]:
        """Names with at least one version, sorted, without reading manifests."""
        manifests = (path.split("/") for path in self._store.files() if path.endswith(f"/{MANIFEST}"))
        return tuple(sorted({parts[0] for parts in manifests if len(parts) == 3
                             and NAME.fullmatch(parts[0]) and VERSION.fullmatch(parts[1])}))

    def list(self) -> tuple[Entry, ...]:
        """The entry to which each bare name resolves. Damaged entries are omitted with a warning."""
        with ThreadPoolExecutor(max_workers=16) as pool:  # each takes a round trip to a remote registry
            entries = pool.map(self._resolve_or_warn, self.names())
            return tuple(entry for entry in entries if entry is not None)

    def versions(self, name: str) -> tuple[Entry, ...]:
        """All versions of `name`, newest first."""
        check_name(name)
        aliases = self.aliases(name)
        manifests = ((version, self._manifest(name, version)) for version in self._version_names(name))
        entries = [self._entry(name, version, aliases, manifest)
                   for version, manifest in manifests if manifest is not None]
        if not entries:
            raise self._unknown(name)
        return tuple(sorted(entries, key=lambda entry: (entry.manifest.created, entry.version), reverse=True))

    def aliases(self, name: str) -> dict[str, str]:
        """Maps each alias to its version."""
        data = self._store.read(name, "aliases.json")
        if data is None:
            return {}
        try:
            return {str(alias): str(version) for alias, version in json.loads(data).items()}
        except (ValueError, AttributeError):
            raise UserError(f"{self.root}/{name}/aliases.json is damaged; remove it and promote the "
                            "versions again") from None

    def promote(self, name: str, version: str, alias: str = "prod") -> Entry:
        """Point `alias` to `version` (a version, its first digits, or another alias)."""
        check_name(name)
        _checked_alias(alias)
        self.resolve(f"{name}@{version}")  # before locking, so that a mistake leaves no lock file
        with self._store.lock(name):
            entry = self.resolve(f"{name}@{version}")
            self._write_aliases(name, self.aliases(name) | {alias: entry.version})
        return self.resolve(f"{name}@{entry.version}")

    def annotate(self, ref: str, **fields: Any) -> Entry:
        """Set manifest `fields` that are not part of the version, such as the result of a later test."""
        assert fields.keys() <= PROVENANCE, fields
        with self._store.lock(ref.partition("@")[0]):
            entry = self.resolve(ref)
            manifest = Manifest.model_validate(entry.manifest.model_dump() | fields)
            self._store.write(manifest_bytes(manifest), entry.name, entry.version, MANIFEST)
        return self.resolve(f"{entry.name}@{entry.version}")

    def delete(self, ref: str, force: bool = False) -> tuple[str, ...]:
        """Delete one version (`name@...`) or the whole name; returns the deleted versions.

        Raises `UserError` for a version with an alias unless `force`, which removes the alias too.
        """
        name = ref.partition("@")[0]
        check_name(name)
        if not self._version_names(name):
            raise self._unknown(name)
        with self._store.lock(name):
            if "@" in ref:
                return (self._delete_version(self.resolve(ref), force),)
            versions = self._version_names(name)
            for version in versions:
                self._store.remove(name, version, MANIFEST)
            self._store.remove(name)
        return versions

    def export(self, ref: str, path: str | Path) -> Entry:
        """Write a version to a tar file, for `import_` into any registry."""
        entry = self.resolve(ref)
        archive.pack(self.get(f"{entry.name}@{entry.version}"), entry.name, Path(path))
        return entry

    def import_(self, path: str | Path, name: str | None = None,
                aliases: Iterable[str] = ("latest",)) -> Entry:
        """Publish a tar written by `export`, under `name` or the exported name."""
        with tempfile.TemporaryDirectory(prefix="cartridges-import-") as temporary:
            exported_as = archive.unpack(Path(path), Path(temporary))
            name = name or exported_as
            version = self.publish(name, temporary, aliases)
        return self.resolve(f"{name}@{version}")

    def _resolve_or_warn(self, name: str) -> Entry | None:
        try:
            return self.resolve(name)
        except UserError as error:
            log.warning("%s is left out: %s", name, error)
            return None

    def _select(self, name: str, selector: str, aliases: dict[str, str]) -> str:
        if selector in aliases:
            return aliases[selector]
        versions = self._version_names(name)
        if not versions:
            raise self._unknown(name)
        found = [version for version in versions if version.startswith(selector)]
        if not VERSION_PREFIX.fullmatch(selector) or not found:
            known = ", ".join([*sorted(aliases), *versions][:6])
            raise UserError(f"{name} has no version or alias {selector!r}; it has {known}")
        if len(found) > 1:
            raise UserError(f"{name}@{selector} is ambiguous: {', '.join(found)}; give more digits")
        return found[0]

    def _default(self, name: str, aliases: dict[str, str]) -> str:
        for alias in DEFAULT_ALIASES:
            if alias in aliases:
                return aliases[alias]
        return self.versions(name)[0].version

    def _entry(self, name: str, version: str, aliases: dict[str, str], manifest: Manifest) -> Entry:
        mine = tuple(sorted(alias for alias, target in aliases.items() if target == version))
        return Entry(name, version, mine, manifest, self._store.url(name, version))

    def _version_names(self, name: str) -> tuple[str, ...]:
        """Versions with a manifest, sorted."""
        versions = (path.removesuffix(f"/{MANIFEST}") for path in self._store.files(name))
        return tuple(sorted(version for version in versions if VERSION.fullmatch(version)))

    def _manifest(self, name: str, version: str) -> Manifest | None:
        data = self._store.read(name, version, MANIFEST)
        if data is None:
            return None
        where = f"{self.root}/{name}/{version}/{MANIFEST}"
        manifest = parse_manifest(data, where)
        if manifest.version != version:
            raise UserError(f"{where} is damaged: its content is that of version {manifest.version}; "
                            "publish the cartridge again")
        return manifest

    def _is_published(self, name: str, version: str, manifest: Manifest) -> bool:
        data = self._store.read(name, version, MANIFEST)
        if data is None or self._store.size(name, version, TENSORS) != manifest.file_bytes:
            return False
        # The version covers the cartridge only; a new report card or text replaces the old one.
        kept = parse_manifest(data, f"{name}@{version}")
        return (manifest.report_card in (None, kept.report_card)
                and manifest.corpus_text == kept.corpus_text)

    def _upload(self, name: str, version: str, directory: Path, manifest: Manifest) -> None:
        """Write tensors, text and then the manifest; remove a text that is no longer kept after that."""
        data = self._store.read(name, version, MANIFEST)
        if data is not None:
            manifest = _with_findings(manifest, parse_manifest(data, f"{name}@{version}"))
        self._store.upload(directory / TENSORS, name, version, TENSORS)
        if manifest.corpus_text is not None:
            self._store.upload(directory / TEXT, name, version, TEXT)
        self._store.write(manifest_bytes(manifest), name, version, MANIFEST)
        if manifest.corpus_text is None:
            self._store.remove(name, version, TEXT)

    def _delete_version(self, entry: Entry, force: bool) -> str:
        aliases = self.aliases(entry.name)
        if entry.aliases and not force:
            raise UserError(f"{entry.name}@{entry.version} has the alias {', '.join(entry.aliases)}; "
                            "promote another version first, or use --force")
        kept = {alias: version for alias, version in aliases.items() if version != entry.version}
        if kept != aliases:
            self._write_aliases(entry.name, kept)
        self._store.remove(entry.name, entry.version, MANIFEST)
        self._store.remove(entry.name, entry.version)
        return entry.version

    def _write_aliases(self, name: str, aliases: dict[str, str]) -> None:
        self._store.write((json.dumps(aliases, indent=1, sort_keys=True) + "\n").encode(),
                          name, "aliases.json")

    def _download(self, entry: Entry, directory: Path) -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as temporary:
            for file in (TENSORS, MANIFEST):
                self._store.download(Path(temporary) / file, entry.name, entry.version, file)
            verify(temporary)
            directory.mkdir(exist_ok=True)
            for file in (TENSORS, MANIFEST):
                os.replace(Path(temporary) / file, directory / file)

    def _unknown(self, name: str) -> UserError:
        names = self.names()
        if not names:
            return UserError(f"no cartridge {name!r}: the registry {self.root} is empty; "
                             "`cartridges build` fills it")
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names[:5])}"
        return UserError(f"no cartridge {name!r} in the registry {self.root}; {hint}")


def _with_findings(manifest: Manifest, kept: Manifest) -> Manifest:
    """`manifest`, with the report card and the composition test of `kept` if it has none of its own."""
    found = {} if manifest.report_card is not None else {"report_card": kept.report_card}
    if manifest.composition_card is None:
        found |= {"composition": kept.composition, "composition_card": kept.composition_card}
    return manifest.model_copy(update=found)


def check_name(name: str) -> str:
    """`name`. Raises `UserError` if it is not a valid cartridge name."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a cartridge name: use 1 to 64 of a-z 0-9 . _ -, "
                        "starting with a letter or digit")
    return name


def _checked_alias(alias: str) -> str:
    if not NAME.fullmatch(alias) or VERSION_PREFIX.fullmatch(alias):
        raise UserError(f"{alias!r} is not an alias: use 1 to 64 of a-z 0-9 . _ -, and nothing that "
                        "reads like a version")
    return alias


def _default_cache() -> Path:
    from cartridges.download import home

    return home() / "registry"
