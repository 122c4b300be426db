"""Tasks to conversations: the model asks, the teacher answers or scores, filters decide.

Source: self-study as in arXiv 2506.06266 (the asking side sees chunk and seed prompt, the answering
side the chunk only). Ours: answers known from the text, which the teacher scores without decoding.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cartridges.config import SynthesizeSettings
from cartridges.engines.base import Completion, Engine, Request, ScoreRequest, TextPrefix
from cartridges.prompts import example_messages
from cartridges.records import Chunk, Conversation, Message
from cartridges.selfstudy import filters
from cartridges.selfstudy.asking import Ask, Asker, EngineAsker
from cartridges.selfstudy.card import error_reason
from cartridges.selfstudy.families import FAMILIES, Proposal
from cartridges.selfstudy.general import General
from cartridges.selfstudy.plan import Task
from cartridges.template import ChatTemplate


@dataclass(frozen=True)
class Dropped:
    """A planned conversation that was not kept, and why. `messages` are those it had by then."""

    conversation_id: str
    seed_family: str
    reason: str
    chunk_id: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class _Draft:
    """A conversation on its way: `turns` ends with the user's message. `chunk` is None for a general one."""

    task: Task
    chunk: Chunk | None
    proposal: Proposal
    question: str = ""

    @property
    def prefix(self) -> TextPrefix | None:
        """What the model sees before it."""
        return TextPrefix(self.chunk.text) if self.chunk else None

    def turns(self) -> list[Message]:
        start = example_messages() if self.proposal.short else []
        return [*start, {"role": "user", "content": self.question}]


