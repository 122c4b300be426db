"""`cartridges serve` with vLLM underneath: it answers over HTTP what the reference engine answers."""

import asyncio
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from cartridges.engines.base import CartridgePrefix, Request, TextPrefix
from cartridges.engines.spool import OWNER
from cartridges.engines.transformers import TransformersEngine
from cartridges.engines.vllm_setup import is_installed
from tests.serve_support import (
    PATIENCE,
    TEXTS,
    exact_cartridge,
    load_stock,
    make_registry,
    metric,
    serve_process,
    url_of,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow,
              pytest.mark.skipif(not is_installed(), reason="vLLM is not installed (make vllm)")]

QUESTIONS = ("What is known?", "Who?", "How many are there?", "Say it in full.")


@pytest.fixture(scope="module")
def base(tiny_vllm_dir):
    return load_stock(tiny_vllm_dir)


@pytest.fixture(scope="module")
def registry(base, tmp_path_factory):
    return make_registry(base, tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("scratch"), keep_text=True)


@pytest.fixture(scope="module")
def process(registry, tiny_vllm_dir, tmp_path_factory):
    with serve_process(registry.root, tiny_vllm_dir, tmp_path_factory.mktemp("serve") / "stderr", "--engine", "vllm",
                       "--set", "model.dtype=float32", "--set", f"vllm.kv_cache_bytes={2 << 20}",
                       "--set", "vllm.max_num_seqs=8", "--set", "serve.fallback_tokens=2") as process:
        yield process


@pytest.fixture(scope="module")
def url(process):
    return url_of(process)


@pytest.fixture(scope="module")
def expected(base):
    """What the reference answers, by cartridge and question, greedily."""
    engine, asked = TransformersEngine(base), {}
    for name, text in TEXTS.items():
        prefix = CartridgePrefix(exact_cartridge(base, text), name)
        for question in QUESTIONS:
            ids = base.template.conversation_ids([{"role": "user", "content": question}])
            asked[name, question] = Request(tuple(ids), prefix, max_tokens=12)
    return dict(zip(asked, (made.text for made in engine.generate(list(asked.values()))), strict=True))


def ask(url: str, name: str, question: str, **extra) -> openai.types.chat.ChatCompletion:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        return client.chat.completions.create(model=name, max_tokens=12, extra_body=extra,
                                              messages=[{"role": "user", "content": question}])


def test_many_clients_get_the_references_answers_from_their_cartridge(url, expected):
    async def together():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
            return await asyncio.gather(*[client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": question}], max_tokens=12)
                for name, question in 4 * list(expected)])

    answers = [answer.choices[0].message.content for answer in asyncio.run(together())]
    assert answers == 4 * [text.strip("\ufffd") for text in expected.values()]
    assert metric(url, 'cartridges_loads_total{model="harbour",result="ok"}') == 1


def test_full_context_and_the_exact_cartridge_agree(url, expected):
    for (name, question), text in expected.items():
        answer = ask(url, name, question, full_context=True)
        assert answer.choices[0].message.content == text.strip("\ufffd")
        assert answer.context["kind"] == "full_context"


def test_an_unsure_answer_comes_from_passages(url, base):
    answer = ask(url, "harbour", "Who is the harbour master?", fallback="retrieval", fallback_entropy=0.0)
    assert (answer.context["kind"], answer.context["fallback"]) == ("retrieval", True)
    ids = base.template.conversation_ids([{"role": "user", "content": "Who is the harbour master?"}])
    (made,) = TransformersEngine(base).generate([Request(tuple(ids), TextPrefix(TEXTS["harbour"]), max_tokens=12)])
    assert answer.choices[0].message.content == made.text.strip("\ufffd")


def test_what_only_the_service_may_set_is_refused(url):
    body = {"model": "harbour", "messages": [{"role": "user", "content": "x"}], "cache_salt": "y",
            "kv_transfer_params": {"cartridge": "z"}}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 400


def test_a_client_that_leaves_frees_the_engine(url):
    body = {"model": "orchard", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": 900, "stream": True}
    generated = 'cartridges_generation_tokens_total{model="orchard"}'
    before = metric(url, generated)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
        next(response.iter_lines())
    left = time.monotonic()
    while metric(url, "cartridges_engine_active") or metric(url, generated) == before:
        assert time.monotonic() < left + 20
    assert 0 < metric(url, generated) - before < 900


def test_a_dead_engine_process_is_replaced(process, url, expected):
    (name, question), text = next(iter(expected.items()))
    replica, engine = engine_processes(process)
    engine.kill()
    killed, codes = time.monotonic(), set()
    while True:
        assert time.monotonic() < killed + PATIENCE
        try:
            answer = ask(url, name, question)
        except openai.APIStatusError as error:
            assert error.status_code == 503 and error.response.headers["retry-after"], error
            codes.add(error.body["code"])
            time.sleep(0.5)
        else:
            break
    print(f"answered again {time.monotonic() - killed:.1f} s after the kill, meanwhile {codes}")  # pytest -s shows it
    assert answer.choices[0].message.content == text.strip("\ufffd")
    assert "replica_lost" in codes
    assert engine_processes(process)[0] != replica


def engine_processes(process) -> tuple[psutil.Process, psutil.Process]:
    """The replica that holds the engine, and vLLM's own process below it."""
    (replica,) = [child for child in psutil.Process(process.pid).children(recursive=True)
                  if any("ServeReplica" in part and "engine" in part for part in child.cmdline())]
    (engine,) = [child for child in replica.children() if any("EngineCore" in part or "spawn_main" in part
                                                              for part in child.cmdline())]
    return replica, engine


def test_stopping_leaves_no_process_and_no_file(process, url):
    family = psutil.Process(process.pid).children(recursive=True)
    (owner,) = [Path(file.path) for file in engine_processes(process)[0].open_files() if file.path.endswith(OWNER)]
    assert owner.is_file()
    process.terminate()
    assert process.wait(PATIENCE) == 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    assert not owner.parent.exists(), "cartridges were left in the spool"
