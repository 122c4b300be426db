"""The two arms of the serving bench: full contexts and cartridges, as many as one KV budget holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import torch

from cartridges.cartridge import Cartridge
from cartridges.engines.base import CartridgePrefix, Prefix, TextPrefix
from cartridges.errors import UserError
from cartridges.forward import PrefixKV, prefill, round_up
from cartridges.models import BaseModel
from cartridges.template import ChatTemplate
from workflows.bench.conversations import sample_corpus
from workflows.runtime.console import human_bytes

BLOCK = 32
"""Tokens of a KV block: what a request takes is counted in whole ones."""
Corpora = Literal["one each", "one"]
"""Every request has a corpus of its own, or all of them ask about one, whose KV they share."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of a context, of its cartridge, and of a request's question and answer; KV bytes a token."""

    context: int
    cartridge: int
    own: int
    bytes_per_token: int

    def prefix(self, arm: str) -> int:
        return self.cartridge if arm == "cartridge" else self.context

    def request_bytes(self, arm: str) -> int:
        """KV of one request with its prefix."""
        return round_up(self.prefix(arm) + self.own, BLOCK) * self.bytes_per_token


@dataclass(frozen=True)
class Arm:
    """`name` is "full_context" or "cartridge"; request `i` of a batch follows `prefixes[i]`."""

    name: str
    corpora: Corpora
    prefixes: list[Prefix]
    batch: int

    def prefix(self, index: int) -> Prefix:
        return self.prefixes[index % len(self.prefixes)]


def batch_size(arm: str, sizes: Sizes, corpora: Corpora, budget: int, most: int) -> int:
    """The largest batch whose KV fits `budget` bytes. Raises `UserError` where no request fits."""
    one = sizes.request_bytes(arm)
    if one > budget:
        raise UserError(f"a KV budget of {human_bytes(budget)} does not hold one request on "
                        f"{sizes.prefix(arm)} tokens, {human_bytes(one)}; raise --kv-budget")
    if corpora == "one each":
        return min(most, budget // one)
    own = round_up(sizes.own, BLOCK) * sizes.bytes_per_token
    return min(most, 1 + (budget - one) // own)


def fit_contexts(wanted: Sequence[int], num_tokens: int | None, own: int, window: int,
                 bytes_per_token: int) -> list[Sizes]:
    """Sizes for each wanted context, cut to what the window leaves. p is `num_tokens`, or a tenth.

    Raises `UserError` for a context that is no longer than its cartridge.
    """
    found = []
    for tokens in wanted:
        context = min(tokens, window - own)
        p = num_tokens or round_up(context // 10, BLOCK)
        if p >= context:
            raise UserError(f"a cartridge of {p} tokens is no shorter than a context of {context}; "
                            "choose longer --contexts or fewer --num-tokens")
        found.append(Sizes(context, p, own, bytes_per_token))
    return list(dict.fromkeys(found))  # two that were cut to the window are one


def questions() -> list[str]:
    """Of the sample corpus."""
    from cartridges.corpus import load_questions

    return [question.question for question in load_questions(str(files("workflows") / "sample" / "questions.jsonl"))]


class Contexts:
    """Texts of a given length, each another from its first tokens on."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self.ids = template.tokenizer.encode(sample_corpus().text, add_special_tokens=False)

    def text(self, tokens: int, number: int) -> TextPrefix:
        """Its system turn has `tokens` tokens, or a few fewer."""
        return TextPrefix(self.template.cut(self._text(tokens, number), tokens))

    def _text(self, length: int, number: int) -> str:
        start = number * 97 % len(self.ids)
        turned = (self.ids[start:] + self.ids[:start]) * (1 + length // len(self.ids))
        return f"{number}. " + self.template.tokenizer.decode(turned[:length])


class Cartridges:
    """Untrained cartridges, each another: windows of one text's KV, behind its first slot."""

    def __init__(self, base: BaseModel, most_tokens: int, most: int):
        text = Contexts(base.template).text(most_tokens + most + 64, 0).text
        ids = base.template.system_ids(text)[: most_tokens + most]
        kv = prefill(base.model, ids)
        self.kv = PrefixKV(kv.keys.float(), kv.values.float())

    def make(self, tokens: int, number: int) -> CartridgePrefix:
        slots = torch.tensor([0, *range(1 + number, tokens + number)])
        cartridge = Cartridge(self.kv.keys[:, :, slots], self.kv.values[:, :, slots])
        return CartridgePrefix(cartridge, f"bench-{tokens}-{number}")


def make_arms(sizes: Sizes, corpora: Corpora, budget: int, most: int, contexts: Contexts,
              cartridges: Cartridges) -> list[Arm]:
    makers = {"full_context": contexts.text, "cartridge": cartridges.make}
    arms = []
    for name, make in makers.items():
        batch = batch_size(name, sizes, corpora, budget, most)
        count = 1 if corpora == "one" else batch
        arms.append(Arm(name, corpora, [make(sizes.prefix(name), number) for number in range(count)], batch))
    return arms
