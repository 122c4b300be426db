"""The frozen base model: its identity, whether its KV cache can hold a cartridge, and loading it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cartridges.config import ModelSettings
from cartridges.download import home, resolve_source
from cartridges.errors import UserError
from cartridges.files import file_digest, write_atomically
from cartridges.records import KVShape
from cartridges.template import ChatTemplate

SUPPORTED_TYPES = ("llama", "qwen2", "qwen3", "mistral")


@dataclass(frozen=True)
class ModelIdentity:
    """The properties that a cartridge's manifest and the model that serves it must share.

    Digests are hex sha256: `weights_digest` over the safetensors files, `tokenizer_hash` over
    tokenizer.json, `template_hash` over the chat template and our preamble. `rope` holds the
    config's RoPE parameters. `revision` is the hub commit, the wheel, or "local".
    """

    name: str
    revision: str
    weights_digest: str
    tokenizer_hash: str
    template_hash: str
    rope: dict[str, Any]
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def shape(self) -> KVShape:
        return KVShape(self.num_layers, self.num_key_value_heads, self.head_dim)


@dataclass(frozen=True)
class BaseModel:
    """A frozen `model` (eval mode, no gradients) on `device` in `dtype`, with its tokenizer and identity."""

    model: Any
    tokenizer: Any
    template: ChatTemplate
    identity: ModelIdentity
    shape: KVShape
    device: str
    dtype: Any


def resolve_model_dir(settings: ModelSettings) -> Path:
    """The directory of the model's files, downloaded once. Raises `UserError` if the model cannot be found."""
    return Path(resolve_source(settings).directory)


def load_config(directory: Path):
    """The `transformers` config. Raises `UserError` if the model's KV cache cannot hold a cartridge."""
    from transformers import AutoConfig

    raw = _read_json(directory / "config.json")
    if "model_type" not in raw or "auto_map" in raw:
        raise UserError(f"model {directory} brings its own code; supported are "
                        f"{', '.join(SUPPORTED_TYPES)} models")
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError):
        raise UserError(f"model {directory}: transformers does not know model type {raw['model_type']!r}; "
                        f"supported are {', '.join(SUPPORTED_TYPES)}") from None
    reason = refusal(config.to_dict())
    if reason:
        raise UserError(f"model {directory} cannot take a cartridge: {reason}")
    return config


def refusal(config: dict[str, Any]) -> str | None:
    """Why the KV cache of a model with this config cannot hold a cartridge, or None if it can."""
    layer_types = set(config.get("layer_types") or ())
    rope_types = {value for key, value in _rope(config).items() if key in ("rope_type", "type")}
    architectures = config.get("architectures") or ()
    checks = [
        (config.get("is_encoder_decoder"), "it is an encoder-decoder model"),
        (not all(name.endswith("ForCausalLM") for name in architectures),
         f"{', '.join(architectures)} is not a causal language model"),
        (config.get("kv_lora_rank"), "its KV cache is compressed (multi-head latent attention)"),
        (layer_types & {"linear_attention", "mamba", "recurrent", "conv"}
         or config.get("model_type") in ("mamba", "mamba2", "jamba", "rwkv"),
         "it has recurrent or state-space layers, which keep no KV cache"),
        (_uses_sliding_window(config, layer_types), "a sliding attention window would drop it"),
        (rope_types & {"dynamic", "longrope"}, "its RoPE depends on the length of the sequence"),
        (config.get("model_type") not in SUPPORTED_TYPES,
         f"model type {config.get('model_type')!r} is not one of {', '.join(SUPPORTED_TYPES)}"),
    ]
    return next((reason for failed, reason in checks if failed), None)


def _uses_sliding_window(config: dict[str, Any], layer_types: set[str]) -> bool:
    if layer_types & {"sliding_attention", "chunked_attention"}:
        return True
    if layer_types:
        return False
    return config.get("use_sliding_window", True) and config.get("sliding_window") is not None


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or {}


