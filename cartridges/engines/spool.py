"""The directory through which cartridges reach vLLM: one safetensors file each, named by the sha256 of its bytes.

vLLM's workers may be other processes. They receive only a hash, look the file up in the directory given by their
own settings, and check its bytes against its name: a request can neither name a path nor get another cartridge's
keys.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from cartridges.cartridge import Cartridge
from cartridges.engines.base import CartridgePrefix
from cartridges.files import file_digest, write_atomically

PREFIX = "cartridges-spool-"
"""Beginning of the names of temporary spool directories."""

OWNER = ".owner"
"""File in a temporary spool that its process keeps locked: the kernel lets go of it however the process ends."""

_HASH = re.compile("[0-9a-f]{64}")


class SpoolError(RuntimeError):
    """A spooled file is missing, or its bytes do not match its name."""


def spool_file(root: Path, content: str) -> Path:
    """The file that holds the cartridge with sha256 `content`. Raises `SpoolError` if that is not a hash."""
    if not _HASH.fullmatch(content):
        raise SpoolError(f"{content[:80]!r} is not a cartridge's hash")
    return root / f"{content}.safetensors"


def check_spooled(root: Path, content: str) -> Path:
    """`spool_file`, after checking that the file exists and its bytes match its name."""
    path = spool_file(root, content)
    if not path.is_file():
        raise SpoolError(f"{path} is missing")
    if file_digest(path) != content:
        raise SpoolError(f"{path} is damaged: its digest is not its name")
    return path


class Spool:
    """Writes cartridges to `directory` (None: a temporary one, removed with the spool; with it those of processes
    that were killed).

    Above `max_bytes` the least recently used files are removed, except those in use. Thread-safe. Only this user can
    read the files.
    """

    def __init__(self, directory: str | None = None, max_bytes: int = 8 << 30):
        if directory is None:
            sweep()
            self.root, lock = _temporary()
            self._remove = weakref.finalize(self, _remove, self.root, lock)
        else:
            self.root, self._remove = Path(directory).resolve(), None
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self._known: dict[str, _Known] = {}
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._in_use: Counter[str] = Counter()
        self._forgotten: set[str] = set()
        self._lock = RLock()

    @contextmanager
    def hold(self, prefix: CartridgePrefix) -> Iterator[str]:
        """Spool `prefix`'s cartridge and yield the hash of its file, which is kept for the `with` block."""
        with self._lock:
            content = self.put(prefix)
            self._in_use[content] += 1
        try:
            yield content
        finally:
            with self._lock:
                self._in_use[content] -= 1
                self._evict()

    def put(self, prefix: CartridgePrefix) -> str:
        """Write `prefix`'s cartridge unless its file exists; return the hash of the file."""
        with self._lock:
            known = self._known.get(prefix.digest)
            if known is None or not known.still_is(prefix.cartridge):
                # The digest is not trusted: different bytes get another file and another salt.
                known = _Known(prefix.cartridge, self._write(prefix.cartridge))
                self._known[prefix.digest] = known
            self._sizes.move_to_end(known.content)
            self._forgotten.discard(known.content)
            return known.content

    def forget(self, digest: str) -> None:
        """Remove the file of the cartridge with `digest` once no request uses it."""
        with self._lock:
            known = self._known.pop(digest, None)
            if known is not None:
                self._forgotten.add(known.content)
                self._evict()

    def distrust(self, content: str) -> None:
        """Make the next request write the file again, after a failed load."""
        with self._lock:
            self._known = {digest: known for digest, known in self._known.items() if known.content != content}
            self._sizes.pop(content, None)

    def close(self) -> None:
        """Remove a temporary spool directory."""
        if self._remove is not None:
            self._remove()

    def _write(self, cartridge: Cartridge) -> str:
        from safetensors.torch import save

        keys, values = (tensor.detach().cpu().contiguous() for tensor in cartridge.keys_values())
        data = save({"keys": keys, "values": values})
        content = hashlib.sha256(data).hexdigest()
        if content not in self._sizes:
            write_atomically(spool_file(self.root, content), data, mode=0o600)
            self._sizes[content] = len(data)
        return content

    def _evict(self) -> None:
        for content in list(self._sizes):
            full = sum(self._sizes.values()) > self.max_bytes
            if not self._in_use[content] and (full or content in self._forgotten):
                self.distrust(content)
                self._forgotten.discard(content)
                spool_file(self.root, content).unlink(missing_ok=True)


def sweep() -> None:
    """Remove the temporary spools whose process is gone."""
    for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{OWNER}"):
        try:
            lock = os.open(owner, os.O_RDWR)
        except OSError:  # Another user's, or removed by another sweep.
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(owner.parent, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _temporary() -> tuple[Path, int]:
    """A new directory, and the lock that keeps it from being swept."""
    root = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    unlocked = root / f"{OWNER}.new"
    lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unlocked.rename(root / OWNER)
    return root, lock


def _remove(root: Path, lock: int) -> None:
    shutil.rmtree(root, ignore_errors=True)
    os.close(lock)


class _Known:
    """The cartridge object that was spooled as `content`, and its state at that time."""

    def __init__(self, cartridge: Cartridge, content: str):
        self.content = content
        self._cartridge = weakref.ref(cartridge)
        self._stamp = _stamp(cartridge)

    def still_is(self, cartridge: Cartridge) -> bool:
        return self._cartridge() is cartridge and _stamp(cartridge) == self._stamp


def _stamp(cartridge: Cartridge) -> tuple[int, ...]:
    """A value that changes with every in-place update (an optimiser step) and every replaced tensor."""
    tensors = (*cartridge.buffers(), *cartridge.parameters())
    return tuple(number for tensor in tensors for number in (tensor.data_ptr(), tensor._version))
