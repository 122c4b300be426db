"""Clients that people have, unchanged: curl, an agent framework's OpenAI adapter (OpenAI's own: test_serve_http)."""

import asyncio
import json
import subprocess

import pytest
from pydantic_ai import Agent, ModelSettings
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.serve_support import TEXTS, exact_cartridge, listening, make_service

QUESTION = "Who is the master?"
TOKENS = 12


@pytest.fixture(scope="module")
def url(base, engine, registry):
    with listening(make_service(base, registry, engine)) as url:
        yield url


def curl(*arguments: str) -> str:
    return subprocess.run(["curl", "-sS", "-N", "--fail-with-body", *arguments], capture_output=True, text=True,
                          check=True, timeout=60).stdout


def test_curl(url):
    asked = {"model": "harbour", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS}
    to = [f"{url}/v1/chat/completions", "-H", "content-type: application/json", "-d"]
    whole = json.loads(curl(*to, json.dumps(asked)))["choices"][0]["message"]["content"]
    streamed = curl(*to, json.dumps(asked | {"stream": True})).strip().split("\n\n")
    assert whole and streamed.pop() == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in streamed]
    assert "".join(delta.get("content") or "" for delta in deltas) == whole


@pytest.fixture
def agent(url):
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    return Agent(OpenAIChatModel("harbour", provider=provider), instructions="Answer briefly.",
                 model_settings=ModelSettings(max_tokens=TOKENS, temperature=0))


def test_an_agent_converses(agent, base):
    async def converse():
        first = await agent.run(QUESTION)
        async with agent.run_stream(QUESTION) as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True)]
        return first, "".join(pieces), await agent.run("And the toll?", message_history=first.all_messages())

    first, streamed, second = asyncio.run(converse())
    assert first.output and streamed == first.output
    assert first.usage.output_tokens == TOKENS
    assert first.usage.cache_read_tokens == exact_cartridge(base, TEXTS["harbour"]).num_tokens
    # The second is asked after the first and its answer.
    assert second.usage.input_tokens > first.usage.input_tokens + TOKENS


def test_an_agent_that_wants_tools_is_told(agent):
    @agent.tool_plain
    def ships() -> int:
        """How many ships there are."""
        return 3

    with pytest.raises(ModelHTTPError, match="tools: no function is called here"):
        asyncio.run(agent.run(QUESTION))
