"""Derives the number of conversations and, for a budget, of steps, and says on stderr what it derived.

    WORKDIR/budget-<fingerprint>.json   what was decided at the start (of `synthesize` alone: in its output)
    WORKDIR/calibration.json            what measuring for it took, which is the budget's too
    WORKDIR/steps-<fingerprint>.json    steps, decided when the conversations were there

Decided once: a build that goes on keeps its plan.
"""

import sys
import time
from pathlib import Path
from typing import Any

from cartridges.config import BuildSettings
from cartridges.records import Corpus
from workflows.runtime.manifests import fingerprint, read_manifest, write_manifest
from workflows.synthesis.plan_size import with_counts, with_plan

CALIBRATION = "calibration.json"
DRAFT_CONVERSATIONS = 256
"""Planned for a draft whose corpus has no questions: they are made to be asked, not to train on."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def settle(corpus: Corpus, settings: BuildSettings, work: Path, seconds: float | None = None) -> BuildSettings:
    """Derive what was left open, and print the plan. `seconds` are this corpus' share of the budget; None: all of it,
    and then steps are left for `with_steps`, where one training follows one synthesis."""
    from workflows.synthesis.dataset import corpus_tokens

    tokens, p = corpus_tokens(corpus, settings), settings.train.num_tokens
    say(f"corpus {corpus.corpus_id}: {len(corpus.documents)} documents, {tokens} tokens; "
        f"cartridge: {p} tokens, {tokens / p:.1f}x smaller")
    if settings.train.loss == "none":
        return _settle_draft(settings)
    if settings.budget is not None:
        settings = _fit_budget(corpus, settings, work, seconds)
    settings = with_counts(settings, tokens)
    say(f"plan: {_in_words(settings)}")
    return settings


def _settle_draft(settings: BuildSettings) -> BuildSettings:
    say(f"plan: no training; the start ({settings.train.init}) is published as a draft")
    if not settings.synthesize.num_conversations:
        settings = with_plan(settings, DRAFT_CONVERSATIONS)
    if settings.train.held_out:
        say(f"plan: {settings.synthesize.num_conversations} conversations, for questions to ask it")
    return settings


def _fit_budget(corpus: Corpus, settings: BuildSettings, work: Path, seconds: float | None) -> BuildSettings:
    from workflows.building import budget, machine_rates

    wanted = budget.parse_budget(settings.budget)
    if wanted.unit != "seconds":
        return _fit_count(corpus, settings, work, wanted)
    open_steps, shared = _steps_follow(settings, seconds), seconds is not None
    seconds = seconds or wanted.amount
    file = work / f"budget-{_plan_key(corpus.fingerprint, settings, seconds)}.json"
    decided = read_manifest(file)
    if decided is None:
        say("measuring this machine's rates for the budget")
        known = machine_rates.measured(corpus, settings)
        spent = 0.0 if shared else machine_rates.calibration_seconds(settings)
        fitted = budget.fit(settings, known, (seconds - spent) / settings.curriculum.rounds, spent)
        write_manifest(work / CALIBRATION, {"seconds": spent})
        decided = {"num_conversations": fitted.synthesize.num_conversations,
                   "steps": None if open_steps else fitted.train.steps}
        write_manifest(file, decided)
    return with_plan(settings, decided["num_conversations"], decided["steps"])


def _fit_count(corpus: Corpus, settings: BuildSettings, work: Path, wanted: Any) -> BuildSettings:
    """Conversations by a budget that counts them, or their tokens, shared by the rounds; steps by epochs."""
    from workflows.building import budget, machine_rates

    if settings.synthesize.num_conversations:  # of a plan that was made before
        return settings
    file = work / f"budget-{_plan_key(corpus.fingerprint, settings)}.json"
    decided = read_manifest(file)
    if decided is None:
        known = None
        if wanted.unit == "tokens":
            say("measuring how long conversations are and how many are kept, for the budget")
            known = machine_rates.remembered(settings) or machine_rates.measured(corpus, settings)
        count = budget.conversations_for(wanted, known) / settings.curriculum.rounds
        decided = {"num_conversations": max(1, round(count))}
        write_manifest(file, decided)
    return with_plan(settings, decided["num_conversations"])


def settle_synthesis(corpus: Corpus, settings: BuildSettings, output: Path) -> BuildSettings:
    """`settings` with the conversations that the budget is for, synthesis alone; decided once, in `output`."""
    from workflows.building import budget, machine_rates

    wanted = budget.parse_budget(settings.budget)
    budget.require_one_count(settings)
    file = output / f"budget-{_plan_key(corpus.fingerprint, settings)}.json"
    decided = read_manifest(file)
    if decided is None:
        start, known = time.monotonic(), None
        if wanted.unit != "conversations":
            say("measuring this machine's rates for the budget")
            known = machine_rates.calibrate(corpus, settings, training=False)
        count = budget.conversations_for(wanted, known, spent=time.monotonic() - start)
        decided = {"num_conversations": count}
        write_manifest(file, decided)
    say(f"plan: {decided['num_conversations']} conversations for a budget of {settings.budget}")
    return with_plan(settings, decided["num_conversations"])


def _plan_key(made_of: str, settings: BuildSettings, seconds: float | None = None) -> str:
    """Changes with what a plan depends on: how a cartridge is examined or served is no part of that."""
    parts = {"model", "synthesize", "train", "curriculum", "budget", "seed", "vllm"}
    return fingerprint([made_of, settings.model_dump(mode="json", include=parts), seconds])


def _steps_follow(settings: BuildSettings, seconds: float | None = None) -> bool:
    """Whether the steps are decided after synthesis, from the time that it left."""
    from workflows.building.budget import parse_budget

    return (settings.budget is not None and seconds is None and settings.curriculum.rounds == 1
            and not settings.train.steps and parse_budget(settings.budget).unit == "seconds")


def with_steps(corpus: Corpus, settings: BuildSettings, dataset: dict[str, Any], work: Path) -> BuildSettings:
    """`settings` with the steps that fill what the conversations of the manifest `dataset` left of the budget."""
    from workflows.building import budget, machine_rates
    from workflows.runtime.console import human_seconds

    if not _steps_follow(settings):
        return settings
    file = work / f"steps-{_plan_key(dataset['fingerprint'], settings)}.json"
    decided = read_manifest(file)
    if decided is None:
        known = machine_rates.remembered(settings) or machine_rates.measured(corpus, settings)
        spent = (read_manifest(work / CALIBRATION) or {"seconds": 0.0})["seconds"]
        left = budget.parse_budget(settings.budget).amount - dataset["seconds"] - spent
        decided = {"steps": budget.steps_within(settings, known, dataset["conversations"]["kept"], left)}
        decided["epochs"] = decided["steps"] / budget.epoch_steps(settings, known, dataset["conversations"]["kept"])
        write_manifest(file, decided)
    rest = "for the rest" if decided["epochs"] > 1 else "all the same, so that each is seen once"
    say(f"plan: the conversations took {human_seconds(dataset['seconds'])} of {settings.budget}; {decided['steps']} "
        f"steps {rest}")
    return with_plan(settings, settings.synthesize.num_conversations, decided["steps"])


def _in_words(settings: BuildSettings) -> str:
    from workflows.building import budget, machine_rates
    from workflows.runtime.console import human_seconds

    count, known = settings.synthesize.num_conversations, machine_rates.remembered(settings)
    each = f" a round, at most {settings.curriculum.rounds} rounds" if settings.curriculum.rounds > 1 else ""
    if known is None:
        steps = f"{settings.train.steps} steps" if settings.train.steps else f"{settings.train.epochs:g} epochs"
        return f"{count} conversations, {steps}{each}"
    steps, seconds = budget.estimate(settings, known)
    about = "about " if _steps_follow(settings) else ""
    return (f"{count} conversations, {about}{steps} steps{each}; about {human_seconds(seconds)} for both at this "
            "machine's rates")
