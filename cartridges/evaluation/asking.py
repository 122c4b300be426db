"""Asks the questions of one arm: from questions to engine requests to metric values, the same in every arm."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cartridges.engines.base import Completion, Engine, Prefix, Request, Score, ScoreRequest
from cartridges.evaluation import metrics
from cartridges.prompts import plain_messages, question_messages
from cartridges.records import Question
from cartridges.template import ChatTemplate

Progress = Callable[[int, int, str], None]
"""Called with `(done, total, label)`: finished requests, all requests, and the arm."""

NUM_WRONG_OPTIONS = 3
BLOCK_REQUESTS = 128
"""Requests per engine call: enough for full batches, few enough to report progress."""


@dataclass(frozen=True)
class Item:
    """A question with its token ids. `candidate_ids[gold]` are the gold answer's tokens.

    `generation_ids` (the plain question, for free generation) and `input_ids` (the question after short-answer
    examples, for likelihoods) end where the assistant begins. With one candidate there is no choice to score.
    """

    question: Question
    generation_ids: tuple[int, ...]
    input_ids: tuple[int, ...]
    candidates: tuple[str, ...]
    candidate_ids: tuple[tuple[int, ...], ...]
    gold: int

    @property
    def is_generated(self) -> bool:
        """Whether an answer is generated. Multiple-choice questions are scored by likelihood only, because their
        gold texts are too long to match."""
        return not self.question.options


@dataclass(frozen=True)
class Answered:
    """The result of one question in one arm: `values` by metric, and chrF statistics of a generated answer."""

    item: Item
    values: dict[str, float]
    output: str | None = None
    finish_reason: str | None = None
    chrf_statistics: np.ndarray | None = field(default=None, repr=False)


def plan_items(questions: Sequence[Question], template: ChatTemplate, seed: int,
               max_questions: int = 0) -> list[Item]:
    """The items to ask: all, or `max_questions` of them drawn by `seed`, in their order.

    A question without options gets the answers of three other questions as wrong options. These are drawn from
    all `questions` by seed and question id, so they do not depend on the selection.
    """
    chosen = range(len(questions))
    if 0 < max_questions < len(questions):
        drawn = np.random.default_rng(seed).choice(len(questions), max_questions, replace=False)
        chosen = sorted(drawn.tolist())
    return [_item(questions[index], questions, template, seed) for index in chosen]


def ask(engine: Engine, items: Sequence[Item], prefix: Prefix, max_answer_tokens: int,
        report: Callable[[int], None]) -> list[Answered]:
    """Generate (greedily) and score all `items` after `prefix`. Calls `report` with numbers of finished requests."""
    generated = [item for item in items if item.is_generated]
    requests = [Request(item.generation_ids, prefix, max_tokens=max_answer_tokens) for item in generated]
    completions = _in_blocks(engine.generate, requests, report)
    scores = iter(_in_blocks(engine.score, score_requests(items, prefix), report))
    outputs = {item.question.question_id: completion
               for item, completion in zip(generated, completions, strict=True)}
    return [_answered(item, outputs.get(item.question.question_id),
                      [next(scores) for _ in item.candidates]) for item in items]


def num_requests(items: Sequence[Item]) -> int:
    """Number of engine requests by `ask` for one arm."""
    return sum(item.is_generated + len(item.candidates) for item in items)


def score_requests(items: Sequence[Item], prefix: Prefix) -> list[ScoreRequest]:
    """One request per candidate. It scores only the answer's own tokens, not the end of the turn.

    The answer is encoded separately from the prompt, as generation would continue it.
    """
    return [ScoreRequest(item.input_ids + ids, _answer_mask(len(item.input_ids), len(ids)), prefix)
            for item in items for ids in item.candidate_ids]


def _answer_mask(prompt: int, answer: int) -> tuple[bool, ...]:
    return (False,) * (prompt - 1) + (True,) * answer + (False,)


def _item(question: Question, questions: Sequence[Question], template: ChatTemplate, seed: int) -> Item:
    candidates, gold = question.options, question.gold
    if not candidates:
        candidates, gold = (question.answers[0], *wrong_options(question, questions, seed)), 0
    ids = tuple(tuple(template.tokenizer.encode(text.strip(), add_special_tokens=False))
                for text in candidates)
    plain = tuple(template.conversation_ids(plain_messages(question.question)))
    prompt = tuple(template.conversation_ids(question_messages(question.question)))
    return Item(question, plain, prompt, tuple(candidates), ids, gold)


def wrong_options(question: Question, questions: Sequence[Question], seed: int) -> tuple[str, ...]:
    """Three answers of other questions that are not accepted for this one; empty if there are fewer.

    None of them is a prefix of another or of the gold answer, because a prefix (`1` of `17`) is never less likely.
    """
    digest = hashlib.sha256(f"{seed}:{question.question_id}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8])).permutation(len(questions))
    taken = [metrics.normalize_squad(answer) for answer in question.answers]
    chosen: list[str] = []
    for index in order:
        other = questions[index]
        folded = metrics.normalize_squad(other.answers[0])
        if other is question or not folded or any(_nested(folded, one) for one in taken):
            continue
        taken.append(folded)
        chosen.append(other.answers[0])
        if len(chosen) == NUM_WRONG_OPTIONS:
            return tuple(chosen)
    return ()


def _nested(left: str, right: str) -> bool:
    return left.startswith(right) or right.startswith(left)


def _in_blocks(call, requests: list, report: Callable[[int], None]) -> list:
    # Requests of similar length share a block, so that the engine sees few shapes.
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].input_ids))
    results: list = [None] * len(requests)
    for start in range(0, len(order), BLOCK_REQUESTS):
        block = order[start:start + BLOCK_REQUESTS]
        for index, result in zip(block, call([requests[index] for index in block]), strict=True):
            results[index] = result
        report(len(block))
    return results


def _answered(item: Item, completion: Completion | None, scores: list[Score]) -> Answered:
    values = _likelihood_values(item, scores)
    if completion is None:
        return Answered(item, values)
    output, answers = completion.text.strip(), item.question.answers
    statistics = metrics.chrf_statistics(output, answers)
    values |= {"contains": metrics.contains(output, answers),
               "exact_match": metrics.exact_match(output, answers),
               "f1": metrics.f1(output, answers), "chrf": float(metrics.chrf_score(statistics))}
    return Answered(item, values, output, completion.finish_reason, statistics)


def _likelihood_values(item: Item, scores: list[Score]) -> dict[str, float]:
    values = {"nll_per_token": -float(scores[item.gold].logprobs.mean())}
    if len(scores) > 1:
        sums = [float(score.logprobs.sum()) for score in scores]
        means = [float(score.logprobs.mean()) for score in scores]
        values["choice_accuracy"] = float(np.argmax(sums) == item.gold)
        values["choice_accuracy_per_token"] = float(np.argmax(means) == item.gold)
    return values
