"""The asking side of self-study, which writes the user's messages.

It may be another model than the teacher. It writes only questions: answers and their distributions always
come from the teacher.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cartridges.config import SynthesizeSettings
from cartridges.engines.base import Engine, RawPrefix, Request, TextPrefix
from cartridges.errors import UserError
from cartridges.selfstudy.seed_prompts import ASKING_EXAMPLES
from cartridges.template import ChatTemplate

STOP = ("\n", "?")
"""Stop strings of a question that is written by continuing examples."""
_LABEL = re.compile(r"^\**question:[\s*]*", re.IGNORECASE)


@dataclass(frozen=True)
class Ask:
    """A request for one message, written either by following `seed_prompt` with `text` as context (None: no context),
    or by continuing `completion` after few-shot examples. `seed` makes it repeatable."""

    seed: int
    seed_prompt: str | None = None
    completion: str | None = None
    text: str | None = None


class AskingRefusedError(UserError):
    """The asking side refuses all requests, because of a wrong key or an unknown model, say."""


class Asker(Protocol):
    def ask(self, asks: Sequence[Ask]) -> list[str | Exception]:
        """The message written for each of `asks`, in order (it may be empty or unusable), or the error of that one.

        Raises `AskingRefusedError` if no other request would be answered either.
        """


class EngineAsker:
    """`Asker` over a model's `engine`, with the chat template of that model."""

    def __init__(self, engine: Engine, template: ChatTemplate, settings: SynthesizeSettings):
        self.engine, self.template, self.settings = engine, template, settings

    def ask(self, asks: Sequence[Ask]) -> list[str | Exception]:
        completions = self.engine.generate([self._request(ask) for ask in asks])
        return [as_question(completion.text, completion.finish_reason) for completion in completions]

    def _request(self, ask: Ask) -> Request:
        how = dict(max_tokens=self.settings.max_question_tokens, temperature=self.settings.asking_temperature,
                   seed=ask.seed)
        if ask.completion is not None:
            return Request(tuple(self.template.text_ids(ask.completion)), RawPrefix(ASKING_EXAMPLES), stop=STOP, **how)
        ids = self.template.conversation_ids([{"role": "user", "content": ask.seed_prompt}])
        return Request(tuple(ids), TextPrefix(ask.text) if ask.text is not None else None, **how)


def as_question(text: str, finish_reason: str | None) -> str:
    """`text` without surrounding space and without the "Question:" with which some models begin. Engines cut the stop
    string "?" off; it is appended again."""
    text = _LABEL.sub("", text.strip())
    return text + "?" if finish_reason == "stop" and text and text[-1].isalnum() else text
