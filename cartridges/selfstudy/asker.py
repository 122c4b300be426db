"""The asking side of self-study: who writes the user's messages.

It may be another model than the teacher. What it writes is only ever a question: answers and their
distributions are the teacher's own.
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
"""Where a continued question ends."""
_LABEL = re.compile(r"^\**question:[\s*]*", re.IGNORECASE)


@dataclass(frozen=True)
class Ask:
    """One message to be written: by `seed_prompt`, with `text` in sight (None: nothing); or, where `completion`
    is set, by continuing it after few-shot examples. `seed` makes it repeatable."""

    seed: int
    seed_prompt: str | None = None
    completion: str | None = None
    text: str | None = None


class AskingRefusedError(UserError):
    """The asking side refuses whatever it is asked: a wrong key, an unknown model."""


class Asker(Protocol):
    def ask(self, asks: Sequence[Ask]) -> list[str | Exception]:
        """What is written for each, in order, which may be empty or unusable; or why that one failed.

        Raises `AskingRefusedError` where no other would be answered either.
        """


class EngineAsker:
    """A model behind an `Engine`, with the template of that model."""

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
    """`text` without space around it, and without the "Question:" that some models begin with. The stop string "?" is
    cut from an answer; a question that ended with it gets it back."""
    text = _LABEL.sub("", text.strip())
    return text + "?" if finish_reason == "stop" and text and text[-1].isalnum() else text
