"""`cartridges chat`: ask a served cartridge over HTTP, or a local one in this process."""

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TextIO

from cartridges.errors import UserError
from workflows.cli.options import REFERENCE, add_command, registry_option

DEFAULT_URL = "http://127.0.0.1:8000"
MAX_TOKENS = 256

Ask = Callable[[list[dict[str, str]]], Iterator[str]]
"""The conversation so far -> the answer, in pieces."""


def add_to(parsers: Any) -> None:
    # The answer is printed as it comes, so nothing is shown at the end.
    command = add_command(parsers, "chat", run, "ask a served or a local cartridge", show=lambda result, args: None)
    command.add_argument("name", metavar="NAME", help=REFERENCE)
    command.add_argument("message", nargs="?", metavar="MESSAGE", help="one question; without it, a dialogue")
    command.add_argument("--url", metavar="URL", help="a running service, such as http://127.0.0.1:8000")
    registry_option(command)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    # With --json stdout holds one JSON object and nothing else.
    return chat(args.name, args.message, args.registry, args.url, out=sys.stderr if args.json else None)


def chat(name: str, message: str | None, registry: str, url: str | None = None,
         model: str | None = None, out: TextIO | None = None) -> dict[str, Any] | None:
    """Ask the cartridge `name`; the answer is printed on `out` (None: stdout) as it comes, and returned.

    `url` is the service to ask. Without one, a service on this machine's port 8000 is asked if it
    offers the name; else the cartridge is loaded from `registry` with its own base model (or
    `model`). Without `message`, reads questions from stdin until it ends, and returns None.
    """
    ask = _over_http(name, url) if url or _is_served(name) else _in_process(name, registry, model)
    if message is not None:
        return {"model": name, "answer": _print(ask([{"role": "user", "content": message}]), out)}
    _converse(name, ask, out)
    return None


def _converse(name: str, ask: Ask, out: TextIO | None) -> None:
    messages: list[dict[str, str]] = []
    if sys.stdin.isatty():
        print(f"asking {name}; an empty line or Ctrl-D ends it", file=sys.stderr)
    while True:
        question = _read_question()
        if not question:
            return
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _print(ask(messages), out)})


def _read_question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _print(pieces: Iterator[str], out: TextIO | None) -> str:
    answer = []
    for piece in pieces:
        answer.append(piece)
        print(piece, end="", flush=True, file=out)
    print(flush=True, file=out)
    return "".join(answer)


def _is_served(name: str) -> bool:
    """Whether our service is on the default port and offers `name`."""
    import httpx

    try:
        if httpx.get(f"{DEFAULT_URL}/healthz", timeout=2).status_code != 200:
            return False
        key = {"Authorization": f"Bearer {_api_key()}"}
        return httpx.get(f"{DEFAULT_URL}/v1/models/{name}", timeout=10, headers=key).status_code == 200
    except httpx.HTTPError:
        return False


def _api_key() -> str:
    """`CARTRIDGES_API_KEY`, for a service that asks for one."""
    return os.environ.get("CARTRIDGES_API_KEY") or "none"


def _over_http(name: str, url: str | None) -> Ask:
    import openai

    base = (url or DEFAULT_URL).rstrip("/").removesuffix("/v1")
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=_api_key(), max_retries=0)

    def ask(messages: list[dict[str, str]]) -> Iterator[str]:
        try:
            for chunk in client.chat.completions.create(
                    model=name, messages=messages, max_tokens=MAX_TOKENS, stream=True):
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content
        except openai.APIConnectionError:
            raise UserError(f"no service answers at {base}; start one with `cartridges serve`") from None
        except openai.APIStatusError as error:
            raise UserError(f"{base}: {error.body['message']}") from None

    return ask


def _in_process(name: str, registry: str, model: str | None) -> Ask:
    from cartridges.artifact import check_compatible, load
    from cartridges.config import ModelSettings
    from cartridges.engines.base import CartridgePrefix, Request
    from cartridges.engines.stream import TransformersStreamingEngine
    from cartridges.models import load_base_model
    from cartridges.registry import Registry
    from workflows.evaluation.base_model import model_of
    from workflows.serving.factory import decoding_model

    artifact = load(Registry(registry).get(name))
    base = load_base_model(decoding_model(model_of(
        artifact.manifest, ModelSettings(name=model) if model else ModelSettings())))
    check_compatible(artifact.manifest, base.identity)
    engine = TransformersStreamingEngine(base)
    prefix = CartridgePrefix(artifact.cartridge, artifact.digest)

    def ask(messages: list[dict[str, str]]) -> Iterator[str]:
        ids = tuple(base.template.conversation_ids(messages))
        room = base.identity.max_position_embeddings - artifact.manifest.num_tokens - len(ids)
        if room < 1:
            raise UserError("the conversation has filled the model's window; start a new one")
        events = engine.stream(Request(ids, prefix, max_tokens=min(MAX_TOKENS, room)))
        return (event.text for event in _blocking(events))

    return ask


def _blocking(events: AsyncIterator[Any]) -> Iterator[Any]:
    """`events` for code that is not asynchronous."""
    with asyncio.Runner() as runner:

        async def following() -> Any:
            return await anext(events, None)

        try:
            while (event := runner.run(following())) is not None:
                yield event
        finally:
            runner.run(events.aclose())
