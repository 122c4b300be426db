"""Self-study for many corpora in one run of Ray Data: each engine is opened once, whatever the number of corpora.

    DIR/together.json                 which data sets are made here, in order; DIR is WORK/together-<fingerprint>
    DIR/chunks.parquet                the chunks of all
    DIR/work/{tasks,parts,checkpoint} as for one; an id is `<number of the data set>/<conversation id>`

What is finished goes to each data set's own directory, as `workflows.synthesize` would leave it, and DIR with it.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus
from cartridges.errors import UserError
from workflows.stage import fingerprint, read_manifest, require_match, write_manifest
from workflows.synthesize import (
    MANIFEST,
    ProgressCallback,
    dataset_fingerprint,
    finish_dataset,
    generate,
    metrics,
    plan_dataset,
)

TOGETHER, FAILED, ID = "together.json", "failed.json", "conversation_id"


@dataclass(frozen=True)
class Wanted:
    """One data set, its number of conversations decided. All have one model and one way to synthesize."""

    corpus: str
    output: Path
    settings: BuildSettings


def synthesize_many(wanted: Sequence[Wanted], work: Path, label: str, progress: ProgressCallback | None = None,
                    job: str | None = None) -> list[dict[str, Any]]:
    """The manifests of all, in order; of one that could not be made `{"failed": why}`. Resumes; done is done. The data
    sets are below `work`.

    Raises as `workflows.synthesize.synthesize` does where it concerns all of them.
    """
    expected = [_expected(one) for one in wanted]
    for one, own in zip(wanted, expected, strict=True):
        require_match(read_manifest(one.output / MANIFEST), own, one.output)
    todo = [index for index, one in enumerate(wanted) if read_manifest(one.output / MANIFEST) is None]
    if todo:
        _make([wanted[index] for index in todo], [expected[index] for index in todo], work, label, progress, job)
    return [read_manifest(one.output / MANIFEST) or read_manifest(one.output / FAILED) for one in wanted]


def _expected(one: Wanted) -> str:
    return dataset_fingerprint(load_corpus(one.corpus, one.settings.corpus.corpus_id), one.settings)


def _make(todo: Sequence[Wanted], expected: Sequence[str], work: Path, label: str,
          progress: ProgressCallback | None, job: str | None) -> None:
    from workflows.generation import check_generation
    from workflows.tracking import track

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
        kept = [manifest for manifest in made if "failed" not in manifest]
        if kept:
            run.log(metrics(kept))
    if len(kept) == len(todo):
        shutil.rmtree(directory)


def _plan(one: Wanted, expected: str) -> dict[str, Any]:
    loaded = load_corpus(one.corpus, one.settings.corpus.corpus_id)
    one.output.mkdir(parents=True, exist_ok=True)
    return plan_dataset(loaded, one.output, one.settings, expected)


def _begun(places: Sequence[str], work: Path) -> Path | None:
    """The directory of a run that makes just these, or these and others that are finished."""
    for file in sorted(work.glob(f"together-*/{TOGETHER}")):
        made_there = set(read_manifest(file)["datasets"])
        if made_there >= set(places) and all((work / other / MANIFEST).is_file() for other in made_there - set(places)):
            return file.parent
    return None


def _join(todo: Sequence[Wanted], places: Sequence[str], plans: Sequence[dict[str, Any]],
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
        # What has to be written comes last, in full batches: the few of one corpus would decode almost alone.
        for later, part in tasks.items():
            part.append(own.filter(pc.equal(written, later)))
        chunks.append(pq.read_table(one.output / "chunks.parquet"))
    pq.write_table(pa.concat_tables(tasks[False] + tasks[True]), directory / "work" / "tasks.parquet")
    pq.write_table(pa.concat_tables(chunks), directory / "chunks.parquet")
    joined = {"datasets": list(places), "conversations": sum(plan["conversations"] for plan in plans)}
    write_manifest(directory / TOGETHER, joined)
    return joined


def _require_few_errors(work: Path, settings: BuildSettings, planned: int) -> None:
    from workflows.failures import count_failed, require_few

    require_few(count_failed(work / "parts"), planned, settings.synthesize.max_failed_share, work)


def _split(todo: Sequence[Wanted], numbers: Sequence[int], parts: Path) -> None:
    """To each data set the rows that are its own, under the ids that they have there."""
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


def _finish(one: Wanted, plan: dict[str, Any], speed: dict[str, float], work: Path) -> dict[str, Any]:
    """The data set's manifest, or why it has none: then its batches are done again by the next run."""
    from workflows.failures import forget_failed

    try:
        manifest = finish_dataset(one.output, one.settings, plan, speed, ())
    except (UserError, RuntimeError) as error:  # too many of its conversations raised; the others' did not
        forget_failed(work)
        failed = {"failed": str(error)}
        write_manifest(one.output / FAILED, failed)
        return failed
    (one.output / FAILED).unlink(missing_ok=True)
    return manifest
