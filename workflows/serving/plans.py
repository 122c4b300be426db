"""From a checked request body to engine calls: what stands before the prompt, which tokens, how many."""

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cartridges.serve_config import ServeSettings
from cartridges.template import ChatTemplate
from workflows.serving.access import Caller
from workflows.serving.api import MAX_CHOICES, ChatRequest, CompletionRequest, Generation
from workflows.serving.backend import EngineCall
from workflows.serving.catalog import AUTO, BASE, Catalog, Target
from workflows.serving.errors import ApiError
from workflows.serving.full_context import CorpusTexts
from workflows.serving.prompts import chat_ids, raw_ids
from workflows.serving.search import CorpusSearch
from workflows.serving.uncertainty import TOPK

VALUE_BYTES = 2
"""Bytes of a value in `kv_bytes`: as in bfloat16, whatever the engine computes in."""


@dataclass(frozen=True)
class Context:
    """What stands before the prompt, in `num_tokens` KV slots.

    `text` is the corpus of a full-context answer, or what was retrieved of it; `truncated`: only its
    beginning fitted the window.
    """

    kind: Literal["base", "cartridge", "composition", "full_context", "retrieval"]
    num_tokens: int
    text: str | None = None
    truncated: bool = False

    @property
    def cached_tokens(self) -> int:
        return self.num_tokens if self.kind in ("cartridge", "composition") else 0


@dataclass(frozen=True)
class FallbackRule:
    """Where the first `tokens` average more than `threshold` nats of entropy, the answer comes from `source`.

    `entropy` is the measured average, in nats a token; None before the tokens are there.
    """

    source: Literal["retrieval", "full_context"]
    threshold: float
    tokens: int
    entropy: float | None = None


@dataclass(frozen=True)
class Plan:
    """A checked request: one `EngineCall` for every choice of the answer.

    `prompt_tokens` counts prefix and prompts, `cached_tokens` the cartridge's part of it;
    `kv_bytes` is what the KV of the prefix and the longest prompt takes.
    """

    target: Target
    context: Context
    calls: tuple[EngineCall, ...]
    prompt_tokens: int
    cached_tokens: int
    kv_bytes: int
    fallback: FallbackRule | None = None
    arrived: float = field(default_factory=time.monotonic)

    @property
    def label(self) -> str:
        """`model` of the metrics; answers from text apart, or their times would hide the cartridge's."""
        from_text = self.context.text is not None
        return f"{self.target.label}:{self.context.kind}" if from_text else self.target.label

    def describe(self) -> dict[str, Any]:
        """`context` of a response: which of the ways to answer this was."""
        told = {"kind": self.context.kind, "tokens": self.context.num_tokens, "kv_bytes": self.kv_bytes}
        if self.context.kind == "full_context":
            told["truncated"] = self.context.truncated
        if self.fallback:
            told |= {"fallback": self.context.kind == self.fallback.source, "entropy": self.fallback.entropy,
                     "fallback_entropy": self.fallback.threshold}
        return told


