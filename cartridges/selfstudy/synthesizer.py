"""Tasks to conversations: the model asks, the teacher answers or scores, filters decide.

Source: self-study as in arXiv 2506.06266 (the asking side sees chunk and seed prompt, the answering
side the chunk only). Ours: answers known from the text, which the teacher scores without decoding.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cartridges.config import SynthesizeSettings
from cartridges.engines.base import Completion, Engine, RawPrefix, Request, Score, ScoreRequest, TextPrefix
from cartridges.prompts import example_messages
from cartridges.records import Chunk, Conversation, Message
from cartridges.selfstudy import filters
from cartridges.selfstudy.families import FAMILIES, Proposal
from cartridges.selfstudy.plan import Task
from cartridges.selfstudy.seed_prompts import ASKING_EXAMPLES
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
    """A conversation on its way: `turns` ends with the user's message."""

    task: Task
    chunk: Chunk
    proposal: Proposal
    question: str = ""

    def turns(self) -> list[Message]:
        start = example_messages() if self.proposal.short else []
        return [*start, {"role": "user", "content": self.question}]


class Synthesizer:
    """Makes the conversations of `tasks` with `engine` on both sides.

    `chunks` by id. `asking`: another engine for the asking side (None: the same).
    """

    def __init__(self, engine: Engine, template: ChatTemplate, chunks: Mapping[str, Chunk],
                 settings: SynthesizeSettings, asking: Engine | None = None):
        self.engine, self.asking = engine, asking or engine
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
            chunk = self.chunks[task.chunk_id]
            proposal = FAMILIES[task.seed_family].propose(chunk, random.Random(task.seed), task.ordinal)
            if proposal is None:
                results[task.conversation_id] = _drop(task, "nothing_to_ask")
            else:
                drafts.append(_Draft(task, chunk, proposal, proposal.user or ""))
        return drafts

    def _ask(self, drafts: list[_Draft], results) -> list[_Draft]:
        """Questions for the drafts that have none yet; those that come out unusable are dropped."""
        silent = [draft for draft in drafts if not draft.question]
        completions = self.asking.generate([self._asking_request(draft) for draft in silent])
        asked = {draft.task.conversation_id: _question(completion)
                 for draft, completion in zip(silent, completions, strict=True)}
        kept = []
        for draft in drafts:
            question = asked.get(draft.task.conversation_id, draft.question)
            reason = self._question_fault(draft.proposal, question)
            draft = replace(draft, question=question)
            if reason:
                results[draft.task.conversation_id] = _drop(draft.task, reason, draft.turns())
            else:
                kept.append(draft)
        return kept

    def _asking_request(self, draft: _Draft) -> Request:
        settings, proposal = self.settings, draft.proposal
        how = dict(max_tokens=settings.max_question_tokens, temperature=settings.asking_temperature,
                   seed=draft.task.seed)
        if proposal.completion is not None:
            ids = self.tokenizer.encode(proposal.completion, add_special_tokens=False)
            return Request(tuple(ids), RawPrefix(ASKING_EXAMPLES), stop=("\n", "?"), **how)
        ids = self.template.conversation_ids([{"role": "user", "content": proposal.seed_prompt}])
        return Request(tuple(ids), TextPrefix(draft.chunk.text), **how)

    def _question_fault(self, proposal: Proposal, question: str) -> str | None:
        if proposal.user is not None and not proposal.user.endswith("?"):
            return None
        fault = filters.malformed_question(question, short=proposal.completion is not None)
        answer = proposal.answer or proposal.must_contain
        if not fault and answer and filters.gives_answer_away(question, answer):
            return "answer_in_question"
        return fault

    def _score_known(self, drafts: list[_Draft], results) -> None:
        """Top-k rows for answers known from the text, and the two filters that need likelihoods."""
        rows = [self._known_ids(draft) for draft in drafts]
        taught = self.engine.score([ScoreRequest(ids, mask, TextPrefix(draft.chunk.text), self.settings.topk)
                                    for draft, (ids, mask) in zip(drafts, rows, strict=True)])
        closed = self._closed_book(rows)
        for draft, (ids, mask), score, blind in zip(drafts, rows, taught, closed, strict=True):
            reason = self._likelihood_fault(score, blind)
            results[draft.task.conversation_id] = self._conversation(
                draft, draft.proposal.answer, reason, ids, mask, score.topk_ids, score.topk_logprobs,
                {"teacher_nll": float(-score.logprobs[:-1].mean()), "known": 1.0})

    def _known_ids(self, draft: _Draft) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        prompt = self.template.conversation_ids(draft.turns())
        answer = self.tokenizer.encode(draft.proposal.answer, add_special_tokens=False)
        ids = (*prompt, *answer, self.tokenizer.eos_token_id)
        return ids, _answer_mask(len(prompt), len(ids))

    def _closed_book(self, rows) -> list[Score | None]:
        if self.settings.min_information_gain is None:
            return [None] * len(rows)
        return list(self.engine.score([ScoreRequest(ids, mask) for ids, mask in rows]))

    def _likelihood_fault(self, score: Score, blind: Score | None) -> str | None:
        # The last row is the end of the turn, which says nothing about the answer.
        if -score.logprobs[:-1].mean() > self.settings.max_teacher_nll:
            return "teacher_disagrees"
        if blind is not None and (filters.information_gain(score.logprobs[:-1], blind.logprobs[:-1])
                                  < self.settings.min_information_gain):
            return "low_information_gain"
        return None

    def _write(self, drafts: list[_Draft], results) -> None:
        """The teacher answers greedily; its top-k rows are those of what it wrote."""
        prompts = [tuple(self.template.conversation_ids(draft.turns())) for draft in drafts]
        completions = self.engine.generate([
            Request(prompt, TextPrefix(draft.chunk.text), max_tokens=self.settings.max_answer_tokens,
                    topk=self.settings.topk) for draft, prompt in zip(drafts, prompts, strict=True)])
        for draft, prompt, answer in zip(drafts, prompts, completions, strict=True):
            reason = self._answer_fault(draft, answer)
            ids = (*prompt, *answer.output_ids)
            results[draft.task.conversation_id] = self._conversation(
                draft, answer.text, reason, ids, _answer_mask(len(prompt), len(ids)), answer.topk_ids,
                answer.topk_logprobs, {"teacher_nll": float(-answer.logprobs.mean())})

    def _answer_fault(self, draft: _Draft, answer: Completion) -> str | None:
        if answer.finish_reason != "stop":
            return "truncated"
        if not answer.text.strip():
            return "empty"
        span = draft.proposal.must_contain
        if span is not None and not filters.says(answer.text, span):
            return "round_trip"
        if self.settings.drop_ungrounded and filters.ungrounded_numbers(
                answer.text, draft.chunk.text, draft.question):
            return "ungrounded"
        return None

    def _conversation(self, draft, answer, reason, ids, mask, topk_ids, topk_logprobs,
                      info) -> Conversation | Dropped:
        messages = (*draft.turns(), {"role": "assistant", "content": answer})
        if reason:
            return _drop(draft.task, reason, messages)
        shared = len(self.shared) if draft.proposal.short else 0
        if list(ids[:shared]) != self.shared[:shared]:
            raise AssertionError("the example turns are not a prefix of the conversation's tokens")
        info |= filters.groundedness(answer, draft.chunk.text, draft.question)
        return Conversation(
            draft.task.conversation_id, draft.chunk.chunk_id, draft.task.seed_family, messages,
            np.array(ids, np.int32), np.array(mask, bool), topk_ids, topk_logprobs, shared, info)


def _answer_mask(prompt: int, total: int) -> tuple[bool, ...]:
    """Position `i` predicts token `i + 1`: from the prompt's last token to the one before the end."""
    return tuple(prompt - 1 <= i < total - 1 for i in range(total))


def _question(completion: Completion) -> str:
    text = completion.text.strip()
    # The stop string "?" is cut from the text; a question that ended with it gets it back.
    closed = completion.finish_reason == "stop"
    return text + "?" if closed and text and text[-1].isalnum() else text


def _drop(task: Task, reason: str, messages: Sequence[Message] = ()) -> Dropped:
    return Dropped(task.conversation_id, task.seed_family, reason, task.chunk_id, tuple(messages))
