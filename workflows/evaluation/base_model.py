"""The base model that a published cartridge is run with."""

import re

from cartridges.artifact import Manifest
from cartridges.config import ModelSettings

HUB_COMMIT = re.compile("[0-9a-f]{40}")


def model_of(manifest: Manifest, settings: ModelSettings) -> ModelSettings:
    """The model that `settings` name explicitly, else the cartridge's own at the revision it was built for.

    Local directories and the wheel have no revision to ask the hub for.
    """
    if "name" in settings.model_fields_set:
        return settings
    built = manifest.model
    revision = settings.revision
    if revision is None and built.revision is not None and HUB_COMMIT.fullmatch(built.revision):
        revision = built.revision
    return settings.model_copy(update={"name": built.name, "revision": revision})
