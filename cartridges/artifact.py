"""The artifact: a released cartridge on disk, `cartridge.safetensors` and `manifest.json`.

The manifest is written last, by rename, so that a directory is a cartridge exactly when its
manifest is there. It holds the tensor file's digest and everything a base model must agree on:
a cartridge in front of another model, tokenizer or chat template answers, and answers nonsense.

Nothing here needs torch until tensors are written or read, so that listing a registry is quick.
"""

import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cartridges.errors import UserError

if TYPE_CHECKING:
    from cartridges.cartridge import Cartridge
    from cartridges.models import ModelIdentity

FORMAT_VERSION = 1
TENSORS = "cartridge.safetensors"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
PROVENANCE = {"format_version", "report_card", "created", "libraries", "corpus_text", "composition",
              "composition_card"}
"""Manifest fields that are not part of the version: they tell of the build, not of the cartridge."""

Dtype = Literal["bfloat16", "float32"]


class Record(BaseModel):
    # `model_` is pydantic's own prefix; our field `model` is meant.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True,
                              protected_namespaces=())


class ModelRecord(Record):
    """The base model a cartridge belongs to; the fields of `cartridges.models.ModelIdentity`."""

    name: str
    revision: str | None
    weights_digest: str
    tokenizer_hash: str
    template_hash: str
    rope: dict[str, Any]
    num_layers: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    max_position_embeddings: int = Field(ge=1)

    @classmethod
    def of(cls, identity: "ModelIdentity") -> "ModelRecord":
        # Through JSON, so that a fresh record equals one read from a manifest (tuples are lists).
        plain = json.loads(json.dumps(asdict(identity)))
        return cls(**{name: plain[name] for name in cls.model_fields})


class CorpusRecord(Record):
    id: str
    fingerprint: str
    tokens: int = Field(ge=0)
    """Length of the corpus in the base model's tokens."""


class TextRecord(Record):
    """The corpus' text, kept beside the cartridge (`cartridges.corpus_text`)."""

    digest: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the UTF-8 bytes of `corpus.txt`."""
    file_bytes: int = Field(ge=1)


class Manifest(Record):
    format_version: int = FORMAT_VERSION
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    """sha256 of the bytes of `cartridge.safetensors`."""
    file_bytes: int = Field(ge=1)
    """Size of `cartridge.safetensors`: tells a truncated file from a changed one."""
    model: ModelRecord
    num_tokens: int = Field(ge=1)
    num_frozen_tokens: int = Field(ge=0)
    dtype: Dtype
    corpus: CorpusRecord
    corpus_text: TextRecord | None = None
    """The text, where it was kept: what full context reads. None for a private corpus."""
    settings: dict[str, Any] = {}
    seed: int = 0
    report_card: dict[str, Any] | None = None
    composition: int = Field(0, ge=0)
    """With how many partners loaded beside it the cartridge passed the collapse test; 0 is none."""
    composition_card: dict[str, Any] | None = None
    """What that test found (`cartridges.evaluation.composition`)."""
    licence: str | None = None
    created: str
    """UTC, ISO 8601."""
    libraries: dict[str, str] = {}

    @model_validator(mode="after")
    def _frozen_slots_fit(self) -> "Manifest":
        if self.num_frozen_tokens > self.num_tokens:
            raise ValueError("num_frozen_tokens is larger than num_tokens")
        return self

    @property
    def version(self) -> str:
        """Content hash, 16 hex digits: the same cartridge has the same version anywhere."""
        # Defaults are left out, so that a field added later does not change older versions.
        content = self.model_dump(mode="json", exclude=PROVENANCE, exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_draft(self) -> bool:
        """Whether it is the start of a training that was not run."""
        train = self.settings.get("train")
        # One that goes on from a cartridge is that cartridge.
        return isinstance(train, dict) and train.get("loss") == "none" and train.get("init") != "cartridge"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """`[num_layers, num_key_value_heads, p, head_dim]` of `keys` and of `values`."""
        return (self.model.num_layers, self.model.num_key_value_heads, self.num_tokens,
                self.model.head_dim)


@dataclass(frozen=True)
class Artifact:
    """A loaded cartridge. `digest` names its bytes: the salt of prefix caches."""

    cartridge: "Cartridge"
    manifest: Manifest
    digest: str


def save(directory: str | Path, cartridge: "Cartridge", *, model: "ModelIdentity",
         corpus: CorpusRecord, settings: dict[str, Any], seed: int = 0,
         report_card: dict[str, Any] | None = None, composition: int = 0,
         licence: str | None = None, dtype: Dtype = "bfloat16") -> Manifest:
    """Write `cartridge` as an artifact. What `load` gives back is bit-equal to it cast to `dtype`.

    Raises `UserError` if the cartridge is not of `model`'s shape or holds non-finite values.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    data = _to_bytes(cartridge, dtype)
    manifest = Manifest(
        digest=hashlib.sha256(data).hexdigest(), file_bytes=len(data), model=ModelRecord.of(model),
        num_tokens=cartridge.num_tokens, num_frozen_tokens=cartridge.num_frozen_tokens, dtype=dtype,
        corpus=corpus, settings=settings, seed=seed, report_card=report_card,
        composition=composition, licence=licence, libraries=_library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"))
    _check_shape(cartridge, manifest)
    # An older manifest must not vouch for the new tensors if we are killed in between.
    (directory / MANIFEST).unlink(missing_ok=True)
    write_atomically(directory / TENSORS, data)
    write_manifest(directory, manifest)
    return manifest


def set_report_card(directory: str | Path, report_card: dict[str, Any]) -> Manifest:
    """Put `report_card` into the manifest of an artifact that is not published yet."""
    manifest = read_manifest(directory).model_copy(update={"report_card": report_card})
    write_manifest(directory, manifest)
    return manifest


def load(directory: str | Path) -> Artifact:
    """Read and verify an artifact: manifest, digest, shapes, dtype, finite values.

    Raises `UserError` that names the file and what is wrong with it.
    """
    directory = Path(directory)
    manifest = verify(directory)
    keys, values = _read_tensors(directory / TENSORS, manifest)
    from cartridges.cartridge import Cartridge

    return Artifact(Cartridge(keys, values, manifest.num_frozen_tokens), manifest, manifest.digest)


def verify(directory: str | Path) -> Manifest:
    """Check that the manifest is whole and the tensor file has its digest; no tensors are read."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    path = directory / TENSORS
    if not path.is_file():
        raise UserError(f"{path} is missing: the cartridge is damaged; build or import it again")
    size = path.stat().st_size
    if size != manifest.file_bytes:
        raise UserError(f"{path} is damaged: it has {size} bytes, its manifest says "
                        f"{manifest.file_bytes}; build or import it again")
    if file_digest(path) != manifest.digest:
        raise UserError(f"{path} is damaged: its digest is not the manifest's; build or import it again")
    return manifest


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest alone. Raises `UserError` where there is none or it cannot be read."""
    path = Path(directory) / MANIFEST
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a directory; give the directory of a cartridge")
    if not path.is_file():
        raise UserError(f"{path} is missing: the directory holds an unfinished cartridge, or none; "
                        "run the build again")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """`data` as a manifest; `where` names it in the error."""
    try:
        loaded = json.loads(data)
    except ValueError:
        raise UserError(f"{where} is not JSON: the cartridge is damaged; build or import it again") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("format_version"), int):
        raise UserError(f"{where} is not a cartridge manifest (no format_version)")
    if loaded["format_version"] > FORMAT_VERSION:
        raise UserError(f"{where} has format {loaded['format_version']}, newer than this version's "
                        f"{FORMAT_VERSION}; upgrade cartridges to read it")
    try:
        return Manifest.model_validate(loaded)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(f"{where} is not a valid manifest: {field}: {first['msg']}") from None


