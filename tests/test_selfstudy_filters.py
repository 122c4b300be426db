"""Filters that are switched, information gain, and conversations about no chunk."""

import numpy as np
import pytest
import torch

from cartridges.config import SynthesizeSettings
from cartridges.engines.base import ScoreRequest, TextPrefix
from cartridges.engines.transformers import TransformersEngine
from cartridges.records import Conversation
from cartridges.selfstudy import general
from cartridges.selfstudy.plan import plan
from cartridges.selfstudy.synthesizer import Synthesizer
from tests.test_selfstudy import CHUNKS, settings

UNUSABLE = ("empty", "malformed", "refers_to_text", "truncated", "ungrounded")
"""What a random model's writing is dropped for."""


@pytest.fixture(scope="module")
def engine(tiny_base_model):
    return TransformersEngine(tiny_base_model, max_rows=8)


def run(engine, wanted: SynthesizeSettings, seed=0):
    chunks = {chunk.chunk_id: chunk for chunk in CHUNKS}
    return Synthesizer(engine, engine.base.template, chunks, wanted).run(plan(CHUNKS, wanted, seed))


def test_a_filter_that_is_off_drops_nothing(engine):
    how = {"count": 6, "families": {"question": 1, "anchored": 1}}
    reasons = {result.reason for result in run(engine, settings(**how)) if not isinstance(result, Conversation)}
    assert reasons and reasons <= set(UNUSABLE)
    kept = run(engine, settings(**how, filters_off=UNUSABLE))
    assert all(isinstance(result, Conversation) for result in kept)


def test_information_gain_is_what_the_chunk_adds_to_an_answer(engine):
    how = {"count": 8, "families": {"anchored": 1, "question": 1}, "filters_off": UNUSABLE}
    kept = run(engine, settings(**how, min_information_gain=-1e9))
    chunks = {chunk.chunk_id: chunk for chunk in CHUNKS}
    assert {one.seed_family for one in kept} == {"anchored", "question"}
    for one in kept:
        given = tuple(one.input_ids.tolist()), tuple(one.loss_mask.tolist())
        taught, blind = engine.score([ScoreRequest(*given, TextPrefix(chunks[one.chunk_id].text)),
                                      ScoreRequest(*given)])
        # All but the end of the turn, which a truncated one does not have.
        words = one.input_ids[1:][one.loss_mask[:-1]] != engine.base.tokenizer.eos_token_id
        expected = taught.logprobs[words].mean() - blind.logprobs[words].mean()
        assert one.info["information_gain"] == pytest.approx(expected, abs=2e-3)
    dropped = run(engine, settings(**how, min_information_gain=1e9))
    assert {result.reason for result in dropped} == {"low_information_gain"}
    off = run(engine, settings(**{**how, "filters_off": (*UNUSABLE, "low_information_gain")}, min_information_gain=1e9))
    assert all(isinstance(result, Conversation) for result in off)


def test_general_conversations_come_on_top_of_fewer_others():
    mixed, alone = settings(count=40, general_share=0.25), settings(count=30)
    tasks = plan(CHUNKS, mixed, seed=1)
    about = [task for task in tasks if task.chunk_id]
    assert about == plan(CHUNKS, alone, seed=1)
    assert [task.seed_family for task in tasks[30:]] == [general.NAME] * 10
    asked = [general.General().propose(None, None, task.ordinal).user for task in tasks[30:]]
    assert len(set(asked)) == 10 and asked != [
        general.General().propose(None, None, task.ordinal).user for task in plan(CHUNKS, mixed, seed=2)[30:]]


def test_the_general_teacher_has_no_chunk(engine):
    results = run(engine, settings(count=8, general_share=0.5, families={"anchored": 1}))
    rows = [one for one in results if isinstance(one, Conversation) and one.seed_family == general.NAME]
    assert rows and {one.chunk_id for one in rows} == {""}
    for one in rows:
        before = engine.base.template.default_ids()
        with torch.no_grad():
            logits = engine.base.model(torch.tensor([[*before, *one.input_ids.tolist()]])).logits[0]
        at = len(before) + np.flatnonzero(one.loss_mask)
        expected = logits[at].log_softmax(-1).topk(5).values
        torch.testing.assert_close(torch.from_numpy(one.topk_logprobs), expected, atol=1e-3, rtol=1e-3)
