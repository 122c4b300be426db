"""Self-study for many corpora in one run of Ray Data: each engine is opened once, whatever the number of corpora.

    DIR/together.json                 which data sets are made here, in order; DIR is WORK/together-<fingerprint>
    DIR/chunks.parquet                the chunks of all
    DIR/work/{tasks,parts,checkpoint} as for one; an id is `<number of the data set>/<conversation id>`

Finished conversations are moved to each data set's own directory, as `synthesize` would leave it, and DIR is deleted.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.records import Corpus
from workflows.runtime.manifests import (
    Failed,
    fingerprint,
    read_failed,
    read_manifest,
    require_match,
    write_failed,
    write_manifest,
)
from workflows.runtime.progress import ProgressCallback
from workflows.synthesis.dataset import MANIFEST, dataset_fingerprint, plan_dataset
from workflows.synthesis.ray_pipeline import generate
from workflows.synthesis.synthesize import finish_dataset, metrics

TOGETHER, FAILED, ID = "together.json", "failed.json", "conversation_id"


@dataclass(frozen=True)
class DatasetSpec:
    """One data set, its number of conversations decided. All have one model and one way to synthesize."""

    corpus: Corpus
    output: Path
    settings: BuildSettings


def synthesize_many(wanted: Sequence[DatasetSpec], work: Path, label: str, progress: ProgressCallback | None = None,
                    job: str | None = None) -> list[dict[str, Any] | Failed]:
    """The manifests of all, in order; `Failed` of one that could not be made. Resumes; done is done. The data
    sets are below `work`.

    Raises as `workflows.synthesis.synthesize.synthesize` does where it concerns all of them.
    """
    expected = [dataset_fingerprint(one.corpus, one.settings) for one in wanted]
    for one, own in zip(wanted, expected, strict=True):
        require_match(read_manifest(one.output / MANIFEST), own, one.output)
    todo = [index for index, one in enumerate(wanted) if read_manifest(one.output / MANIFEST) is None]
    if todo:
        _make([wanted[index] for index in todo], [expected[index] for index in todo], work, label, progress, job)
    return [read_manifest(one.output / MANIFEST) or read_failed(one.output / FAILED) for one in wanted]


def _make(todo: Sequence[DatasetSpec], expected: Sequence[str], work: Path, label: str,
          progress: ProgressCallback | None, job: str | None) -> None:
    from workflows.runtime.tracking import track
    from workflows.synthesis.open_synthesizer import check_generation

    settings = todo[0].settings
    check_generation(settings)
    plans = [_plan(one, own) for one, own in zip(todo, expected, strict=True)]
    places = [Path(os.path.relpath(one.output, work)).as_posix() for one in todo]
    directory = _begun(places, work) or work / f"together-{fingerprint(places)}"
    joined = _join(todo, places, plans, directory)
    numbers = [joined["datasets"].index(place) for place in places]
    with track("synthesize", label, settings.model_dump(mode="json"), work, job) as run:
        speed = generate(directory, settings, joined["conversations"], progress)
        _require_few_errors(directory / "work", settings, joined["conversations"])
        _split(todo, numbers, directory / "work" / "parts")
        made = []
        for one, plan in zip(todo, plans, strict=True):
            seconds = speed["seconds"] * plan["conversations"] / joined["conversations"]
            made.append(_finish(one, plan, speed | {"seconds": seconds}, directory / "work"))
        kept = [manifest for manifest in made if not isinstance(manifest, Failed)]
        if kept:
            run.log(metrics(kept))
    if len(kept) == len(todo):
        shutil.rmtree(directory)


def _plan(one: DatasetSpec, expected: str) -> dict[str, Any]:
    one.output.mkdir(parents=True, exist_ok=True)
    return plan_dataset(one.corpus, one.output, one.settings, expected)


def _begun(places: Sequence[str], work: Path) -> Path | None:
    """The directory of a run that makes just these, or these and others that are finished."""
    for file in sorted(work.glob(f"together-*/{TOGETHER}")):
        made_there = set(read_manifest(file)["datasets"])
        if made_there >= set(places) and all((work / other / MANIFEST).is_file() for other in made_there - set(places)):
            return file.parent
    return None


def _join(todo: Sequence[DatasetSpec], places: Sequence[str], plans: Sequence[dict[str, Any]],
          directory: Path) -> dict[str, Any]:
    """Tasks and chunks of all in one place: `{datasets: their places in order, conversations}`."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from cartridges.selfstudy.families import decodes

    found = read_manifest(directory / TOGETHER)
    if found is not None:
        return found
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "work").mkdir(parents=True)
    tasks: dict[bool, list[pa.Table]] = {False: [], True: []}
    chunks = []
    for number, one in enumerate(todo):
        own = pq.read_table(one.output / "work" / "tasks.parquet")
        ids = pc.binary_join_element_wise(str(number), own[ID], "/")
        own = own.set_column(own.schema.get_field_index(ID), ID, ids)
        written = pa.array([decodes(name) for name in own["seed_family"].to_pylist()])
        # Conversations to be decoded come last, in full batches: the few of one corpus would decode almost alone.
        for later, part in tasks.items():
            part.append(own.filter(pc.equal(written, later)))
        chunks.append(pq.read_table(one.output / "chunks.parquet"))
    pq.write_table(pa.concat_tables(tasks[False] + tasks[True]), directory / "work" / "tasks.parquet")
    pq.write_table(pa.concat_tables(chunks), directory / "chunks.parquet")
    joined = {"datasets": list(places), "conversations": sum(plan["conversations"] for plan in plans)}
    write_manifest(directory / TOGETHER, joined)
    return joined


def _require_few_errors(work: Path, settings: BuildSettings, planned: int) -> None:
    from workflows.synthesis.failures import count_failed, require_few

    require_few(count_failed(work), planned, settings.synthesize.max_failed_share, work)


def _split(todo: Sequence[DatasetSpec], numbers: Sequence[int], parts: Path) -> None:
    """Write each data set's own rows to its directory, under their own ids."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    places = {number: one.output / "work" / "parts" for number, one in zip(numbers, todo, strict=True)}
    for place in places.values():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    for file in sorted(parts.glob("*.parquet")):
        table = pq.read_table(file)
        owners = pc.list_element(pc.split_pattern(table[ID], "/", max_splits=1), 0)
        ids = pc.list_element(pc.split_pattern(table[ID], "/", max_splits=1), 1)
        table = table.set_column(table.schema.get_field_index(ID), ID, ids)
        for owner in pc.unique(owners).to_pylist():
            if int(owner) in places:
                pq.write_table(table.filter(pc.equal(owners, owner)), places[int(owner)] / file.name)


def _finish(one: DatasetSpec, plan: dict[str, Any], speed: dict[str, float], work: Path) -> dict[str, Any] | Failed:
    """The data set's manifest, or why it has none: then its batches are done again by the next run."""
    from workflows.synthesis.failures import forget_failed

    try:
        manifest = finish_dataset(one.output, one.settings, plan, speed, ())
    except (UserError, RuntimeError) as error:  # too many of its conversations raised; the others' did not
        forget_failed(work)
        failed = Failed(str(error))
        write_failed(one.output / FAILED, failed)
        return failed
    (one.output / FAILED).unlink(missing_ok=True)
    return manifest
