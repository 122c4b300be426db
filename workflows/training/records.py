"""Records that the driver sends to the training workers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cartridges.artifact import CorpusRecord
from cartridges.config import BuildSettings
from workflows.runtime.manifests import read_manifest

MANIFEST = "train.json"
OUTCOME = "trained.json"
"""Written by the first worker: what it says of a cartridge when it is trained, or `{"failed": why}`."""


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of one training. All paths are absolute."""

    datasets: tuple[str, ...]
    """Directories of finished conversations."""
    held_out: str | None
    """File of the questions that are kept out; None draws them from the conversations."""
    corpus: str
    corpus_record: CorpusRecord
    synthesize: dict[str, Any]
    """Settings of the synthesis, for the artifact's manifest."""
    distractors: tuple[str, ...] = ()
    """Directories of finished cartridges of other corpora."""
    distractor_digests: tuple[str, ...] = ()
    partners: int = 0
    """How many members of the wave are its distractors while they are trained."""


@dataclass(frozen=True)
class Member:
    """One cartridge to train. `size`, in conversations, orders the waves: members of like size end together."""

    output: Path
    fingerprint: str
    settings: BuildSettings
    size: int
    inputs: TrainingInputs

    @property
    def manifest(self) -> dict[str, Any] | None:
        return read_manifest(self.output / MANIFEST)


@dataclass(frozen=True)
class WorkerMember:
    """A `Member` as a worker sees it. `done`: it has a manifest, and is trained again only for its wave's sake."""

    output: Path
    settings: BuildSettings
    inputs: TrainingInputs
    done: bool

    @property
    def is_settled(self) -> bool:
        """Whether it is trained or has failed, in this run or another."""
        return self.done or (self.output / OUTCOME).is_file()


@dataclass(frozen=True)
class WorkerRun:
    """The work of every worker: `waves` are indices into `members`; `directory` is the run's own."""

    members: tuple[WorkerMember, ...]
    waves: tuple[tuple[int, ...], ...]
    directory: Path
    threads: int
