"""An asking side behind an OpenAI-compatible service: a large model asks, the small teacher answers.

The chunks of the corpus are sent to the service. It never provides answers: a cartridge learns the distribution of
its own base model.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

from cartridges.config import SynthesizeSettings
from cartridges.errors import UserError
from cartridges.selfstudy.asker import STOP, Ask, AskingRefusedError, as_question
from cartridges.selfstudy.seed_prompts import ASKING_EXAMPLES

RETRIES = 5
"""Retries of a request, with growing pauses, if the service is busy or cannot be reached."""
TIMEOUT_S = 60.0
HOPELESS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
"""Errors that neither a retry nor another question would avoid."""
ODD = (AttributeError, IndexError, TypeError, ValueError)
"""Errors raised by responses that are not the API's: HTML, no choices, broken JSON."""


class EndpointAsker:
    """`Asker` over `settings.asking.endpoint`, several requests at a time.

    Raises `AskingRefusedError` if the service refuses the key or does not know the model or the route. Any other
    error of a request is returned in its place.
    """

    def __init__(self, settings: SynthesizeSettings, retries: int = RETRIES):
        self.settings, self.where = settings, f"synthesize.asking.endpoint {settings.asking.endpoint}"
        self.key = os.environ.get(settings.asking.api_key_env, "") if settings.asking.api_key_env else ""
        self.client = openai.OpenAI(base_url=settings.asking.endpoint, api_key=self.key or "none", max_retries=retries,
                                    timeout=TIMEOUT_S)
        self.threads = ThreadPoolExecutor(settings.asking.concurrency, "asking")

    def ask(self, asks: Sequence[Ask]) -> list[str | Exception]:
        return list(self.threads.map(self._attempt, asks))

    def check(self, asks: Sequence[Ask]) -> None:
        """Raise a one-line `UserError` if one of `asks` is not answered."""
        for answer in self.ask(asks):
            if isinstance(answer, Exception):
                raise UserError(f"{self.where}: {self._line(answer)}")
            if not answer:
                raise UserError(f"{self.where}: the answer is empty; a model that thinks first needs a larger "
                                "synthesize.max_question_tokens")

    def _attempt(self, ask: Ask) -> str | Exception:
        try:
            return self._ask(ask)
        except HOPELESS as error:
            raise AskingRefusedError(f"{self.where}: {self._line(error)}; see asking.endpoint_model and "
                                     "asking.api_key_env") from None
        except openai.OpenAIError as error:
            return error
        except ODD as error:
            return RuntimeError(f"the response does not follow the API ({type(error).__name__})")

    def _ask(self, ask: Ask) -> str:
        how = dict(model=self.settings.asking.endpoint_model, max_tokens=self.settings.max_question_tokens,
                   seed=ask.seed % (1 << 31), temperature=self.settings.asking_temperature)
        if ask.completion is not None:
            made: Any = self.client.completions.create(prompt=ASKING_EXAMPLES + ask.completion, stop=list(STOP), **how)
            return as_question(made.choices[0].text, made.choices[0].finish_reason)
        made = self.client.chat.completions.create(messages=_messages(ask), **how)
        return as_question(made.choices[0].message.content or "", made.choices[0].finish_reason)

    def _line(self, error: Exception) -> str:
        """`error` in one line, without the key, which some services repeat."""
        text = " ".join(str(error).split())[:200]
        return text.replace(self.key, "***") if self.key else text


def _messages(ask: Ask) -> list[dict[str, str]]:
    system = [] if ask.text is None else [{"role": "system", "content": ask.text}]
    return [*system, {"role": "user", "content": ask.seed_prompt}]
