"""Turns tasks into conversations: the model asks, the teacher answers or scores, and filters decide.

Source: self-study as in arXiv 2506.06266 (the asking side sees chunk and seed prompt, the answering
side only the chunk). Added here: answers known from the text, which the teacher scores without decoding.
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from cartridges.config import SynthesizeSettings
from cartridges.engines.base import Completion, Engine, Request, Score, ScoreRequest, TextPrefix
from cartridges.prompts import example_messages
from cartridges.records import Chunk, Conversation, Dropped, Message, Task
from cartridges.selfstudy import filters
from cartridges.selfstudy.asker import Ask, Asker, EngineAsker
from cartridges.selfstudy.drop_reasons import error_reason
from cartridges.selfstudy.families import FAMILIES, Proposal
from cartridges.selfstudy.general import General
from cartridges.selfstudy.loss_mask import with_loss_mask, without_end_of_turn
from cartridges.template import ChatTemplate


@dataclass(frozen=True)
class _Draft:
    """An unfinished conversation; `turns` ends with the user's message. `chunk` is None for a general one. `earlier`
    are the questions and answers of the previous rounds."""

    task: Task
    chunk: Chunk | None
    proposal: Proposal
    question: str = ""
    earlier: tuple[tuple[str, str], ...] = ()

    @property
    def prefix(self) -> TextPrefix | None:
        """The prefix of the conversation."""
        return TextPrefix(self.chunk.text) if self.chunk else None

    def turns(self) -> list[Message]:
        start = example_messages() if self.proposal.short else []
        rounds = [{"role": role, "content": content} for exchange in self.earlier
                  for role, content in zip(("user", "assistant"), exchange, strict=True)]
        return [*start, *rounds, {"role": "user", "content": self.question}]

    @property
    def last(self) -> bool:
        """Whether no further question follows the answer."""
        return len(self.earlier) >= len(self.proposal.follow_ups)

    def followed(self, answer: str) -> "_Draft":
        """The next round, without its question."""
        return replace(self, question="", earlier=(*self.earlier, (self.question, answer)))


class Synthesizer:
    """Makes conversations with `engine` as the teacher and, unless there is an `asker`, also as the asking side.

    `chunks` maps chunk ids to chunks.
    """

    def __init__(self, engine: Engine, template: ChatTemplate, chunks: Mapping[str, Chunk],
                 settings: SynthesizeSettings, asker: Asker | None = None):
        self.engine, self.asker = engine, asker or EngineAsker(engine, template, settings)
        self.template, self.chunks, self.settings = template, chunks, settings
        self.tokenizer = template.tokenizer
        self.shared = template.conversation_ids(example_messages(), generation_prompt=False)

    def run(self, tasks: Sequence[Task]) -> list[Conversation | Dropped]:
        """One result per task, in order."""
        results: dict[str, Conversation | Dropped] = {}
        drafts = self._ask(self._propose(tasks, results), results)
        known = [draft for draft in drafts if draft.proposal.answer is not None]
        written = [draft for draft in drafts if draft.proposal.answer is None]
        self._score_known(known, results)
        self._write(self._go_on(written, results), results)
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
                drafts.append(_Draft(task, chunk, proposal, proposal.user or "", proposal.earlier))
        return drafts

    def _ask(self, drafts: list[_Draft], results) -> list[_Draft]:
        """Add questions to the drafts that have none, and drop those with unusable questions."""
        silent = [draft for draft in drafts if not draft.question]
        written = self.asker.ask([_ask_for(draft) for draft in silent])
        asked = {draft.task.conversation_id: question for draft, question in zip(silent, written, strict=True)}
        kept = []
        for draft in drafts:
            question = asked.get(draft.task.conversation_id, draft.question)
            if isinstance(question, Exception):
                results[draft.task.conversation_id] = _drop(draft.task, error_reason(question))
                continue
            reason = self._first(chain(self._earlier_faults(draft.proposal), self._question_faults(draft, question)))
            draft = replace(draft, question=question)
            if reason:
                results[draft.task.conversation_id] = _drop(draft.task, reason, draft.turns())
            else:
                kept.append(draft)
        return kept

    def _first(self, reasons: Iterable[str]) -> str | None:
        """The first of `reasons` whose filter is enabled."""
        return next((reason for reason in reasons if reason not in self.settings.filters_off), None)

    def _earlier_faults(self, proposal: Proposal) -> Iterator[str]:
        """The faults of the questions before the last one, which are by rule."""
        for question, answer in proposal.earlier:
            yield from filters.question_faults(question, short=False)
            if filters.gives_answer_away(question, answer):
                yield "answer_in_question"

    def _question_faults(self, draft: _Draft, question: str) -> Iterator[str]:
        proposal = draft.proposal
        if proposal.user is not None and not proposal.user.endswith("?"):
            return
        yield from filters.question_faults(question, short=proposal.completion is not None)
        if question in [asked for asked, _ in draft.earlier]:
            yield "malformed"  # a repeated question
        answer = proposal.answer or proposal.must_contain
        if answer and filters.gives_answer_away(question, answer):
            yield "answer_in_question"

    def _score_known(self, drafts: list[_Draft], results) -> None:
        """Score the answers known from the text, and apply the two filters on likelihoods."""
        rows = [self._known_ids(draft) for draft in drafts]
        taught = self.engine.score([ScoreRequest(ids, mask, draft.prefix, self.settings.topk)
                                    for draft, (ids, mask) in zip(drafts, rows, strict=True)])
        gains = self._gains(drafts, rows, [score.logprobs for score in taught])
        for draft, (ids, mask), score, gain in zip(drafts, rows, taught, gains, strict=True):
            nll = float(-self._said(ids, mask, score.logprobs).mean())
            reason = self._first(self._likelihood_faults(nll, gain))
            results[draft.task.conversation_id] = self._conversation(
                draft, draft.proposal.answer, reason, ids, mask, score.topk_ids, score.topk_logprobs,
                {"teacher_nll": nll, "known": 1.0, **gain})

    def _known_ids(self, draft: _Draft) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        return self._taught(draft, (*self.template.text_ids(draft.proposal.answer), self.tokenizer.eos_token_id))

    def _taught(self, draft: _Draft, answer_ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        return with_loss_mask(self.template, draft.turns(), answer_ids, rounds=1 + len(draft.earlier))

    def _said(self, ids, mask, logprobs: np.ndarray) -> np.ndarray:
        return without_end_of_turn(ids, mask, logprobs, self.tokenizer.eos_token_id)

    def _gains(self, drafts, rows, taught: list[np.ndarray]) -> list[dict[str, float]]:
        """`{"information_gain": nats per token}` for each draft, by one more pass without the chunk; `{}` if the filter
        is disabled or there is no chunk. `taught` holds the answers' logprobs with the chunk."""
        asked = [i for i, draft in enumerate(drafts)
                 if draft.chunk and len(taught[i]) > 1 and self.settings.min_information_gain is not None]
        blind = self.engine.score([ScoreRequest(*rows[i]) for i in asked])
        gains: list[dict[str, float]] = [{} for _ in drafts]
        for i, score in zip(asked, blind, strict=True):
            gains[i]["information_gain"] = filters.information_gain(
                *(self._said(*rows[i], logprobs) for logprobs in (taught[i], score.logprobs)))
        return gains

    def _likelihood_faults(self, nll: float, gain: Mapping[str, float]) -> Iterator[str]:
        if nll > self.settings.max_teacher_nll:
            yield "teacher_disagrees"
        yield from self._gain_faults(gain)

    def _gain_faults(self, gain: Mapping[str, float]) -> Iterator[str]:
        if gain and gain["information_gain"] < self.settings.min_information_gain:
            yield "low_information_gain"

    def _go_on(self, drafts: list[_Draft], results) -> list[_Draft]:
        """The drafts at their last question, after the teacher and the asking side have completed the rounds before."""
        ready: list[_Draft] = []
        while drafts:
            ready += [draft for draft in drafts if draft.last]
            going = [draft for draft in drafts if not draft.last]
            drafts = self._ask(self._followed(going, results), results)
        return ready

    def _followed(self, drafts: list[_Draft], results) -> list[_Draft]:
        kept = []
        for draft, answer in zip(drafts, self._answers(drafts), strict=True):
            reason = self._first(self._answer_faults(draft, answer))
            if reason:
                messages = [*draft.turns(), {"role": "assistant", "content": answer.text}]
                results[draft.task.conversation_id] = _drop(draft.task, reason, messages)
            else:
                kept.append(draft.followed(answer.text.strip()))
        return kept

    def _answers(self, drafts: Sequence[_Draft]) -> list[Completion]:
        """The teacher's greedy answers."""
        return self.engine.generate([
            Request(tuple(self.template.conversation_ids(draft.turns())), draft.prefix,
                    max_tokens=self.settings.max_answer_tokens, topk=self.settings.topk) for draft in drafts])

    def _write(self, drafts: list[_Draft], results) -> None:
        """Let the teacher write the last answers; its top-k rows come from generation."""
        answers = self._answers(drafts)
        rows = [self._taught(draft, answer.output_ids) for draft, answer in zip(drafts, answers, strict=True)]
        taught = self._with_earlier(drafts, rows, answers)
        gains = self._gains(drafts, rows, [score.logprobs for score in taught])
        for draft, (ids, mask), answer, score, gain in zip(drafts, rows, answers, taught, gains, strict=True):
            reason = self._first((*self._answer_faults(draft, answer), *self._gain_faults(gain)))
            results[draft.task.conversation_id] = self._conversation(
                draft, answer.text, reason, ids, mask, score.topk_ids, score.topk_logprobs,
                {"teacher_nll": float(-score.logprobs.mean()), **gain})

    def _with_earlier(self, drafts, rows, answers: list[Completion]) -> list[Score]:
        """The rows from generation. Conversations of several rounds take one more pass, which scores all answers."""
        several = [i for i, draft in enumerate(drafts) if draft.earlier]
        scored = self.engine.score([ScoreRequest(*rows[i], drafts[i].prefix, self.settings.topk) for i in several])
        found = [Score(answer.logprobs, answer.topk_ids, answer.topk_logprobs) for answer in answers]
        for i, score in zip(several, scored, strict=True):
            found[i] = score
        return found

    def _answer_faults(self, draft: _Draft, answer: Completion) -> Iterator[str]:
        if draft.chunk and answer.finish_reason != "stop":
            yield "truncated"  # general answers may be: every token shows the model's behaviour
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
            asked, answered = zip(*draft.earlier, (draft.question, answer), strict=True)
            info |= filters.groundedness("\n".join(answered), draft.chunk.text, "\n".join(asked))
        return Conversation(
            draft.task.conversation_id, draft.task.chunk_id, draft.task.seed_family, messages,
            np.array(ids, np.int32), np.array(mask, bool), topk_ids, topk_logprobs, shared, info)


def _ask_for(draft: _Draft) -> Ask:
    prompt = draft.proposal.seed_prompt
    if draft.earlier:
        asked, answered = draft.earlier[-1]
        prompt = f"{draft.proposal.follow_ups[len(draft.earlier) - 1]}\n\nQuestion: {asked}\nAnswer: {answered}"
    return Ask(draft.task.seed + len(draft.earlier), prompt, draft.proposal.completion,
               draft.chunk.text if draft.chunk else None)


def _drop(task: Task, reason: str, messages: Sequence[Message] = ()) -> Dropped:
    return Dropped(task.conversation_id, task.seed_family, reason, task.chunk_id, tuple(messages))
