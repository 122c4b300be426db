"""vLLM against the reference engine, in float32, where both must say the same.

One engine of a tiny random model serves most tests; its KV budget is small on purpose.
"""

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cartridges.cartridge import Cartridge
from cartridges.corpus import load_corpus
from cartridges.engine_config import VllmSettings
from cartridges.engines.base import CartridgePrefix, RawPrefix, Request, ScoreRequest, TextPrefix
from cartridges.engines.spool import spool_file
from cartridges.engines.transformers import TransformersEngine
from cartridges.engines.vllm import AsyncVllmEngine, CartridgeLoadError, VllmEngine
from cartridges.engines.vllm_requests import Translator
from cartridges.engines.vllm_setup import engine_arguments, is_installed
from cartridges.errors import UserError
from cartridges.records import Conversation
from cartridges.selfstudy.plan import plan
from cartridges.selfstudy.storage import load_conversations
from cartridges.selfstudy.synthesizer import Synthesizer
from tests.test_selfstudy import CHUNKS, settings
from tests.test_selfstudy_filters import UNUSABLE
from tests.test_synthesize import CORPUS, tiny_settings
from workflows.synthesis.synthesize import synthesize

pytestmark = [pytest.mark.vllm,
              pytest.mark.skipif(not is_installed(), reason="vLLM is not installed (make vllm)")]

BLOCK = 32
ON_GPU = torch.cuda.is_available()
TINY = VllmSettings(dtype="float32", max_model_len=512, kv_cache_bytes=2 << 20, block_size=BLOCK,
                    gpu_memory_utilization=0.2 if ON_GPU else 0)
QUESTIONS = ("Who keeps the lanterns?", "How many?", "Say it again, but slowly and in full.")


def text_of(number: int, sentences: int = 3) -> TextPrefix:
    return TextPrefix(" ".join(f"The harbour master of Velm {number} keeps {number * 7 + i} lanterns."
                               for i in range(sentences)))


def exact_kv(base, prefix: TextPrefix, num_tokens: int | None = None, digest: str = "") -> CartridgePrefix:
    """The untrained KV of the text's system turn (its first `num_tokens`), as a cartridge."""
    ids = base.template.system_ids(prefix.text)[:num_tokens]
    with torch.no_grad():
        cache = base.model(torch.tensor([ids]), use_cache=True).past_key_values
    keys, values = (torch.stack([getattr(layer, name)[0] for layer in cache.layers])
                    for name in ("keys", "values"))
    return CartridgePrefix(Cartridge(keys, values), digest or f"digest-{prefix.text[:40]}-{num_tokens}")


def ask(base, question: str, prefix, **kwargs) -> Request:
    ids = tuple(base.template.conversation_ids([{"role": "user", "content": question}]))
    return Request(ids, prefix, **{"max_tokens": 16} | kwargs)


def scored(request: Request, completion) -> ScoreRequest:
    before, after = len(request.input_ids), len(completion.output_ids)
    mask = (False,) * (before - 1) + (True,) * after + (False,)
    return ScoreRequest(request.input_ids + completion.output_ids, mask, request.prefix, request.topk)


def assert_same(ours, reference):
    assert [c.output_ids for c in ours] == [c.output_ids for c in reference]
    assert [(c.text, c.finish_reason) for c in ours] == [(c.text, c.finish_reason) for c in reference]
    for one, other in zip(ours, reference, strict=True):
        assert_close(one, other)


def assert_close(one, other):
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-3)
    if other.topk_ids is not None:
        assert one.topk_ids.shape == other.topk_ids.shape and one.topk_ids.dtype == other.topk_ids.dtype
        np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=1e-3)


@pytest.fixture(scope="module")
def model_dir(tiny_vllm_dir):
    return tiny_vllm_dir


