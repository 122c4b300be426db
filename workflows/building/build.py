"""The whole chain: corpus -> conversations -> cartridge -> report card -> registry.

    WORKDIR/synthesize-<fingerprint>/   see workflows.synthesis.synthesize
    WORKDIR/train-<fingerprint>/        see workflows.training.train
    WORKDIR/evaluate-<fingerprint>/     rows.jsonl and, last, report_card.json
    WORKDIR/draft-<fingerprint>/        in place of both for a draft of a corpus with questions
    WORKDIR/build.json                  the result of the last finished build

A stage whose finished output is there with the fingerprint of what it would do now is skipped, so
the same command goes on where it stopped, and a changed setting repeats only what depends on it.
"""

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus, load_questions
from cartridges.documents import Reread
from cartridges.errors import UserError
from cartridges.records import Corpus, Question
from cartridges.registry import Registry, check_name
from workflows.building.planning import say, settle, with_steps
from workflows.runtime.manifests import fingerprint, read_manifest, write_manifest
from workflows.training.draft import draft
from workflows.training.held_out_questions import HELD_OUT, read_held_out, reporting

REPORT_CARD = "report_card.json"
HELD_OUT_QUESTIONS = 64
"""Self-study conversations kept from training to be the report card's questions where the user has none."""


@dataclass(frozen=True)
class Job:
    """One cartridge to build: its corpus (a path, and what is there), and the questions asked of it in the end."""

    corpus: str
    loaded: Corpus
    name: str
    settings: BuildSettings
    store: Registry
    work: Path
    asked: tuple[Question, ...]


@dataclass(frozen=True)
class Made:
    """A cartridge that is trained and not yet examined: the manifests of its stages, and the artifact's directory."""

    dataset: dict[str, Any] | None
    """None for a draft, which is made without conversations."""
    training: dict[str, Any]
    cartridge: Path

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return {"synthesize": self.dataset["seconds"] if self.dataset else 0.0, "train": self.training["seconds"]}

    @property
    def conversations(self) -> dict[str, Any]:
        """`{kept, dropped {reason: n}}`."""
        return self.dataset["conversations"] if self.dataset else {"kept": 0, "dropped": {}}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of the kept conversations: `{input, loss}`."""
        return self.dataset["tokens"] if self.dataset else {"input": 0, "loss": 0}

    def record(self) -> dict[str, Any]:
        """`build` of the report card."""
        rounds = {"rounds": self.training["rounds"]} if "rounds" in self.training else {}
        return {"seconds": self.seconds, "conversations": self.conversations, "tokens": self.tokens, **rounds}


def build(corpus: str, name: str, settings: BuildSettings, registry: str, questions: str | None = None,
          workdir: str | None = None) -> dict[str, Any]:
    """Build `name` from `corpus` and publish it: `{report_card, name, version, seconds, workdir}`.

    `questions` is a file of questions; None takes the corpus' own, or else held-out self-study ones.
    Raises `UserError` for whatever is wrong with the corpus, the questions or the settings, before
    anything expensive begins.
    """
    start = time.monotonic()
    loaded = load_corpus(corpus, settings.corpus.corpus_id)
    asked = load_questions(questions, settings.corpus.corpus_id) if questions else loaded.questions
    job = prepare(corpus, loaded, name, settings, Registry(registry), asked, Path(workdir or f"runs/{name}"))
    job = replace(job, settings=settle(loaded, job.settings, job.work))
    result = {"registry": registry, "workdir": str(job.work), **finish(job, make(job)),
              "seconds": time.monotonic() - start}
    write_manifest(job.work / "build.json", result)
    return result


def prepare(corpus: str, loaded: Corpus, name: str, settings: BuildSettings, store: Registry,
            asked: tuple[Question, ...], work: Path) -> Job:
    """The job, checked; without questions it holds some of self-study back. Raises `UserError`."""
    from workflows.building.budget import parse_budget, require_one_count
    from workflows.training.train import check_training

    check_name(name)
    if settings.budget is not None and parse_budget(settings.budget).unit != "seconds":
        require_one_count(settings)
    if not asked:
        train = settings.train.model_copy(update={"held_out": HELD_OUT_QUESTIONS})
        settings = settings.model_copy(update={"train": train})
    check_training(loaded, settings)
    return Job(corpus, loaded, name, settings, store, work, asked)


def finish(job: Job, made: Made) -> dict[str, Any]:
    """Examine the artifact and publish it: `{name, version, report_card}`."""
    card = read_manifest(examine(job, made) / REPORT_CARD)
    return {"name": job.name, "version": _publish(job.store, job.name, made.cartridge, card, _kept_text(job), job.work),
            "report_card": card}


def _kept_text(job: Job) -> str | None:
    """The corpus' text to publish beside the cartridge, or None."""
    if not job.settings.corpus.keep_text:
        return None
    if isinstance(job.loaded.documents, Reread):
        say("the corpus is too long for its text to be kept beside the cartridge (as with corpus.keep_text=false)")
        return None
    return job.loaded.text


