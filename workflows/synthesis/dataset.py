"""A data set before it is made: its fingerprint, its chunks and its planned conversations."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.files import replacing
from cartridges.records import Chunk, Corpus, Task
from workflows.runtime.manifests import fingerprint, read_manifest, require_match, write_manifest

if TYPE_CHECKING:
    from cartridges.models import ModelIdentity

MANIFEST = "dataset.json"
CARD = "data_card.json"


def corpus_tokens(corpus: Corpus, settings: BuildSettings) -> int:
    """Length of the corpus in the model's tokens, what stands between documents included."""
    from cartridges.models import resolve_model_dir

    model = resolve_model_dir(settings.model)
    if (model, corpus.fingerprint) not in _TOKENS:
        tokenizer = _tokenizer(model)
        _TOKENS[model, corpus.fingerprint] = sum(
            len(tokenizer.encode(text, add_special_tokens=False, verbose=False))
            for text in chain(["\n\n"] * (len(corpus.documents) - 1), (one.text for one in corpus.documents)))
    return _TOKENS[model, corpus.fingerprint]


_TOKENS: dict[tuple[Path, str], int] = {}
"""Counted once: the stages of a build all ask."""


@lru_cache(maxsize=4)
def _tokenizer(directory: Path) -> Any:
    """Read once: a collection asks for each of its corpora."""
    from cartridges.models import load_tokenizer

    return load_tokenizer(directory)


@lru_cache(maxsize=4)
def model_identity(directory: Path) -> "ModelIdentity":
    """Read once, as the tokenizer."""
    from cartridges.models import load_identity

    return load_identity(directory)


def dataset_fingerprint(corpus: Corpus, settings: BuildSettings, weights: Mapping[str, float] | None = None,
                        earlier: Sequence[str] = ()) -> str:
    """Changes with whatever changes the conversations, and with nothing else (but for what `engine=auto` comes to on
    an actor's machine, which is not known here)."""
    from cartridges.models import resolve_model_dir
    from cartridges.selfstudy.families import DEFAULT_MIXTURE

    identity = model_identity(resolve_model_dir(settings.model))
    how = {"num_actors", "max_actors", "threads_per_actor", "batch_size", "max_failed_share", "retries", "engine",
           "asking"}
    # Settings that were added later are left out while they are off, so that older data sets stay valid.
    off = {name for name in ("drop_ungrounded_names", "near_duplicate", "filters_off", "general_share")
           if not getattr(settings.synthesize, name)}
    asking = settings.synthesize.asking
    if asking.model:
        asker = model_identity(resolve_model_dir(asking.model))
        asks = {"asking": [asker.weights_digest, asker.tokenizer_hash, asker.template_hash, asking.model.dtype]}
    else:
        asks = {"asking": [asking.endpoint, asking.endpoint_model]} if asking.endpoint else {}
    if settings.synthesize.engine == "vllm":
        asks["vllm"] = settings.vllm.dtype  # It draws differently, and may compute in another dtype.
    follows = {"weights": dict(weights or {}), "earlier": fingerprints(earlier), "ordinals": "go on"} \
        if earlier or weights else {}
    return fingerprint({
        **follows, **asks, "corpus": corpus.fingerprint, "seed": settings.seed, "dtype": settings.model.dtype,
        "synthesize": settings.synthesize.model_dump(mode="json", exclude=how | off),
        "families": settings.synthesize.families or DEFAULT_MIXTURE,
        "model": [identity.weights_digest, identity.tokenizer_hash, identity.template_hash],
    })


def fingerprints(datasets: Sequence[str]) -> list[str]:
    """Fingerprints of finished data sets, in order."""
    return [read_manifest(Path(dataset) / MANIFEST)["fingerprint"] for dataset in datasets]


def plan_dataset(corpus: Corpus, output: Path, settings: BuildSettings, expected: str,
                 weights: Mapping[str, float] | None = None, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Chunks and tasks on disk; `plan.json` last. Found there already, it is taken as it is. Families go on through a
    chunk where the data sets `earlier` left it."""
    planned = read_manifest(output / "plan.json")
    require_match(planned, expected, output)
    if planned is not None:
        return planned
    from cartridges.chunking import Chunks
    from cartridges.models import resolve_model_dir
    from cartridges.selfstudy.plan import plan
    from cartridges.selfstudy.storage import count_tasks

    chunks = Chunks(corpus, _tokenizer(resolve_model_dir(settings.model)), settings.synthesize.chunk)
    before = count_tasks(Path(dataset) / "shards" for dataset in earlier)
    tasks = plan(chunks, settings.synthesize, settings.seed, weights, before)
    if not tasks:
        raise UserError("no conversations are planned: the corpus has no text")
    (output / "work").mkdir(exist_ok=True)
    asked = {task.chunk_id for task in tasks}
    write_rows(output / "chunks.parquet", Chunk, chunks.with_ids(asked))
    write_rows(output / "work" / "tasks.parquet", Task, tasks)
    planned = {
        "fingerprint": expected, "chunks": len(chunks), "conversations": len(tasks), "seed": settings.seed,
        "corpus": {"id": corpus.corpus_id, "fingerprint": corpus.fingerprint,
                   "tokens": corpus_tokens(corpus, settings)},
        "settings": settings.synthesize.model_dump(mode="json"), "model": settings.model.name,
    }
    write_manifest(output / "plan.json", planned)
    return planned


def write_rows(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Records of one `kind`, as Parquet; there may be none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {str: pa.string(), int: pa.int64()}
    schema = pa.schema([(field.name, types[field.type]) for field in fields(kind)])
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=schema), temporary)