def check_compatible(manifest: Manifest, identity: "ModelIdentity") -> None:
    """Refuse a base model the cartridge was not built for. `UserError` names every mismatch."""
    built, given = manifest.model, ModelRecord.of(identity)
    problems = [label for label, fields in _MUST_AGREE.items()
                if any(getattr(built, field) != getattr(given, field) for field in fields)]
    if problems:
        raise UserError(f"this cartridge was built for {built.name}, not for {given.name}: "
                        f"{', '.join(problems)} differ; serve it with its own model or build it again")
    if manifest.num_tokens >= given.max_position_embeddings:
        raise UserError(f"the cartridge's {manifest.num_tokens} tokens leave no room in {given.name}'s "
                        f"window of {given.max_position_embeddings}; build it with fewer tokens")


_MUST_AGREE = {
    "shape (layers, KV heads, head_dim)": ("num_layers", "num_key_value_heads", "head_dim"),
    "vocabulary size": ("vocab_size",),
    "RoPE parameters": ("rope",),
    "model weights": ("weights_digest",),
    "tokenizer": ("tokenizer_hash",),
    "chat template": ("template_hash",),
}


def write_manifest(directory: Path | str, manifest: Manifest) -> None:
    write_atomically(Path(directory) / MANIFEST, manifest_bytes(manifest))


def manifest_bytes(manifest: Manifest) -> bytes:
    return (manifest.model_dump_json(indent=1) + "\n").encode()


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Temporary name, fsync, rename: a reader sees the old file or the new one. `mode` is before the umask."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_bytes(cartridge: "Cartridge", dtype: Dtype) -> bytes:
    import torch
    from safetensors.torch import save as to_safetensors

    keys, values = (tensor.detach().cpu().to(getattr(torch, dtype)).contiguous()
                    for tensor in cartridge.keys_values())
    if not (keys.isfinite().all() and values.isfinite().all()):
        raise UserError("the cartridge holds non-finite values and is not saved; train it again with "
                        "a lower learning rate")
    return to_safetensors({"keys": keys, "values": values})


def _check_shape(cartridge: "Cartridge", manifest: Manifest) -> None:
    shape = cartridge.shape
    built = (shape.num_layers, shape.num_key_value_heads, cartridge.num_tokens, shape.head_dim)
    if built != manifest.shape:
        raise UserError(f"the cartridge is {list(built)}, {manifest.model.name} needs {list(manifest.shape)}")


def _read_tensors(path: Path, manifest: Manifest):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}; build or import it again") from None
    if set(tensors) != {"keys", "values"}:
        raise UserError(f"{path} holds {sorted(tensors)}, a cartridge holds ['keys', 'values']")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != manifest.shape:
            raise UserError(f"{path}: {name} are {list(tensor.shape)}, the manifest says "
                            f"{list(manifest.shape)}")
        if tensor.dtype != getattr(torch, manifest.dtype):
            raise UserError(f"{path}: {name} are {tensor.dtype}, the manifest says {manifest.dtype}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} hold non-finite values; build the cartridge again")
    return tensors["keys"], tensors["values"]


def _library_versions() -> dict[str, str]:
    found = {}
    for name in ("cartridges", "torch", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "unknown"
    return found
