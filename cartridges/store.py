"""A tree of small files on any fsspec filesystem, with whole-file writes and a lock for writers."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cartridges.errors import UserError
from cartridges.files import replacing, write_atomically

_LOCKS: dict[str, threading.Lock] = {}


class Store:
    """Files under `root`, a local path or an fsspec URL (`s3://bucket/prefix`, `memory://x`).

    A file is replaced as a whole: locally by rename, in object stores by their own semantics. `lock` excludes
    other writers: between processes locally, only within this process elsewhere. There, if two machines change
    the same file at once, the last one wins.

    Raises `UserError` for a protocol that is unknown or whose package is missing.
    """

    def __init__(self, root: str):
        self.root = root
        try:
            # Listings are not cached, because another process may publish at any time.
            self.fs, self.path = fsspec.core.url_to_fs(root, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"cannot open registry {root}: {error}") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def full(self, *parts: str) -> str:
        return "/".join([self.path.rstrip("/"), *parts])

    def url(self, *parts: str) -> str:
        """A path locally, else a URL."""
        return self.full(*parts) if self.is_local else self.fs.unstrip_protocol(self.full(*parts))

    def files(self, *parts: str) -> list[str]:
        """Paths of all files under a directory, relative to it; empty if it does not exist."""
        where = self.full(*parts)
        return [path[len(where):].lstrip("/") for path in self.fs.find(where)]

    def read(self, *parts: str) -> bytes | None:
        """A file's bytes, or None if it does not exist."""
        try:
            return self.fs.cat_file(self.full(*parts))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, *parts: str) -> int | None:
        """A file's size in bytes, or None if it does not exist."""
        try:
            return self.fs.info(self.full(*parts))["size"]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, data: bytes, *parts: str) -> None:
        target = self.full(*parts)
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self.is_local:
            write_atomically(Path(target), data)
        else:
            self.fs.pipe_file(target, data)

    def upload(self, source: Path, *parts: str) -> None:
        """Copy a local file into the store, as one atomic replacement."""
        target = self.full(*parts)
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if not self.is_local:
            self.fs.put_file(str(source), target)
            return
        with replacing(Path(target)) as temporary:
            self.fs.put_file(str(source), str(temporary))

    def download(self, target: Path, *parts: str) -> None:
        self.fs.get_file(self.full(*parts), str(target))

    def remove(self, *parts: str) -> None:
        """Remove a file or a whole directory, if it exists."""
        where = self.full(*parts)
        if self.fs.exists(where):
            self.fs.rm(where, recursive=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the writers' lock of `name`. Lock files are in `<root>/.locks`."""
        if not self.is_local:
            with _LOCKS.setdefault(f"{self.root}\0{name}", threading.Lock()):
                yield
            return
        from filelock import FileLock

        directory = Path(self.full(".locks"))
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / f"{name}.lock"):
            yield