def make(job: Job) -> Made:
    """Synthesis and training."""
    if job.asked and job.settings.train.loss == "none":
        return Made(None, *draft(job.loaded, job.settings, job.work))
    return _make_by_rounds(job) if job.settings.curriculum.rounds > 1 else _make_at_once(job)


def _make_at_once(job: Job) -> Made:
    from workflows.building import machine_rates
    from workflows.runtime.local_ray import local_ray
    from workflows.synthesis.dataset import MANIFEST as DATASET
    from workflows.synthesis.synthesize import synthesize
    from workflows.training.train import MANIFEST as TRAINING
    from workflows.training.train import train, train_fingerprint

    of_dataset, dataset_dir = dataset_place(job)
    with ExitStack() as stack:  # one Ray for both stages
        if not (dataset_dir / DATASET).is_file():
            stack.enter_context(local_ray())
        dataset = synthesize(job.loaded, str(dataset_dir), job.settings, job=job.name)
        settings = with_steps(job.loaded, job.settings, dataset, job.work)
        train_dir = job.work / f"train-{train_fingerprint(of_dataset, settings)}"
        if not (train_dir / TRAINING).is_file():
            stack.enter_context(local_ray())
        trained = train(str(dataset_dir), job.corpus, job.loaded, str(train_dir), settings, job=job.name)
    machine_rates.remember(settings, dataset, trained)
    return Made(dataset, trained, train_dir / "cartridge")


def dataset_place(job: Job) -> tuple[str, Path]:
    """Fingerprint and directory of the job's conversations."""
    from workflows.synthesis.dataset import dataset_fingerprint

    expected = dataset_fingerprint(job.loaded, job.settings)
    return expected, job.work / f"synthesize-{expected}"


def _make_by_rounds(job: Job) -> Made:
    from workflows.building import machine_rates
    from workflows.building.curriculum import joined, run_rounds
    from workflows.runtime.local_ray import local_ray

    with local_ray():  # one Ray for all rounds
        rounds = run_rounds(job.corpus, job.loaded, job.name, job.settings, job.work, say)
    machine_rates.remember(job.settings, rounds[0].dataset, rounds[0].trained)
    return Made(*joined(rounds), rounds[-1].train_dir / "cartridge")


def examine(job: Job, made: Made) -> Path:
    """The directory of the report card and its rows; held-out self-study questions where the job has none to ask."""
    from cartridges import artifact
    from workflows.evaluation.report import Examination, report_on
    from workflows.runtime.tracking import track

    settings = job.settings
    source = "user" if job.asked else "held_out_self_study"
    asked = job.asked or _held_out_questions(made.cartridge.parent, settings)
    expected = fingerprint([made.training["fingerprint"], settings.evaluate.model_dump(mode="json"), settings.seed,
                            source,
                            [[one.question_id, one.question, *one.answers, *one.options] for one in asked]])
    output = job.work / f"evaluate-{expected}"
    if read_manifest(output / REPORT_CARD) is not None:
        return output
    start = time.monotonic()
    with track("evaluate", job.name, settings.model_dump(mode="json"), job.work) as run:
        examination = Examination(job.name, artifact.load(made.cartridge), job.loaded, asked, settings.model, settings,
                                  job.store, source)
        report = report_on(examination, made.record())
        report.card["build"]["seconds"]["evaluate"] = time.monotonic() - start
        run.report_card(report.card)
        run.artifact(made.cartridge, job.name, "cartridge")
    report.save(output)
    return output


def _held_out_questions(train_dir: Path, settings: BuildSettings) -> tuple[Question, ...]:
    """The questions that training kept out and did not choose the cartridge by."""
    questions = read_held_out(train_dir / HELD_OUT)
    if settings.train.evaluate_every:
        questions = reporting(questions)
    if not questions:
        raise UserError("there are no questions: the corpus has none, and no self-study question was short "
                        "enough to be held out; give some with --questions")
    return tuple(questions)


def _publish(store, name: str, cartridge: Path, card: dict[str, Any], text: str | None, work: Path) -> str:
    """Publish a copy of the artifact that holds the report card, and the corpus' text where it is kept;
    the version depends on neither."""
    from cartridges.artifact import set_report_card
    from cartridges.corpus_text import keep_text

    copy = work / "publish"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(cartridge, copy)
    set_report_card(copy, card)
    if text is not None:
        keep_text(copy, text)
    version = store.publish(name, copy)
    shutil.rmtree(copy)
    return version
