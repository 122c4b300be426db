"""One training: its inputs, its checks and its fingerprint. `workflows.training.cohort` runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cartridges.artifact import CorpusRecord
from cartridges.artifact import read_manifest as read_artifact_manifest
from cartridges.config import BuildSettings
from cartridges.errors import UserError
from cartridges.records import Corpus
from workflows.runtime.manifests import fingerprint, read_manifest
from workflows.runtime.progress import ProgressCallback
from workflows.synthesis.dataset import MANIFEST as DATASET_MANIFEST
from workflows.synthesis.dataset import corpus_tokens, fingerprints
from workflows.training.cohort import check_window, train_cohort
from workflows.training.records import MANIFEST, Member, TrainingInputs


def train(dataset_dir: str, corpus_path: str, corpus: Corpus, output_dir: str, settings: BuildSettings,
          progress: ProgressCallback | None = None, job: str | None = None,
          earlier: Sequence[str] = (), held_out: str | None = None) -> dict[str, Any]:
    """A cartridge from the conversations in `dataset_dir`, in `output_dir/cartridge`; returns the manifest.

    The workers read `corpus` from `corpus_path`. `job` groups the W&B runs of one build. The conversations of the
    data sets `earlier` are trained on as well; the questions of the file `held_out`, where one is given, are kept
    out in place of drawn ones.

    Raises `UserError` where the data set is unfinished or of another corpus, or where `output_dir`
    holds another training.
    """
    member = member_of(dataset_dir, corpus_path, corpus, output_dir, settings, earlier, held_out)
    return train_cohort([member], member.output, member.inputs.corpus_record.id, progress, job)[0]


def member_of(dataset_dir: str, corpus_path: str, corpus: Corpus, output_dir: str, settings: BuildSettings,
              earlier: Sequence[str] = (), held_out: str | None = None) -> Member:
    """The training as a member of a cohort, checked. Raises `UserError`."""
    made_of = _dataset_manifest(Path(dataset_dir), corpus)
    expected = train_fingerprint(made_of["fingerprint"], settings, earlier, held_out)
    if read_manifest(Path(output_dir) / MANIFEST) is None:
        check_training(corpus, settings)
    inputs = TrainingInputs(
        datasets=tuple(str(Path(one).resolve()) for one in (dataset_dir, *earlier)),
        held_out=held_out and str(Path(held_out).resolve()), corpus=str(Path(corpus_path).resolve()),
        corpus_record=CorpusRecord(**made_of["corpus"]), synthesize=made_of["settings"],
        distractors=tuple(str(Path(one).resolve()) for one in settings.train.distractors),
        distractor_digests=tuple(digests(settings.train.distractors)))
    return Member(Path(output_dir), expected, settings, made_of["conversations"]["kept"], inputs)


def _dataset_manifest(dataset: Path, corpus: Corpus) -> dict[str, Any]:
    manifest = read_manifest(dataset / DATASET_MANIFEST)
    if manifest is None:
        raise UserError(f"{dataset} holds no finished conversations; run `cartridges synthesize` first")
    if manifest["corpus"]["fingerprint"] != corpus.fingerprint:
        raise UserError(f"the conversations in {dataset} are of another corpus; give the one they are of")
    if manifest["conversations"]["kept"] == 0:
        raise UserError(f"no conversation in {dataset} was kept; dataset.json there counts the reasons. "
                        "Raise synthesize.num_conversations or choose other synthesize.families")
    return manifest


def train_fingerprint(dataset_fingerprint: str, settings: BuildSettings, earlier: Sequence[str] = (),
                      held_out: str | None = None) -> str:
    """Changes with whatever changes the cartridge, and with nothing else."""
    how = {"num_workers", "threads_per_worker", "zero_stage", "checkpoint_every", "keep_checkpoints", "distractors",
           "gradient_checkpointing"}
    start = settings.train.init_cartridge
    follows = {"earlier": fingerprints(earlier), "held_out": read_manifest(Path(held_out))} if held_out else {}
    return fingerprint({
        **follows, "dataset": dataset_fingerprint, "seed": settings.seed, "dtype": settings.model.dtype,
        "train": settings.train.model_dump(mode="json", exclude=how | _without_effect(settings)),
        **({"distractors": digests(settings.train.distractors)} if settings.train.distractors else {}),
        # Packed whole (`distill.packing.unshared`), so the packs are others.
        **({"unshared": True} if settings.train.zero_stage == 3 else {}),
        "init_cartridge": read_artifact_manifest(start).digest if start else None,
    })


def _without_effect(settings: BuildSettings) -> set[str]:
    """Settings that change nothing because what they are of is not used."""
    return ({"distractor_share", "max_distractors"} if not settings.train.distractors else set()) | (
        {"stretch_tokens"} if settings.train.init != "attention_matching" else set())


def digests(directories: Sequence[str]) -> list[str]:
    """Digests of the cartridges in `directories`; they do not depend on where these lie."""
    return [read_artifact_manifest(directory).digest for directory in directories]


def check_training(corpus: Corpus, settings: BuildSettings) -> None:
    """A user's mistakes, found before Ray starts."""
    from cartridges.artifact import check_compatible
    from cartridges.models import load_identity, resolve_model_dir

    wanted = settings.train
    if wanted.packs_per_step % wanted.num_workers:
        raise UserError(f"train.packs_per_step={wanted.packs_per_step} is not a multiple of "
                        f"train.num_workers={wanted.num_workers}; workers share a step's packs evenly")
    if wanted.evaluate_every and not wanted.held_out and settings.curriculum.rounds == 1:
        raise UserError("train.evaluate_every asks held-out questions during training; set train.held_out, to 64 "
                        "for example")
    if wanted.zero_stage in (1, 2) and wanted.optimizer.name != "adam":
        raise UserError(f"train.zero_stage={wanted.zero_stage} cuts the optimiser's state up, and "
                        f"{wanted.optimizer.name} needs it whole; use 0 or 3, or train.optimizer.name=adam")
    if wanted.loss == "none" and (settings.budget or settings.curriculum.rounds > 1):
        raise UserError("--loss none publishes the start, untrained: leave --budget and --curriculum out")
    _check_distractors(corpus, settings)
    if wanted.init == "cartridge":
        if wanted.init_cartridge is None:
            raise UserError("train.init=cartridge needs train.init_cartridge, the directory of a cartridge")
        given = read_artifact_manifest(wanted.init_cartridge)
        check_compatible(given, load_identity(resolve_model_dir(settings.model)))
        if given.num_tokens != wanted.num_tokens:
            raise UserError(f"train.num_tokens={wanted.num_tokens}, but {wanted.init_cartridge} has "
                            f"{given.num_tokens}; set it to that")
    elif corpus_tokens(corpus, settings) < wanted.num_tokens:
        raise UserError(f"the corpus is shorter than num_tokens={wanted.num_tokens}; choose a smaller "
                        "--num-tokens (a tenth of the corpus is a good start)")


def _check_distractors(corpus: Corpus, settings: BuildSettings) -> None:
    from cartridges.artifact import check_compatible
    from cartridges.models import load_identity, resolve_model_dir

    wanted = settings.train
    if not wanted.distractors:
        return
    identity = load_identity(resolve_model_dir(settings.model))
    given = [read_artifact_manifest(directory) for directory in wanted.distractors]
    for directory, manifest in zip(wanted.distractors, given, strict=True):
        check_compatible(manifest, identity)
        if manifest.corpus.fingerprint == corpus.fingerprint:
            raise UserError(f"train.distractors: {directory} is of this very corpus; name cartridges of others")
    if len({manifest.digest for manifest in given}) < len(given):
        raise UserError("train.distractors names the same cartridge twice")
    check_window((wanted.num_tokens, wanted.num_frozen_tokens),
                 [(manifest.num_tokens, manifest.num_frozen_tokens) for manifest in given], wanted,
                 identity.max_position_embeddings)