class Synthesizer:
    """Makes the conversations of `tasks` with `engine` on both sides.

    `chunks` by id. `asker`: another asking side (None: `engine`).
    """

    def __init__(self, engine: Engine, template: ChatTemplate, chunks: Mapping[str, Chunk],
                 settings: SynthesizeSettings, asker: Asker | None = None):
        self.engine, self.asker = engine, asker or EngineAsker(engine, template, settings)
        self.template, self.chunks, self.settings = template, chunks, settings
        self.tokenizer = template.tokenizer
        self.shared = template.conversation_ids(example_messages(), generation_prompt=False)

    def run(self, tasks: Sequence[Task]) -> list[Conversation | Dropped]:
        """One result a task, in order."""
        results: dict[str, Conversation | Dropped] = {}
        drafts = self._ask(self._propose(tasks, results), results)
        known = [draft for draft in drafts if draft.proposal.answer is not None]
        written = [draft for draft in drafts if draft.proposal.answer is None]
        self._score_known(known, results)
        self._write(written, results)
        return [results[task.conversation_id] for task in tasks]

    def _propose(self, tasks, results) -> list[_Draft]:
        drafts = []
        for task in tasks:
            chunk = self.chunks[task.chunk_id] if task.chunk_id else None
            family = FAMILIES[task.seed_family] if chunk else General()
            proposal = family.propose(chunk, random.Random(task.seed), task.ordinal)
            if proposal is None:
                results[task.conversation_id] = _drop(task, "nothing_to_ask")
            else:
                drafts.append(_Draft(task, chunk, proposal, proposal.user or ""))
        return drafts

    def _ask(self, drafts: list[_Draft], results) -> list[_Draft]:
        """Questions for the drafts that have none yet; those that come out unusable are dropped."""
        silent = [draft for draft in drafts if not draft.question]
        written = self.asker.ask([_ask_for(draft) for draft in silent])
        asked = {draft.task.conversation_id: question for draft, question in zip(silent, written, strict=True)}
        kept = []
        for draft in drafts:
            question = asked.get(draft.task.conversation_id, draft.question)
            if isinstance(question, Exception):
                results[draft.task.conversation_id] = _drop(draft.task, error_reason(question))
                continue
            reason = self._first(self._question_faults(draft.proposal, question))
            draft = replace(draft, question=question)
            if reason:
                results[draft.task.conversation_id] = _drop(draft.task, reason, draft.turns())
            else:
                kept.append(draft)
        return kept

    def _first(self, reasons: Iterable[str]) -> str | None:
        """The first of `reasons` whose filter is on."""
        return next((reason for reason in reasons if reason not in self.settings.filters_off), None)

    def _question_faults(self, proposal: Proposal, question: str) -> Iterator[str]:
        if proposal.user is not None and not proposal.user.endswith("?"):
            return
        yield from filters.question_faults(question, short=proposal.completion is not None)
        answer = proposal.answer or proposal.must_contain
        if answer and filters.gives_answer_away(question, answer):
            yield "answer_in_question"

    def _score_known(self, drafts: list[_Draft], results) -> None:
        """Top-k rows for answers known from the text, and the two filters that need likelihoods."""
        rows = [self._known_ids(draft) for draft in drafts]
        taught = self.engine.score([ScoreRequest(ids, mask, draft.prefix, self.settings.topk)
                                    for draft, (ids, mask) in zip(drafts, rows, strict=True)])
        gains = self._gains(drafts, rows, [score.logprobs for score in taught])
        for draft, (ids, mask), score, gain in zip(drafts, rows, taught, gains, strict=True):
            # The last row is the end of the turn, which says nothing about the answer.
            nll = float(-score.logprobs[:-1].mean())
            reason = self._first(self._likelihood_faults(nll, gain))
            results[draft.task.conversation_id] = self._conversation(
                draft, draft.proposal.answer, reason, ids, mask, score.topk_ids, score.topk_logprobs,
                {"teacher_nll": nll, "known": 1.0, **gain})

    def _known_ids(self, draft: _Draft) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        prompt = self.template.conversation_ids(draft.turns())
        answer = self.template.text_ids(draft.proposal.answer)
        ids = (*prompt, *answer, self.tokenizer.eos_token_id)
        return ids, _answer_mask(len(prompt), len(ids))

    def _gains(self, drafts, rows, taught: list[np.ndarray]) -> list[dict[str, float]]:
        """`{"information_gain": nats a token}` for each, by one more pass without the chunk; `{}` where
        the filter is off or there is no chunk. `taught`: the answers' logprobs with the chunk."""
        asked = [i for i, draft in enumerate(drafts)
                 if draft.chunk and len(taught[i]) > 1 and self.settings.min_information_gain is not None]
        blind = self.engine.score([ScoreRequest(*rows[i]) for i in asked])
        gains: list[dict[str, float]] = [{} for _ in drafts]
        for i, score in zip(asked, blind, strict=True):
            gains[i]["information_gain"] = filters.information_gain(taught[i][:-1], score.logprobs[:-1])
        return gains

    def _likelihood_faults(self, nll: float, gain: Mapping[str, float]) -> Iterator[str]:
        if nll > self.settings.max_teacher_nll:
            yield "teacher_disagrees"
        yield from self._gain_faults(gain)

    def _gain_faults(self, gain: Mapping[str, float]) -> Iterator[str]:
        if gain and gain["information_gain"] < self.settings.min_information_gain:
            yield "low_information_gain"

    def _write(self, drafts: list[_Draft], results) -> None:
        """The teacher answers greedily; its top-k rows are those of what it wrote."""
        prompts = [tuple(self.template.conversation_ids(draft.turns())) for draft in drafts]
        answers = self.engine.generate([
            Request(prompt, draft.prefix, max_tokens=self.settings.max_answer_tokens, topk=self.settings.topk)
            for draft, prompt in zip(drafts, prompts, strict=True)])
        rows = [((*prompt, *answer.output_ids), _answer_mask(len(prompt), len(prompt) + len(answer.output_ids)))
                for prompt, answer in zip(prompts, answers, strict=True)]
        gains = self._gains(drafts, rows, [answer.logprobs for answer in answers])
        for draft, (ids, mask), answer, gain in zip(drafts, rows, answers, gains, strict=True):
            reason = self._first((*self._answer_faults(draft, answer), *self._gain_faults(gain)))
            results[draft.task.conversation_id] = self._conversation(
                draft, answer.text, reason, ids, mask, answer.topk_ids, answer.topk_logprobs,
                {"teacher_nll": float(-answer.logprobs.mean()), **gain})

    def _answer_faults(self, draft: _Draft, answer: Completion) -> Iterator[str]:
        if draft.chunk and answer.finish_reason != "stop":
            yield "truncated"  # a general one may be: cut off or not, each token says what the model does
        if not answer.text.strip():
            yield "empty"
        if draft.chunk is None:
            return
        span, known = draft.proposal.must_contain, (draft.chunk.text, draft.question)
        if span is not None and not filters.says(answer.text, span):
            yield "round_trip"
        if self.settings.drop_ungrounded and filters.ungrounded_numbers(answer.text, *known):
            yield "ungrounded"
        if self.settings.drop_ungrounded_names and filters.ungrounded_names(answer.text, *known):
            yield "ungrounded_name"

    def _conversation(self, draft, answer, reason, ids, mask, topk_ids, topk_logprobs,
                      info) -> Conversation | Dropped:
        messages = (*draft.turns(), {"role": "assistant", "content": answer})
        if reason:
            return _drop(draft.task, reason, messages)
        shared = len(self.shared) if draft.proposal.short else 0
        if list(ids[:shared]) != self.shared[:shared]:
            raise AssertionError("the example turns are not a prefix of the conversation's tokens")
        if draft.chunk:
            info |= filters.groundedness(answer, draft.chunk.text, draft.question)
        return Conversation(
            draft.task.conversation_id, draft.task.chunk_id, draft.task.seed_family, messages,
            np.array(ids, np.int32), np.array(mask, bool), topk_ids, topk_logprobs, shared, info)


def _answer_mask(prompt: int, total: int) -> tuple[bool, ...]:
    """Position `i` predicts token `i + 1`: from the prompt's last token to the one before the end."""
    return tuple(prompt - 1 <= i < total - 1 for i in range(total))


def _ask_for(draft: _Draft) -> Ask:
    return Ask(draft.task.seed, draft.proposal.seed_prompt, draft.proposal.completion,
               draft.chunk.text if draft.chunk else None)


def _drop(task: Task, reason: str, messages: Sequence[Message] = ()) -> Dropped:
    return Dropped(task.conversation_id, task.seed_family, reason, task.chunk_id, tuple(messages))