class Planner:
    """Request bodies -> plans. Blocking: registry and tokenizer take time. Refusals are `ApiError`.

    `window`: tokens that the engine takes (0: the model's window).
    """

    def __init__(self, catalog: Catalog, template: ChatTemplate, settings: ServeSettings, window: int = 0):
        self.catalog, self.template, self.settings = catalog, template, settings
        self.window = window or catalog.identity.max_position_embeddings
        self.texts = CorpusTexts(catalog.registry, template, self.window)
        self.search = CorpusSearch(self.texts.read, catalog.searchable, template)
        self._default_tokens = len(template.default_ids())

    def plan(self, body: Generation, caller: Caller) -> Plan:
        prompts = self._prompts(body)
        if body.choices > MAX_CHOICES:
            raise ApiError(400, f"prompts times n must be at most {MAX_CHOICES}", param="n")
        longest = max(map(len, prompts))
        if longest >= self.window:  # Before anything is searched for it.
            raise ApiError(400, f"the model's window is {self.window} tokens, and the prompt has {longest}",
                           "context_length_exceeded")
        target = self._target(body, caller)
        fallback = self._fallback_rule(body, target, body.choices)
        context = self._context(body, target, longest)
        return self._planned(body, caller, target, context, prompts, fallback)

    def fall_back(self, body: Generation, caller: Caller, plan: Plan) -> Plan | None:
        """`plan`'s question to the same corpora, with their text in the prompt. None: nothing was found."""
        assert plan.fallback
        (ids,) = self._prompts(body)
        if plan.fallback.source == "full_context":
            context = self._text_context(body, plan.target, len(ids))
        else:
            text = self.search.passages(plan.target.entries, self._question(body), self.settings.retrieval_tokens)
            if not text:
                return None
            context = Context("retrieval", len(self.template.system_ids(text)), text)
        return replace(self._planned(body, caller, plan.target, context, [ids], plan.fallback), arrived=plan.arrived)

    def _target(self, body: Generation, caller: Caller) -> Target:
        if body.model != AUTO:
            return self.catalog.resolve(body.model, body.cartridges, caller.may_use)
        if body.cartridges:
            raise ApiError(400, "auto picks one cartridge; leave cartridges out, or name them all",
                           param="cartridges")
        found = self.search.which(caller.may_use, self._question(body))
        return self.catalog.resolve(found.name if found else BASE, (), caller.may_use)

    def _question(self, body: Generation) -> str:
        """What to search for: the user's last message, or the prompt."""
        if isinstance(body, ChatRequest):
            return next((message.text for message in reversed(body.messages) if message.role == "user"), "")
        assert isinstance(body, CompletionRequest)
        (prompt, *others) = body.prompts
        if others:
            raise ApiError(400, "one prompt at a time with auto and fallback", param="prompt")
        return prompt if isinstance(prompt, str) else self.template.tokenizer.decode(prompt)

    def _fallback_rule(self, body: Generation, target: Target, choices: int) -> FallbackRule | None:
        if body.fallback is None or (body.model == AUTO and not target.entries):
            return None
        if choices != 1:
            raise ApiError(400, "fallback: one prompt and n=1 at a time", param="fallback")
        missing = [entry.name for entry in target.entries if entry.manifest.corpus_text is None]
        if missing or not target.entries:
            raise ApiError(400, f"fallback: there is no corpus text of {missing[0] if missing else 'the base model'}",
                           "corpus_not_available", "fallback")
        if not self.settings.full_context:
            raise ApiError(400, "fallback: answers from the text are switched off here (serve.full_context)",
                           "full_context_off", "fallback")
        threshold = self.settings.fallback_entropy if body.fallback_entropy is None else body.fallback_entropy
        return FallbackRule(body.fallback, threshold, self.settings.fallback_tokens)

    def _planned(self, body: Generation, caller: Caller, target: Target, context: Context,
                 prompts: list[tuple[int, ...]], fallback: FallbackRule | None) -> Plan:
        longest = max(map(len, prompts))
        calls = tuple(self._call(body, target, context, ids, choice, caller.tenant)
                      for ids in prompts for choice in range(body.n))
        per_token = self.catalog.identity.shape.bytes_per_token(VALUE_BYTES)
        return Plan(target, context, calls, sum(context.num_tokens + len(ids) for ids in prompts),
                    context.cached_tokens * len(prompts), (context.num_tokens + longest) * per_token, fallback)

    def _prompts(self, body: Generation) -> list[tuple[int, ...]]:
        if isinstance(body, ChatRequest):
            return [chat_ids(self.template, body.messages)]
        assert isinstance(body, CompletionRequest)
        return [raw_ids(self.template, prompt, self.catalog.identity.vocab_size) for prompt in body.prompts]

    def _context(self, body: Generation, target: Target, prompt_tokens: int) -> Context:
        if not body.full_context:
            return self._cartridge_context(target)
        if not self.settings.full_context:
            raise ApiError(400, "full_context: switched off here (serve.full_context)", "full_context_off",
                           "full_context")
        if not target.entries:
            raise ApiError(400, "full_context: the base model has no corpus; name a cartridge as the model",
                           "corpus_not_available", "full_context")
        return self._text_context(body, target, prompt_tokens)

    def _text_context(self, body: Generation, target: Target, prompt_tokens: int) -> Context:
        answer = body.answer_tokens or min(self.settings.max_tokens_limit, self.window // 8)
        turn = self.texts.turn(target.entries, prompt_tokens + answer)
        return Context("full_context", turn.num_tokens, turn.text, turn.truncated)

    def _cartridge_context(self, target: Target) -> Context:
        if not target.entries:
            return Context("base", self._default_tokens)
        partners = len(target.entries) - 1
        for entry in target.entries:
            if entry.manifest.composition < partners:
                raise ApiError(
                    400, f"{entry.name}@{entry.version} was tested with {entry.manifest.composition} cartridges "
                    f"beside it, not with {partners}; `cartridges compose-test {entry.name}` tests it",
                    "composition_not_tested", "model")
        return Context("composition" if partners else "cartridge", target.num_tokens)

    def _call(self, body: Generation, target: Target, context: Context, ids: tuple[int, ...],
              choice: int, tenant: str) -> EngineCall:
        temperature = self.settings.default_temperature if body.temperature is None else body.temperature
        seed = secrets.randbits(62) if body.seed is None else body.seed % 2**62
        return EngineCall(target.ref, ids, self._max_tokens(body, context.num_tokens, len(ids)), temperature,
                          body.top_p, seed + choice, body.stops, max(body.topk or 0, TOPK if body.fallback else 0),
                          context.text, context.kind != "retrieval", tenant)

    def _max_tokens(self, body: Generation, prefix_tokens: int, prompt_tokens: int) -> int:
        room = self.window - prefix_tokens - prompt_tokens
        limit, asked = self.settings.max_tokens_limit, body.answer_tokens
        if prompt_tokens == 0:
            raise ApiError(400, "the prompt is empty; send at least one token", param="prompt")
        if room < (asked or 1):
            raise ApiError(400, f"the model's window is {self.window} tokens: cartridge or system turn "
                           f"{prefix_tokens}, prompt {prompt_tokens}, answer {asked or 1}",
                           "context_length_exceeded")
        if asked and asked > limit:
            raise ApiError(400, f"max_tokens {asked} is above this service's limit of {limit}",
                           "max_tokens_exceeded", "max_tokens")
        return asked or min(limit, room)
