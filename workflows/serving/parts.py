"""Builds the service's parts from settings, for one process or for several."""

import os
from collections.abc import Callable

from cartridges.config import BuildSettings, ModelSettings
from cartridges.engines.base import StreamingEngine
from cartridges.models import load_base_model, load_identity, load_tokenizer, resolve_model_dir
from cartridges.registry import Registry
from cartridges.template import ChatTemplate
from workflows.serving.backend import Backend, LocalBackend
from workflows.serving.catalog import Catalog
from workflows.serving.service import CartridgeService


def build_service(registry: str, settings: BuildSettings, backend: Backend) -> CartridgeService:
    """The service in front of `backend`. Reads the tokenizer and the model's identity, no weights."""
    directory = resolve_model_dir(settings.model)
    catalog = Catalog(Registry(registry), load_identity(directory), settings.serve.cartridges)
    return CartridgeService(catalog, backend, ChatTemplate(load_tokenizer(directory)), settings.serve)


def build_backend(registry: str, settings: BuildSettings) -> LocalBackend:
    """The engine and the cartridges it holds, in this process. Loads the model."""
    engine, forget = _transformers(settings)
    identity = load_identity(resolve_model_dir(settings.model))
    return LocalBackend(engine, Registry(registry), identity, settings.serve.resident_bytes, forget)


def _transformers(settings: BuildSettings) -> tuple[StreamingEngine, Callable[[str], None]]:
    import torch

    from cartridges.engines.stream import TransformersStreamingEngine

    # Ray gives an actor one thread for each of its logical CPUs; decoding wants all that are there.
    torch.set_num_threads(os.cpu_count() or 1)
    base = load_base_model(decoding_model(settings.model))
    engine = TransformersStreamingEngine(base, settings.serve.max_active, settings.serve.resident_bytes)
    return engine, engine.forget


def decoding_model(model: ModelSettings) -> ModelSettings:
    """`model` with the dtype for decoding: on a CPU `auto` is float32.

    oneDNN builds bfloat16 kernels anew for every shape, and a growing cache makes one a token:
    measured at batch 1, bfloat16 was no faster a token and 2.5 times slower to the first.
    """
    import torch

    if model.dtype == "auto" and not torch.cuda.is_available():
        return model.model_copy(update={"dtype": "float32"})
    return model
