"""Builds the service and its backend from settings, for one process or for several."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cartridges.config import BuildSettings, ModelSettings
from cartridges.engines.vllm_setup import for_model, wants_vllm
from cartridges.models import load_base_model, load_identity, load_tokenizer, resolve_model_dir
from cartridges.registry import Registry
from cartridges.template import ChatTemplate
from workflows.serving.backend import Backend, LocalBackend
from workflows.serving.catalog import Catalog
from workflows.serving.service import CartridgeService

if TYPE_CHECKING:
    from cartridges.engines.stream import TransformersStreamingEngine
    from cartridges.engines.vllm import AsyncVllmEngine


def build_service(registry: str, settings: BuildSettings, backend: Backend) -> CartridgeService:
    """The service in front of `backend`. Reads the tokenizer and the model's identity, no weights."""
    directory = resolve_model_dir(settings.model)
    catalog = Catalog(Registry(registry), load_identity(directory), settings.serve.cartridges)
    window = engine_window(settings, catalog.identity.max_position_embeddings)
    return CartridgeService(catalog, backend, ChatTemplate(load_tokenizer(directory)), settings.serve, window)


def engine_window(settings: BuildSettings, of_model: int) -> int:
    """Tokens that a prefix and its conversation may have: `of_model`, or less where vLLM is set to take less."""
    limited = settings.vllm.max_model_len and wants_vllm(settings.serve.engine, "serve.engine")
    return min(of_model, settings.vllm.max_model_len) if limited else of_model


def build_backend(registry: str, settings: BuildSettings) -> LocalBackend:
    """The engine and the cartridges it holds, in this process. Loads the model."""
    directory = resolve_model_dir(settings.model)
    wanted = wants_vllm(settings.serve.engine, "serve.engine")
    engine = _vllm(directory, settings) if wanted else _transformers(settings)
    return LocalBackend(engine, Registry(registry), load_identity(directory), settings.serve.resident_bytes,
                        engine.forget)


def _vllm(directory: Path, settings: BuildSettings) -> "AsyncVllmEngine":
    from cartridges.engines.vllm import AsyncVllmEngine

    return AsyncVllmEngine(directory, for_model(settings.vllm, settings.model))


def _transformers(settings: BuildSettings) -> "TransformersStreamingEngine":
    import torch

    from cartridges.engines.stream import TransformersStreamingEngine

    # Ray gives an actor one thread for each of its logical CPUs; decoding wants all that are there.
    torch.set_num_threads(os.cpu_count() or 1)
    base = load_base_model(decoding_model(settings.model))
    return TransformersStreamingEngine(base, settings.serve.max_active, settings.serve.resident_bytes)


def decoding_model(model: ModelSettings) -> ModelSettings:
    """`model` with the dtype for decoding: on a CPU `auto` is float32.

    One client alone had 0.4 to 0.7 times the tokens a second in bfloat16 (docs/serving.md).
    """
    import torch

    if model.dtype == "auto" and not torch.cuda.is_available():
        return model.model_copy(update={"dtype": "float32"})
    return model