@pytest.fixture(scope="module")
def base(model_dir):
    from cartridges.config import ModelSettings
    from cartridges.models import load_base_model

    return load_base_model(ModelSettings(name=str(model_dir), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def reference(base):
    return TransformersEngine(base)


@pytest.fixture(scope="module")
def engine(model_dir):
    with pytest.MonkeyPatch.context() as patch:
        # On a GPU too: the tests look at the scheduler and at the worker's connector.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        engine = VllmEngine(model_dir, TINY)
        yield engine
        engine.close()


def scheduler(engine):
    return engine._llm.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture
def loads(monkeypatch):
    """Every load that the worker's connector does while the test runs."""
    from cartridges.engines.vllm_connector import CartridgeConnector

    seen, copy = [], CartridgeConnector._copy

    def counted(self, load, layers):
        seen.append(load)
        return copy(self, load, layers)

    monkeypatch.setattr(CartridgeConnector, "_copy", counted)
    return seen


def test_generate_matches_the_reference(engine, reference, base):
    text = text_of(1)
    prefixes = [None, text, RawPrefix(text.text), exact_kv(base, text),
                exact_kv(base, text, num_tokens=2 * BLOCK), exact_kv(base, text, num_tokens=2)]
    pairs = itertools.product(QUESTIONS, prefixes)
    requests = [ask(base, question, prefix, topk=(0, 20, 5)[number % 3])
                for number, (question, prefix) in enumerate(pairs)]
    assert_same(engine.generate(requests), reference.generate(requests))


def test_exact_kv_equals_the_text(engine, base):
    for number, sentences in ((2, 3), (3, 5), (4, 9)):
        text = text_of(number, sentences)
        cartridge = exact_kv(base, text)
        assert cartridge.cartridge.num_tokens % BLOCK != 0
        as_text = engine.generate([ask(base, question, text) for question in QUESTIONS])
        as_cartridge = engine.generate([ask(base, question, cartridge) for question in QUESTIONS])
        assert_same(as_cartridge, as_text)


def test_stop_strings_and_end_of_turn(engine, reference, base):
    plain = reference.generate([ask(base, QUESTIONS[0], None, max_tokens=24)])[0]
    stop = plain.text[len(plain.text) // 2:][:4]
    requests = [ask(base, QUESTIONS[0], None, max_tokens=24, stop=(stop, "never to be seen"))]
    assert_same(engine.generate(requests), reference.generate(requests))
    assert engine.translator.stop_ids == reference.stop_ids


def test_sampling_is_repeatable_and_its_logprobs_are_of_temperature_one(engine, reference, base):
    requests = [ask(base, QUESTIONS[0], text_of(1), temperature=1.5, seed=seed, topk=3) for seed in (1, 2, 1)]
    first, other, again = engine.generate(requests)
    assert first.output_ids == again.output_ids != other.output_ids
    [score] = reference.score([scored(requests[0], first)])
    np.testing.assert_allclose(first.logprobs, score.logprobs, atol=1e-3)


def test_score_matches_the_reference_also_when_all_is_cached(engine, reference, base):
    text = text_of(5)
    requests = [ask(base, question, prefix, topk=4, max_tokens=40)
                for question in QUESTIONS for prefix in (None, text, exact_kv(base, text))]
    completions = reference.generate(requests)
    scoring = [scored(request, completion) for request, completion in zip(requests, completions, strict=True)]
    scoring.append(ScoreRequest(requests[0].input_ids, (False,) * len(requests[0].input_ids)))
    expected = reference.score(scoring)
    for _ in range(2):  # the second time, the conversations are in the prefix cache
        for one, other in zip(engine.score(scoring), expected, strict=True):
            assert_close(one, other)
    assert_same(engine.generate(requests), completions)


def test_whole_blocks_are_loaded_once_and_a_rest_for_each_request(engine, base, loads):
    engine._llm.reset_prefix_cache()
    whole = exact_kv(base, text_of(6, 5), num_tokens=2 * BLOCK)
    engine.generate([ask(base, question, whole) for question in QUESTIONS])
    assert [(load.start, load.end) for load in loads] == [(0, 2 * BLOCK)]
    loads.clear()
    rest = exact_kv(base, text_of(6, 5), num_tokens=2 * BLOCK + 3)
    engine.generate([ask(base, question, rest) for question in QUESTIONS])
    assert [load.start for load in loads] == [0, 2 * BLOCK, 2 * BLOCK]


def test_eight_cartridges_do_not_mix_under_preemption(engine, reference, base, monkeypatch):
    """32 concurrent requests in a KV cache too small for them: blocks are taken away and given back."""
    preempted, preempt = [], scheduler(engine)._preempt_request
    monkeypatch.setattr(scheduler(engine), "_preempt_request",
                        lambda request, *args, **kwargs: (preempted.append(request.request_id),
                                                          preempt(request, *args, **kwargs))[1])
    cartridges = [exact_kv(base, text_of(number, 6), num_tokens=90 + number) for number in range(8)]
    requests = [ask(base, f"{QUESTIONS[turn % 3]} {turn}", cartridges[(turn * 5) % 8], max_tokens=64)
                for turn in range(32)]
    assert_same(engine.generate(requests), reference.generate(requests))
    assert preempted


@pytest.mark.parametrize("damage", ["missing", "changed", "truncated"])
def test_failed_load_fails_the_request_and_the_next_one_recovers(engine, reference, base, damage):
    request = ask(base, QUESTIONS[0], exact_kv(base, text_of(20), digest=f"damaged-{damage}"))
    path = spool_file(engine.spool.root, engine.spool.put(request.prefix))
    engine._llm.reset_prefix_cache()
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "changed":
        data[-5] ^= 1
    if damage != "missing":
        path.write_bytes(data if damage == "changed" else data[:100])
    with pytest.raises(CartridgeLoadError, match="missing" if damage == "missing" else "damaged"):
        engine.generate([request])
    assert_same(engine.generate([request]), reference.generate([request]))


def test_a_call_that_raised_leaves_nothing_for_the_next(engine, reference, base, monkeypatch):
    step, steps = engine._llm.llm_engine.step, []

    def broken():
        steps.append(step())
        if len(steps) == 3:
            raise OSError("the machine is busy")
        return steps[-1]

    monkeypatch.setattr(engine._llm.llm_engine, "step", broken)
    requests = [ask(base, question, text_of(3)) for question in QUESTIONS]
    with pytest.raises(OSError):
        engine.generate(requests)
    monkeypatch.undo()
    assert_same(engine.generate(requests[:1]), reference.generate(requests[:1]))
    assert not engine._llm.llm_engine.has_unfinished_requests()


def test_a_digest_used_twice_does_not_mix(engine, reference, base):
    """The reference believes the digest; here the bytes decide."""
    ours, expected = ([ask(base, QUESTIONS[0], exact_kv(base, text_of(number), digest=digest))
                       for number, digest in zip((30, 31), digests, strict=True)]
                      for digests in (("same", "same"), ("one", "other")))
    assert_same(engine.generate(ours), reference.generate(expected))


def test_users_mistakes_get_their_line(engine, base):
    cartridge = exact_kv(base, text_of(1))
    foreign = CartridgePrefix(Cartridge(*torch.zeros(2, 3, 2, 8, 32)), "foreign")
    cases = [(ask(base, "?", cartridge, max_tokens=500), "exceed the model's window of 512 tokens"),
             (ask(base, "?", foreign), "serve it with the model it was built for"),
             (ask(base, "?", None, topk=21), "ask for fewer"),
             (Request((), cartridge), "send at least one")]
    for request, message in cases:
        with pytest.raises(UserError, match=message):
            engine.generate([request])


def test_placeholders_are_never_computed_as_text(engine, base):
    from vllm import SamplingParams

    from cartridges.engines.vllm_requests import guarded

    cartridge = exact_kv(base, text_of(1))
    prompt = engine.translator.prompt(cartridge, (5, 6), engine.spool.put(cartridge))
    sent = prompt.extra_args()
    assert guarded(prompt, SamplingParams(extra_args=sent))
    other = {"kv_transfer_params": {"cartridge": "x", "num_tokens": 5}}
    for wrong in ({"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True},
                  {"prompt_logprob_token_ids": [[1]]}, {"extra_args": None}, {"extra_args": other}):
        with pytest.raises(ValueError, match="placeholders"):
            guarded(prompt, SamplingParams(**{"extra_args": sent} | wrong))
    text = engine.translator.prompt(None, (5, 6), None)
    with pytest.raises(ValueError, match="without a cartridge"):
        guarded(text, SamplingParams(extra_args=sent))


def test_tenants_do_not_share_blocks(engine, base):
    cartridge = exact_kv(base, text_of(1))
    content = engine.spool.put(cartridge)
    salts = {engine.translator.prompt(prefix, (5,), content if prefix else None, tenant).salt
             for prefix in (None, cartridge) for tenant in ("", "acme", "globex")}
    assert len(salts) == 6 and None in salts
    assert all(not set(salt) & set("@/\\") and len(salt) <= 128 for salt in salts - {None})


def test_unsuitable_caches_are_refused():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from cartridges.engines.vllm_connector import _refuse_unsuitable

    def refuse(*specs, cache_dtype="auto"):
        config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=cache_dtype),
                                 parallel_config=SimpleNamespace(decode_context_parallel_size=1))
        groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
        return _refuse_unsuitable(config, SimpleNamespace(kv_cache_groups=groups))

    size = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
    full, sliding = FullAttentionSpec(**size), SlidingWindowSpec(**size, sliding_window=64)
    assert refuse(full) == BLOCK
    for specs in ((sliding,), (full, sliding), (FullAttentionSpec(**size, sliding_window=64),)):
        with pytest.raises(ValueError, match="full attention in every layer"):
            refuse(*specs)
    with pytest.raises(ValueError, match="fp8"):
        refuse(full, cache_dtype="fp8")


def test_ranks_take_their_heads():
    from cartridges.engines.vllm_connector import rank_heads

    heads = list(range(8))
    assert [heads[rank_heads(8, 4, rank)] for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [heads[:2][rank_heads(2, 4, rank)] for rank in range(4)] == [[0], [0], [1], [1]]


@pytest.mark.skipif(ON_GPU, reason="a GPU compiles by default")
def test_nothing_is_compiled_on_a_cpu_unless_wanted(model_dir):
    def eager(**chosen):
        arguments = engine_arguments(model_dir, VllmSettings(**chosen), Translator(model_dir).shape, "spool")
        return arguments["enforce_eager"]

    assert eager() is True and eager(enforce_eager=False) is False


@pytest.mark.skipif(ON_GPU, reason="vLLM's attention on a GPU has it")
def test_head_dim_that_the_cpu_build_lacks_is_refused(tiny_model_dir):
    with pytest.raises(UserError, match="head_dim 16"):
        engine_arguments(tiny_model_dir, TINY, Translator(tiny_model_dir).shape, "spool")


def test_one_engine_a_process(engine, model_dir):
    with pytest.raises(RuntimeError, match="close"):
        VllmEngine(model_dir, TINY)


@pytest.mark.slow
@pytest.mark.quality
def test_streaming_on_the_real_model(base_model_dir):
    """Exact-KV control with 20 questions at once, abort, failed load: over `AsyncLLM`."""
    from cartridges.config import ModelSettings
    from cartridges.models import load_base_model

    base = load_base_model(ModelSettings(name=str(base_model_dir), dtype="float32"), device="cpu")
    engine = AsyncVllmEngine(base_model_dir, VllmSettings(dtype="float32", max_model_len=1024,
                                                          kv_cache_bytes=512 << 20))
    try:
        asyncio.run(_stream_checks(engine, base))
    finally:
        engine.close()


async def _stream_checks(engine, base):
    text = text_of(7, 7)
    cartridge = exact_kv(base, text)
    assert cartridge.cartridge.num_tokens % BLOCK != 0
    questions = [f"How many lanterns are kept in place {number}?" for number in range(20)]
    arms = [await asyncio.gather(*(collect(engine, ask(base, question, prefix, topk=2))
                                   for question in questions)) for prefix in (text, cartridge)]
    for as_text, as_cartridge in zip(*arms, strict=True):
        assert [event.token_id for event in as_text] == [event.token_id for event in as_cartridge]
        assert "".join(event.text for event in as_text) == "".join(event.text for event in as_cartridge)
        np.testing.assert_allclose([event.logprob for event in as_text],
                                   [event.logprob for event in as_cartridge], atol=2e-3)
        assert [bool(event.finish_reason) for event in as_text] == [False] * (len(as_text) - 1) + [True]
        assert all(len(event.topk_ids) == 2 for event in as_text)

    endless = engine.stream(ask(base, "Count.", cartridge, max_tokens=600))
    await anext(endless)
    assert engine.num_active == 1
    await endless.aclose()
    assert engine.num_active == 0 and not engine._engine.output_processor.has_unfinished_requests()

    bad = exact_kv(base, text_of(8), digest="bad")
    spool_file(engine.spool.root, engine.spool.put(bad)).write_bytes(b"damaged")
    good, failed = await asyncio.gather(collect(engine, ask(base, questions[0], cartridge)),
                                        collect(engine, ask(base, "?", bad)), return_exceptions=True)
    assert isinstance(failed, CartridgeLoadError)
    assert [event.token_id for event in good] == [event.token_id for event in arms[1][0]]
    assert (await collect(engine, ask(base, "?", bad)))[-1].finish_reason
    engine.forget("bad")


async def collect(engine, request):
    return [event async for event in engine.stream(request)]


def test_synthesis_through_it_makes_the_references_conversations(engine, reference, base):
    wanted = settings(count=24, filters_off=UNUSABLE, asking_temperature=0.0,
                      families={"cloze": 1, "recall": 1, "question": 1, "anchored_asked": 1, "anchored_rounds": 1,
                                "multi_round": 1})
    chunks, tasks = {chunk.chunk_id: chunk for chunk in CHUNKS}, plan(CHUNKS, wanted, 0)
    ours, theirs = (Synthesizer(one, base.template, chunks, wanted).run(tasks) for one in (engine, reference))
    assert sum(isinstance(result, Conversation) for result in ours) > 12
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Conversation):
            assert one.messages == other.messages
            np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=1e-3)


@pytest.mark.slow
def test_ray_data_runs_on_it(model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    plain = tiny_settings(model_dir, num_conversations=16, batch_size=8)
    by = {name: plain.synthesize.model_copy(update={"engine": name}) for name in ("vllm", "transformers")}
    manifests = {name: synthesize(load_corpus(str(corpus)), str(tmp_path / name),
                                  plain.model_copy(update={"synthesize": wanted})) for name, wanted in by.items()}
    # Where a conversation is sampled they differ, so a run that was begun on one does not go on with the other.
    assert manifests["vllm"]["fingerprint"] != manifests["transformers"]["fingerprint"]
    made = {name: load_conversations(str(tmp_path / name)) for name in by}
    assert [one.messages for one in made["vllm"]] == [one.messages for one in made["transformers"]]
    for one, other in zip(made["vllm"], made["transformers"], strict=True):
        np.testing.assert_allclose(one.topk_logprobs, other.topk_logprobs, atol=1e-3)