def kv_shape(config) -> KVShape:
    """Layers, KV heads and head_dim from the config (Qwen2 and Mistral may omit head_dim)."""
    fields = config.to_dict()
    head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    return KVShape(config.num_hidden_layers, config.num_key_value_heads, head_dim)


def rope_frequencies(identity: ModelIdentity):
    """float32 `[head_dim / 2]`: the angle in radians by which one position rotates each plane of the keys."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    # All supported types use Llama's rotary embedding, which depends only on these parameters.
    config = LlamaConfig(rope_parameters=dict(identity.rope), head_dim=identity.head_dim,
                         max_position_embeddings=identity.max_position_embeddings)
    return LlamaRotaryEmbedding(config).inv_freq.float()


def load_tokenizer(directory: Path):
    """The fast tokenizer in a model directory, from local files only."""
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"model {directory} has no tokenizer.json; save its fast tokenizer there first")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def load_identity(directory: Path | str) -> ModelIdentity:
    """The identity of the model in `directory`, without loading its weights."""
    directory = Path(directory)
    return _identity(directory, load_config(directory), ChatTemplate(load_tokenizer(directory)))


def _identity(directory: Path, config, template: ChatTemplate) -> ModelIdentity:
    source = resolve_source(ModelSettings(name=str(directory)))
    shape = kv_shape(config)
    return ModelIdentity(
        name=source.name,
        revision=source.revision,
        weights_digest=weights_digest(directory),
        tokenizer_hash=file_digest(directory / "tokenizer.json"),
        template_hash=template.hash,
        rope=dict(_rope(config.to_dict())),
        num_layers=shape.num_layers,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
    )


def weights_digest(directory: Path) -> str:
    """Hex sha256 over the names and bytes of the safetensors files, in name order.

    Cached under `home()` by the files' paths, sizes and times, because hashing a large model takes a minute.
    """
    files = sorted(directory.glob("*.safetensors"))
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = sha256(json.dumps(stamps).encode()).hexdigest()
    remembered = home() / "digests" / f"{key}.json"
    if remembered.is_file():
        return _read_json(remembered)["weights_digest"]
    parts = "".join(f"{file.name}:{file_digest(file)}\n" for file in files)
    digest = sha256(parts.encode()).hexdigest()
    remembered.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(remembered, json.dumps({"weights_digest": digest, "files": stamps}) + "\n")
    return digest


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {str(error).splitlines()[0]}") from None


def choose_dtype(setting: str, device: str):
    """`setting` as a torch dtype; auto is bfloat16 on a GPU and on CPUs with bfloat16 arithmetic, else float32."""
    import torch

    if setting != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[setting]
    able = torch.cpu.get_capabilities()
    fast = device.startswith("cuda") or able.get("amx_tile") or able.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def _no_bars() -> Iterator[None]:
    """Disable transformers' progress bars, which would disturb a command's own progress output."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_base_model(settings: ModelSettings, device: str | None = None,
                    attn_implementation: str | None = None) -> BaseModel:
    """Load the frozen base model. `device` None is the first GPU, or the CPU if there is none.

    Raises `UserError` for a missing or unsuitable model, before any weight is read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    directory = resolve_model_dir(settings)
    config = load_config(directory)
    tokenizer = load_tokenizer(directory)
    template = ChatTemplate(tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(settings.dtype, device)
    with _no_bars():
        model = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, attn_implementation=attn_implementation,
            local_files_only=True, use_safetensors=True, trust_remote_code=False)
    model = model.to(device).eval().requires_grad_(False)
    if device.startswith("cuda"):  # here, so that teacher, student and report card round alike
        from cartridges.norms import fuse_norms

        fuse_norms(model)
    return BaseModel(model, tokenizer, template, _identity(directory, config, template),
                     kv_shape(config), device, dtype)


def main() -> None:
    """Download the default model (or the one named) before its first use."""
    import sys

    name = sys.argv[1] if len(sys.argv) > 1 else ModelSettings().name
    try:
        print(resolve_model_dir(ModelSettings(name=name)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
