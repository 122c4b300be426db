"""The streaming engine: same answers as the reference, several clients, freed slots, whole characters."""

import asyncio
from contextlib import aclosing

import pytest

from cartridges.engines.answer import Answer
from cartridges.engines.base import CartridgePrefix, RawPrefix, Request, TextPrefix
from cartridges.engines.detokenize import TextStream
from cartridges.engines.prefix_cache import prefix_key
from cartridges.engines.stream import TransformersStreamingEngine
from cartridges.engines.transformers import TransformersEngine
from cartridges.errors import UserError
from tests.serve_support import TEXTS, exact_cartridge, load_stock


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    return load_stock(tiny_model_dir)


@pytest.fixture
def engine(base):
    engine = TransformersStreamingEngine(base, max_active=4)
    yield engine
    engine.close()


def ask(base, question: str, **fields) -> Request:
    ids = base.template.conversation_ids([{"role": "user", "content": question}])
    return Request(tuple(ids), **({"max_tokens": 12} | fields))


async def collect(engine, request):
    async with aclosing(engine.stream(request)) as events:
        return [event async for event in events]


def text_of(events) -> str:
    return "".join(event.text for event in events)


@pytest.mark.parametrize("prefix", [None, TextPrefix(TEXTS["harbour"])])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 7}])
def test_equals_the_batch_engine(base, tiny_base_model, engine, prefix, sampling):
    request = ask(base, "Who is it?", prefix=prefix, topk=3, **sampling)
    events = asyncio.run(collect(engine, request))
    [expected] = TransformersEngine(tiny_base_model).generate([request])
    assert tuple(event.token_id for event in events) == expected.output_ids
    assert [event.logprob for event in events] == pytest.approx(expected.logprobs.tolist(), abs=1e-4)
    assert [event.topk_ids for event in events] == [tuple(row) for row in expected.topk_ids.tolist()]
    assert events[-1].finish_reason == expected.finish_reason
    assert text_of(events) == expected.text.rstrip("\ufffd")


def test_long_prompts_and_answers_too(base, tiny_base_model, engine):
    """Several pieces of prefill, and more room for the KV several times."""
    requests = [ask(base, "Who is it? " * (90 * number), max_tokens=300, ignore_end=True, topk=1) for number in (1, 3)]

    async def together():
        return await asyncio.gather(*[collect(engine, request) for request in requests])

    for events, expected in zip(asyncio.run(together()), TransformersEngine(tiny_base_model).generate(requests),
                                strict=True):
        assert tuple(event.token_id for event in events) == expected.output_ids
        assert [event.logprob for event in events] == pytest.approx(expected.logprobs.tolist(), abs=1e-3)


def test_a_stream_that_fails_leaves_the_others(base, engine, monkeypatch):
    push = TextStream.push

    def broken(self, token_id):
        if self.stop == ("never",):
            raise OSError("no such token")
        return push(self, token_id)

    monkeypatch.setattr(TextStream, "push", broken)

    async def together():
        return await asyncio.gather(collect(engine, ask(base, "One?", stop=("never",))),
                                    collect(engine, ask(base, "Two?", ignore_end=True)), return_exceptions=True)

    failed, fine = asyncio.run(together())
    assert isinstance(failed, OSError) and len(fine) == 12


def test_exact_kv_answers_as_the_text(base, engine):
    for text in TEXTS.values():
        cartridge = CartridgePrefix(exact_cartridge(base, text), digest=text)
        asked = [asyncio.run(collect(engine, ask(base, "What is known?", prefix=prefix)))
                 for prefix in (cartridge, TextPrefix(text))]
        assert [e.token_id for e in asked[0]] == [e.token_id for e in asked[1]]
        assert [e.logprob for e in asked[0]] == pytest.approx([e.logprob for e in asked[1]], abs=1e-4)


def test_a_raw_text_and_a_system_turn_are_different_prefixes(base, tiny_base_model, engine):
    requests = [ask(base, "Who?", prefix=kind(TEXTS["harbour"])) for kind in (TextPrefix, RawPrefix, TextPrefix)]
    for request, expected in zip(requests, TransformersEngine(tiny_base_model).generate(requests), strict=True):
        events = asyncio.run(collect(engine, request))
        assert [event.logprob for event in events] == pytest.approx(expected.logprobs.tolist(), abs=1e-4)
    assert len(engine.prefixes._entries) == 2
    assert prefix_key(RawPrefix("a")) != prefix_key(TextPrefix("a")) == prefix_key(TextPrefix("a", shared=False))


