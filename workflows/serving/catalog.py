"""Which model names there are, and which cartridge version each means now."""

import difflib
import time
from dataclasses import dataclass

from cartridges.artifact import check_compatible
from cartridges.errors import UserError
from cartridges.models import ModelIdentity
from cartridges.registry import Entry, Registry
from workflows.serving.errors import ApiError

FRESH_S = 1.0
"""Seconds for which a name is not looked up again; so an alias that moves is served within that."""

BASE = "base"
"""A short name for the base model, beside its own."""


@dataclass(frozen=True)
class Target:
    """What a request's `model` means: a registry entry, or the base model (None)."""

    label: str
    entry: Entry | None

    @property
    def ref(self) -> str | None:
        """`name@version`: the one version this request is answered with, whatever aliases do."""
        return f"{self.entry.name}@{self.entry.version}" if self.entry else None

    @property
    def num_tokens(self) -> int:
        return self.entry.manifest.num_tokens if self.entry else 0


class Catalog:
    """The registry as the service offers it. `offered`: names to offer; empty is all.

    Blocking: it reads files. When the registry cannot be reached, what was known goes on being served.
    """

    def __init__(self, registry: Registry, identity: ModelIdentity, offered: tuple[str, ...] = ()):
        self.registry = registry
        self.identity = identity
        self.offered = offered
        self._known: dict[str, tuple[float, Entry]] = {}

    def resolve(self, model: str) -> Target:
        """Raises `ApiError` 404 for a name there is not, 409 for a cartridge of another base model."""
        if model in (BASE, self.identity.name):
            return Target(self.identity.name, None)
        entry = self._entry(model)
        try:
            check_compatible(entry.manifest, self.identity)
        except UserError as error:
            raise ApiError(409, f"{model}: {error}", "cartridge_incompatible", "model") from None
        return Target(entry.name, entry)

    def entries(self) -> list[Entry]:
        """What every offered name means now, sorted by name."""
        return sorted((entry for entry in self._list() if self._is_offered(entry.name)),
                      key=lambda entry: entry.name)

    def _list(self) -> list[Entry]:
        try:
            return list(self.registry.list())
        except OSError:
            return list({entry.name: entry for _, entry in self._known.values()}.values())

    def _entry(self, model: str) -> Entry:
        known = self._known.get(model)
        if known and time.monotonic() - known[0] < FRESH_S:
            return known[1]
        if not self._is_offered(model.partition("@")[0]):
            raise self._unknown(model)
        try:
            entry = self.registry.resolve(model)
        except UserError:
            self._known.pop(model, None)
            raise self._unknown(model) from None
        except OSError as error:
            if known:
                return known[1]
            raise ApiError(503, f"the registry cannot be reached ({type(error).__name__}); try again",
                           "registry_unreachable", retry_after=5) from error
        self._known[model] = (time.monotonic(), entry)
        return entry

    def _is_offered(self, name: str) -> bool:
        return not self.offered or name in {ref.partition("@")[0] for ref in self.offered}

    def _unknown(self, model: str) -> ApiError:
        names = [self.identity.name, *filter(self._is_offered, self.registry.names())]
        near = difflib.get_close_matches(model.partition("@")[0], names, n=5, cutoff=0.5) or names[:5]
        return ApiError(404, f"there is no model {model[:100]!r}; near it: {', '.join(near)}",
                        "model_not_found", "model")
