"""Which model names there are, and which cartridge version each means now."""

import difflib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cartridges.artifact import check_compatible
from cartridges.compose import composed_tokens
from cartridges.errors import UserError
from cartridges.models import ModelIdentity
from cartridges.registry import Entry, Registry
from workflows.serving.api import MAX_CARTRIDGES
from workflows.serving.errors import ApiError

FRESH_S = 1.0
"""Seconds for which a name is not looked up again; so an alias that moves is served within that."""

PLUS = "+"
"""Between the names of several cartridges; it is in no name."""

SEVERAL = "(several)"
"""`model` of the metrics for requests with several cartridges: of combinations there are too many."""

AUTO = "auto"
"""As a request's model: the cartridge whose corpus the question is about."""

BASE = "base"
"""A short name for the base model, beside its own."""


MayUse = Callable[[str], bool]
"""Whether the caller may use the cartridge of that name."""


def everything(name: str) -> bool:
    return True


@dataclass(frozen=True)
class Target:
    """What a request's `model` means: registry entries in order, or the base model (none).

    `label` is what the metrics call it.
    """

    label: str
    entries: tuple[Entry, ...] = ()

    @property
    def ref(self) -> str | None:
        """`name@version`: the one version this request is answered with, whatever aliases do.

        Several are joined with `+`.
        """
        return PLUS.join(f"{entry.name}@{entry.version}" for entry in self.entries) or None

    @property
    def version(self) -> str | None:
        return PLUS.join(entry.version for entry in self.entries) or None

    @property
    def num_tokens(self) -> int:
        return composed_tokens([(entry.manifest.num_tokens, entry.manifest.num_frozen_tokens)
                                for entry in self.entries])


class Catalog:
    """The registry as the service offers it. `offered`: names to offer; empty is all.

    Blocking: it reads files. When the registry cannot be reached, what was known goes on being served.
    """

    def __init__(self, registry: Registry, identity: ModelIdentity, offered: tuple[str, ...] = ()):
        self.registry = registry
        self.identity = identity
        self.offered = offered
        self._known: dict[str, tuple[float, Entry]] = {}
        self._was_there = False

    def _reach(self) -> Registry:
        """The registry. OSError where its root is gone: a file system that is not mounted looks like an empty one."""
        there = self.registry.is_there()
        if self._was_there and not there:
            raise FileNotFoundError(f"registry {self.registry.root} is gone")
        self._was_there = self._was_there or there
        return self.registry

    def resolve(self, model: str, others: Iterable[str] = (), may_use: MayUse = everything) -> Target:
        """`model` is a name or several (`a+b`); those of `others` follow, each cartridge once.

        Raises `ApiError` 404 for a name there is not or that the caller may not use (which is which is
        not told), 409 for a cartridge of another base model.
        """
        refs = [] if model in (BASE, self.identity.name) else model.split(PLUS)
        entries = [self._compatible(ref, may_use) for ref in [*refs, *others]]
        # By version: `a` and `a@prod` may be the same.
        distinct = tuple({(entry.name, entry.version): entry for entry in entries}.values())
        if len(distinct) > MAX_CARTRIDGES:
            raise ApiError(400, f"{len(distinct)} cartridges in one request; at most {MAX_CARTRIDGES}", param="model")
        label = SEVERAL if len(distinct) > 1 else distinct[0].name if distinct else self.identity.name
        return Target(label, distinct)

    def _compatible(self, ref: str, may_use: MayUse) -> Entry:
        entry = self._entry(ref, may_use)
        try:
            check_compatible(entry.manifest, self.identity)
        except UserError as error:
            raise ApiError(409, f"{ref}: {error}", "cartridge_incompatible", "model") from None
        return entry

    def entries(self, may_use: MayUse = everything) -> list[Entry]:
        """What every offered name means now, sorted by name."""
        return sorted((entry for entry in self._list() if self._is_offered(entry.name) and may_use(entry.name)),
                      key=lambda entry: entry.name)

    def searchable(self) -> list[Entry]:
        """The offered cartridges of this base model whose corpus text is kept. OSError: registry unreachable."""
        return [entry for entry in self._reach().list() if self._is_offered(entry.name)
                and entry.manifest.corpus_text is not None and self._is_compatible(entry)]

    def _is_compatible(self, entry: Entry) -> bool:
        try:
            check_compatible(entry.manifest, self.identity)
        except UserError:
            return False
        return True

    def _list(self) -> list[Entry]:
        try:
            return list(self._reach().list())
        except OSError:
            return list({entry.name: entry for _, entry in self._known.values()}.values())

    def _names(self) -> Iterable[str]:
        try:
            return self._reach().names()
        except OSError:
            return sorted({entry.name for _, entry in self._known.values()})

    def _entry(self, model: str, may_use: MayUse) -> Entry:
        name = model.partition("@")[0]
        if not (self._is_offered(name) and may_use(name)):
            raise self._unknown(model, may_use)
        known = self._known.get(model)
        if known and time.monotonic() - known[0] < FRESH_S:
            return known[1]
        try:
            entry = self._reach().resolve(model)
        except UserError:
            self._known.pop(model, None)
            raise self._unknown(model, may_use) from None
        except OSError as error:
            if known:
                return known[1]
            raise ApiError(503, f"the registry cannot be reached ({type(error).__name__}); try again",
                           "registry_unreachable", retry_after=5) from error
        self._known[model] = (time.monotonic(), entry)
        return entry

    def _is_offered(self, name: str) -> bool:
        return not self.offered or name in {ref.partition("@")[0] for ref in self.offered}

    def _unknown(self, model: str, may_use: MayUse) -> ApiError:
        names = [self.identity.name, *filter(may_use, filter(self._is_offered, self._names()))]
        near = difflib.get_close_matches(model.partition("@")[0], names, n=5, cutoff=0.5) or names[:5]
        return ApiError(404, f"there is no model {model[:100]!r}; near it: {', '.join(near)}",
                        "model_not_found", "model")