def test_concurrent_streams_do_not_mix(base, engine):
    prefixes = [None, *[CartridgePrefix(exact_cartridge(base, text), digest=text)
                        for text in TEXTS.values()]]
    requests = [ask(base, f"Question {i}?", prefix=prefixes[i % 3]) for i in range(12)]

    async def together():
        return await asyncio.gather(*[collect(engine, request) for request in requests])

    alone = [[e.token_id for e in asyncio.run(collect(engine, request))] for request in requests]
    assert [[e.token_id for e in events] for events in asyncio.run(together())] == alone
    assert len({tuple(ids) for ids in alone}) > 3


def test_closing_a_stream_frees_its_slot(base, engine):
    async def leave_early():
        async with aclosing(engine.stream(ask(base, "Go on.", max_tokens=2000))) as events:
            await anext(events)
            assert engine.num_active == 1
        return engine.num_active

    assert asyncio.run(leave_early()) == 0
    assert asyncio.run(collect(engine, ask(base, "And now?")))


def test_a_long_prompt_does_not_hold_up_the_others(base, engine):
    long = TextPrefix("The ferry leaves at nine. " * 400)

    async def race():
        order = []

        async def run(name, request):
            await collect(engine, request)
            order.append(name)

        await asyncio.gather(run("long", ask(base, "When?", prefix=long, max_tokens=2)),
                             run("short", ask(base, "When?", max_tokens=2)))
        return order

    assert asyncio.run(race()) == ["short", "long"]


def test_too_long_is_refused_and_the_engine_goes_on(base, engine):
    with pytest.raises(UserError, match="window of 4096"):
        asyncio.run(collect(engine, ask(base, "x", max_tokens=5000)))
    assert asyncio.run(collect(engine, ask(base, "Still there?")))


def test_prefixes_are_put_out_by_bytes(base):
    engine = TransformersStreamingEngine(base, prefix_bytes=1)
    for text in TEXTS.values():
        asyncio.run(collect(engine, ask(base, "?", prefix=TextPrefix(text), max_tokens=1)))
    assert len(engine.prefixes._entries) == 1
    engine.close()


def pieces(tokenizer, text: str, stop=()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    made = []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        made.append(stream.push(token_id))
        if stream.stopped:
            return made
    return [*made, stream.finish()]


def test_pieces_are_whole_characters(base):
    text = "naïve 🦜 日本語 Ωμέγα — done 👩‍👩‍👧"
    made = pieces(base.tokenizer, text)
    assert "".join(made) == text
    assert not any("\ufffd" in piece for piece in made)
    assert len([piece for piece in made if piece]) > 5


@pytest.mark.parametrize("stop", ["toll is", "crowns", "1 c", "The harbour"])
def test_a_stop_string_never_leaks(base, stop):
    text = TEXTS["harbour"]
    made = pieces(base.tokenizer, text, (stop,))
    assert "".join(made) == text[: text.index(stop)]


def test_what_only_began_a_stop_string_is_given_at_the_end(base):
    text = "It ends with cro"
    assert "".join(pieces(base.tokenizer, text, ("crowns",))) == text


def test_an_unfinished_character_is_dropped(base):
    tokenizer = base.tokenizer
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("ok 🦜", add_special_tokens=False)[:-1]
    assert "".join([*[stream.push(i) for i in ids], stream.finish()]).rstrip() == "ok"


class CountingTokenizer:
    decoded = 0

    def decode(self, ids, **_):
        self.decoded += len(ids)
        return "".join(chr(97 + token % 26) for token in ids)


def test_looking_for_a_stop_string_decodes_each_token_a_few_times_only():
    tokenizer = CountingTokenizer()
    answer = Answer(Request((1,), max_tokens=500, stop=("never",)), tokenizer, frozenset())
    for token in range(500):
        answer.take(token)
    assert answer.finish_reason == "length" and tokenizer.decoded < 5 * 500
