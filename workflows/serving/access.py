"""Authentication and rate limits: the request's bearer token is looked up in the keys file."""

import fnmatch
import hmac
import ipaddress
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

from cartridges.errors import UserError
from workflows.serving.errors import ApiError
from workflows.serving.keys import KeyRecord, hash_key, read_keys

log = logging.getLogger(__name__)

FRESH_S = 1.0
"""Seconds after which the keys file is looked at again: a revoked key stops within that."""


@dataclass(frozen=True)
class Caller:
    """`corpora`: shell patterns of the names they may use. `tenant` "" is a service without keys."""

    key_id: str = ""
    tenant: str = ""
    corpora: tuple[str, ...] = ("*",)
    manage: bool = True

    def may_use(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.corpora)

    def check_manage(self) -> None:
        if not self.manage:
            raise ApiError(403, "this key may not manage cartridges", "not_allowed")


ANYONE = Caller()
"""Everybody, where the service has no keys."""

NOBODY = Caller(corpora=(), manage=False)
"""Whoever asks for what is open to all."""


class Authenticator:
    """Tells who is calling. `keys_file` None admits everybody on this machine, or with `open_to_network` everybody."""

    def __init__(self, keys_file: str | None, open_to_network: bool = False):
        self.path = None if keys_file is None else Path(keys_file)
        self.open_to_network = open_to_network
        self._records: tuple[KeyRecord, ...] = () if self.path is None else read_keys(self.path)
        self._looked, self._stamp = time.monotonic(), self._stamp_now()
        self._buckets: dict[str, Bucket] = {}

    def admit(self, peer: str, authorization: str | None, host: str = "localhost") -> Caller:
        """`peer` is the client's address; `authorization` and `host` are its headers.

        ApiError 401, 403 or 429.
        """
        if self.path is None:
            # The Host too: a web page can point a name of its own at 127.0.0.1 and have the browser call it.
            if not (self.open_to_network or is_loopback(peer) and is_loopback(_without_port(host))):
                raise ApiError(403, "this service has no API keys and answers only on its own machine", "no_keys")
            return ANYONE
        self._refresh()
        record = self._find(_bearer(authorization))
        if record is None:
            raise ApiError(401, "give a valid API key as `Authorization: Bearer KEY`", "invalid_api_key")
        self._count(record)
        return Caller(record.id, record.tenant, record.corpora, record.manage)

    def _find(self, key: str) -> KeyRecord | None:
        # Every record is compared, in constant time: how long it takes tells nothing.
        digest, found = hash_key(key), None
        for record in self._records:
            if hmac.compare_digest(record.sha256, digest):
                found = record
        return found

    def _count(self, record: KeyRecord) -> None:
        if not record.requests_per_minute:
            return
        bucket = self._buckets.setdefault(record.id, Bucket(record.requests_per_minute))
        wait = bucket.take(record.requests_per_minute)
        if wait > 0:
            raise ApiError(429, f"this key may send {record.requests_per_minute:g} requests a minute",
                           "rate_limit_exceeded", retry_after=math.ceil(wait))

    def _refresh(self) -> None:
        if time.monotonic() - self._looked < FRESH_S:
            return
        self._looked, stamp = time.monotonic(), self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            log.error("the keys file %s is gone: no key is valid", self.path)
            self._records = ()
            return
        try:
            self._records = read_keys(self.path)
        except UserError as error:  # An editor's mistake does not lock everybody out.
            log.error("%s; the keys read before stay valid", error)

    def _stamp_now(self) -> tuple[int, int] | None:
        if self.path is None or not self.path.is_file():
            return None
        told = self.path.stat()
        return told.st_mtime_ns, told.st_ino


class Bucket:
    """Holds a minute's worth of requests and fills up again steadily."""

    def __init__(self, per_minute: float):
        self.level, self.at = max(1.0, per_minute), time.monotonic()

    def take(self, per_minute: float) -> float:
        """Take one and return 0, or return the seconds until there is one."""
        now = time.monotonic()
        rate = per_minute / 60
        self.level = min(max(1.0, per_minute), self.level + (now - self.at) * rate)
        self.at = now
        if self.level < 1:
            return (1 - self.level) / rate
        self.level -= 1
        return 0.0


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach, or be, `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    """Of a Host header: `a:80` is a, `[::1]:80` is [::1]."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
