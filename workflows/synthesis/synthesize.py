"""Self-study on Ray Data: corpus -> chunks -> planned tasks -> actors -> Parquet shards.

    DIR/plan.json                     what is to be done, with its fingerprint
    DIR/chunks.parquet                the chunks that are asked about
    DIR/work/{tasks,parts,checkpoint} Ray Data's input, output and what it has committed
    DIR/shards/part-*.parquet         the finished conversations, kept and dropped, in order of id
    DIR/data_card.json                what is in them (`cartridges inspect DIR`)
    DIR/dataset.json                  manifest, written last

Killed anywhere, the same call goes on: Ray Data skips what is committed, at most the batches in
flight are done again, and the ids are those of the plan.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.records import Corpus
from workflows.runtime.manifests import read_manifest, require_match, write_manifest
from workflows.runtime.progress import ProgressCallback
from workflows.synthesis.dataset import (
    CARD,
    MANIFEST,
    corpus_tokens,
    dataset_fingerprint,
    model_identity,
    plan_dataset,
)
from workflows.synthesis.plan_size import with_counts
from workflows.synthesis.ray_pipeline import generate

FEW_KEPT = 0.1
"""Share of the planned conversations; a warning says when fewer are kept."""
logger = logging.getLogger(__name__)


def synthesize(corpus: Corpus, output_dir: str, settings: BuildSettings,
               progress: ProgressCallback | None = None, job: str | None = None,
               weights: Mapping[str, float] | None = None, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Conversations of `corpus` in `output_dir`; returns the manifest. Resumes; done is done.

    `job` groups the W&B runs of one build. `weights` by chunk id give some chunks more conversations;
    what stands word for word in one of the finished data sets `earlier` is dropped as a duplicate.

    Raises `UserError` where `output_dir` holds another corpus' or other settings' conversations, and
    `RuntimeError` where more than `synthesize.max_failed_share` of the conversations raised.
    """
    output = Path(output_dir)
    settings = with_counts(settings, corpus_tokens(corpus, settings))
    expected = dataset_fingerprint(corpus, settings, weights, earlier)
    done = read_manifest(output / MANIFEST)
    require_match(done, expected, output)
    if done is not None:
        require_some(done, output, earlier)
        return done
    from workflows.runtime.tracking import track
    from workflows.synthesis.open_synthesizer import check_generation

    check_generation(settings)
    output.mkdir(parents=True, exist_ok=True)
    planned = plan_dataset(corpus, output, settings, expected, weights, earlier)
    with track("synthesize", corpus.corpus_id, settings.model_dump(mode="json"), output, job) as run:
        speed = generate(output, settings, planned["conversations"], progress)
        manifest = finish_dataset(output, settings, planned, speed, earlier)
        run.log(metrics([manifest]))
    require_some(manifest, output, earlier)
    return manifest


def require_some(manifest: dict[str, Any], output: Path, earlier: Sequence[str]) -> None:
    """Raise `UserError` where nothing was kept, unless it is a later round, which may have nothing new."""
    if not manifest["conversations"]["kept"] and not earlier:
        raise UserError(f"none of the {manifest['planned']} conversations was kept ({_reasons(manifest)}); `cartridges "
                        f"inspect {output}` shows them. Choose other synthesize.families, or see filters_off")


def _reasons(manifest: dict[str, Any]) -> str:
    dropped = Counter(manifest["conversations"]["dropped"])
    return ", ".join(f"{count} {reason}" for reason, count in dropped.most_common(4))


def finish_dataset(output: Path, settings: BuildSettings, planned: dict[str, Any],
            speed: dict[str, float], earlier: Sequence[str]) -> dict[str, Any]:
    """Deduplicate into `shards/`, check the failures, write card and manifest, drop the work files."""
    from cartridges.selfstudy.data_card import data_card
    from cartridges.selfstudy.deduplicate import deduplicate
    from workflows.synthesis.failures import require_few

    work = output / "work"
    temporary = output / "shards.tmp"
    for leftover in (temporary, output / "shards"):
        shutil.rmtree(leftover, ignore_errors=True)
    wanted = settings.synthesize
    before = [file for dataset in earlier for file in sorted((Path(dataset) / "shards").glob("*.parquet"))]
    summary = deduplicate(work / "parts", temporary, "duplicate" not in wanted.filters_off,
                          None if "near_duplicate" in wanted.filters_off else wanted.near_duplicate, before)
    require_few(summary.dropped["error"], planned["conversations"], wanted.max_failed_share, work)
    if summary.errors:
        logger.warning("%d conversations raised and were left out; `cartridges inspect %s` lists them",
                       summary.dropped["error"], output)
    few = summary.kept < FEW_KEPT * planned["conversations"]
    if summary.kept and (few or 2 * summary.dropped["nothing_to_ask"] > planned["conversations"]):
        logger.warning("%s: %d of %d conversations were kept (%s)", output, summary.kept, planned["conversations"],
                       _reasons(summary.as_dict()))
    temporary.rename(output / "shards")
    manifest = {**planned, **summary.as_dict(), "planned": planned["conversations"], **speed}
    write_manifest(output / CARD, data_card(summary, manifest, _model_record(settings)))
    write_manifest(output / MANIFEST, manifest)
    shutil.rmtree(work)
    return manifest


def _model_record(settings: BuildSettings) -> dict[str, str | None]:
    """The model that was asked for, with the revision and hashes of the one that was found."""
    from cartridges.models import resolve_model_dir

    identity = model_identity(resolve_model_dir(settings.model))
    digests = ("weights_digest", "tokenizer_hash", "template_hash")
    return {**settings.model.model_dump(mode="json"), "source": identity.revision,
            **{name: getattr(identity, name) for name in digests}}


def metrics(manifests: Sequence[dict[str, Any]]) -> dict[str, float]:
    """W&B figures of one data set, or of several that were made in one run."""
    def total(*path: str) -> float:
        return sum(reduce(dict.__getitem__, path, manifest) for manifest in manifests)

    planned, seconds, read = total("planned"), total("seconds"), total("tokens", "input")
    dropped = [manifest["conversations"]["dropped"] for manifest in manifests]
    repeated = sum(one.get("duplicate", 0) + one.get("near_duplicate", 0) for one in dropped)
    return {
        "synthesize/conversations": planned, "synthesize/kept": total("conversations", "kept"),
        "synthesize/dropped": sum(sum(one.values()) for one in dropped), "synthesize/tokens": read,
        **{f"synthesize/{name}": total(name) / len(manifests) for name in ("topk_mass", "teacher_entropy")},
        "synthesize/duplicate_share": repeated / planned,
        "synthesize/conversations_per_s": manifests[0]["conversations_per_s"],
        "synthesize/tokens_per_s": read / seconds, "synthesize/seconds": seconds,
    }
