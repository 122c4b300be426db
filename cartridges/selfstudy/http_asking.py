"""An asking side behind an OpenAI-compatible service: a large model asks, the small teacher answers.

The chunks of the corpus are sent to the service. Answers are never taken from it: a cartridge learns the
distribution of its own base model.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import openai

from cartridges.config import SynthesizeSettings
from cartridges.errors import UserError
from cartridges.selfstudy.asking import STOP, Ask, as_question
from cartridges.selfstudy.seed_prompts import ASKING_EXAMPLES

RETRIES = 5
"""Of a request, with growing pauses, where the service is busy or cannot be reached."""


class HttpAsker:
    """`Asker` over `settings.asking.endpoint`, several requests at a time.

    Raises `UserError` where the service refuses the key or does not know the model: no retry would help. Other errors
    of the service are raised as they come.
    """

    def __init__(self, settings: SynthesizeSettings, retries: int = RETRIES):
        self.settings, self.model = settings, settings.asking.endpoint_model
        key = os.environ.get(settings.asking.api_key_env) or "none"
        self.client = openai.OpenAI(base_url=settings.asking.endpoint, api_key=key, max_retries=retries)
        self.threads = ThreadPoolExecutor(settings.asking.concurrency, "asking")

    def ask(self, asks: Sequence[Ask]) -> list[str]:
        return list(self.threads.map(self._ask, asks))

    def check(self) -> None:
        """One short request; raises `UserError`, one line, where the service cannot be used."""
        try:
            self._ask(Ask(seed=0, seed_prompt="Ask a question about bread."))
        except openai.OpenAIError as error:
            raise UserError(f"synthesize.asking.endpoint {self.settings.asking.endpoint}: {_line(error)}") from None

    def _ask(self, ask: Ask) -> str:
        how = dict(model=self.model, max_tokens=self.settings.max_question_tokens, seed=ask.seed % (1 << 31),
                   temperature=self.settings.asking_temperature)
        try:
            if ask.completion is not None:
                made = self.client.completions.create(prompt=ASKING_EXAMPLES + ask.completion, stop=list(STOP), **how)
                return as_question(made.choices[0].text, made.choices[0].finish_reason)
            made = self.client.chat.completions.create(messages=_messages(ask), **how)
            return as_question(made.choices[0].message.content or "", made.choices[0].finish_reason)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(f"synthesize.asking.endpoint {self.settings.asking.endpoint}: {_line(error)}; see "
                            "asking.endpoint_model and asking.api_key_env") from None


def _messages(ask: Ask) -> list[dict[str, str]]:
    system = [] if ask.text is None else [{"role": "system", "content": ask.text}]
    return [*system, {"role": "user", "content": ask.seed_prompt}]


def _line(error: openai.OpenAIError) -> str:
    return " ".join(str(error).split())[:200]
