"""Answers in OpenAI's shapes: whole, and in pieces."""

import time
import uuid
from typing import Any, Protocol

from cartridges.engines.base import TokenEvent
from workflows.serving.api import ChatRequest, CompletionRequest, Generation
from workflows.serving.catalog import AUTO
from workflows.serving.plans import Plan

Json = dict[str, Any]


class Choice:
    """What one choice has produced so far."""

    def __init__(self):
        self.events: list[TokenEvent] = []

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)

    @property
    def finish_reason(self) -> str | None:
        return self.events[-1].finish_reason if self.events else None


class Format(Protocol):
    """How one endpoint writes a piece of a choice and a whole choice."""

    id_prefix: str
    chunk_object: str
    object: str

    def opening(self, index: int) -> Json | None: ...

    def piece(self, index: int, event: TokenEvent) -> Json: ...

    def whole(self, index: int, choice: Choice) -> Json: ...


class ChatFormat:
    id_prefix, chunk_object, object = "chatcmpl-", "chat.completion.chunk", "chat.completion"

    def __init__(self, tokens: "TokenTexts", topk: int | None):
        self.tokens, self.topk = tokens, topk

    def opening(self, index: int) -> Json | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                "finish_reason": None}

    def piece(self, index: int, event: TokenEvent) -> Json:
        delta = {"content": event.text} if event.text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs([event]),
                "finish_reason": event.finish_reason}

    def whole(self, index: int, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(choice.events),
                "finish_reason": choice.finish_reason}

    def _logprobs(self, events: list[TokenEvent]) -> Json | None:
        if self.topk is None:
            return None
        content = [self.tokens.describe(event.token_id, event.logprob) | {"top_logprobs": [
            self.tokens.describe(*pair) for pair in _top(event, self.topk)]}
            for event in events]
        return {"content": content, "refusal": None}


class CompletionFormat:
    id_prefix, chunk_object, object = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokens: "TokenTexts", topk: int | None):
        self.tokens, self.topk = tokens, topk
        self._lengths: dict[int, int] = {}

    def opening(self, index: int) -> Json | None:
        return None

    def piece(self, index: int, event: TokenEvent) -> Json:
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(event.text)
        return {"index": index, "text": event.text, "logprobs": self._logprobs([event], offset),
                "finish_reason": event.finish_reason}

    def whole(self, index: int, choice: Choice) -> Json:
        return {"index": index, "text": choice.text, "logprobs": self._logprobs(choice.events, 0),
                "finish_reason": choice.finish_reason}

    def _logprobs(self, events: list[TokenEvent], offset: int) -> Json | None:
        if self.topk is None:
            return None
        offsets = []
        for event in events:
            offsets.append(offset)
            offset += len(event.text)
        return {"tokens": [self.tokens.text(event.token_id) for event in events],
                "token_logprobs": [event.logprob for event in events], "text_offset": offsets,
                "top_logprobs": [{self.tokens.text(token_id): logprob for token_id, logprob
                                  in _top(event, self.topk)} for event in events]}


def _top(event: TokenEvent, topk: int) -> list[tuple[int, float]]:
    """The pairs that were asked for; the service itself may have asked for more."""
    return list(zip(event.topk_ids, event.topk_logprobs, strict=True))[:topk]


class TokenTexts:
    """Single tokens as text. A token that is part of a character has no text of its own."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)

    def describe(self, token_id: int, logprob: float) -> Json:
        text = self.text(token_id)
        whole = "\ufffd" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


class Answer:
    """One response: its id and model on every piece, its choices, its usage.

    `note` is kept up to date for the audit log: which version, how many tokens.
    """

    def __init__(self, body: Generation, plan: Plan, tokenizer, note: Json):
        kind = ChatFormat if isinstance(body, ChatRequest) else CompletionFormat
        assert isinstance(body, ChatRequest | CompletionRequest)
        self.format: Format = kind(TokenTexts(tokenizer), body.topk)
        self.plan, self.body = plan, body
        self.choices = [Choice() for _ in plan.calls]
        self._head = {"id": f"{self.format.id_prefix}{uuid.uuid4().hex}", "created": int(time.time()),
                      "model": plan.target.label if body.model == AUTO else body.model,
                      "system_fingerprint": plan.target.version}

        self._note = note
        note |= {"kind": plan.context.kind, "answered": plan.target.ref, "version": plan.target.version,
                 "prompt_tokens": plan.prompt_tokens, "cached_tokens": plan.cached_tokens, "completion_tokens": 0}

    def add(self, index: int, event: TokenEvent) -> None:
        self.choices[index].events.append(event)
        self._note["completion_tokens"] += 1

    def openings(self) -> list[Json]:
        """What a stream begins with: which way of answering this is, and the roles."""
        made = [self.format.opening(index) for index in range(len(self.choices))]
        return [self._chunk([choice]) | {"context": self.plan.describe()} for choice in made if choice is not None]

    def piece(self, index: int, event: TokenEvent) -> Json | None:
        """The chunk for one token; None while there is nothing to tell."""
        self.add(index, event)
        if not (event.text or event.finish_reason or self.body.topk is not None):
            return None
        return self._chunk([self.format.piece(index, event)])

    def usage_chunk(self) -> Json:
        return self._head | {"object": self.format.chunk_object, "choices": [], "usage": self.usage(),
                             "context": self.plan.describe()}

    def whole(self) -> Json:
        choices = [self.format.whole(index, choice) for index, choice in enumerate(self.choices)]
        return self._head | {"object": self.format.object, "choices": choices, "usage": self.usage(),
                             "context": self.plan.describe()}

    def usage(self) -> Json:
        generated = sum(len(choice.events) for choice in self.choices)
        return {"prompt_tokens": self.plan.prompt_tokens, "completion_tokens": generated,
                "total_tokens": self.plan.prompt_tokens + generated,
                "prompt_tokens_details": {"cached_tokens": self.plan.cached_tokens}}

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.body.stream_options.include_usage else {}
        return self._head | {"object": self.format.chunk_object, "choices": choices} | usage
