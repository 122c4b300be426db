"""What clients may send: OpenAI's chat and completions requests, and our cartridge management."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

INERT = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity"})
"""Fields of OpenAI's that do not change an answer here: taken and ignored, as clients send them."""

RESERVED = frozenset({"kv_transfer_params", "cache_salt", "prompt_logprobs", "prompt_token_ids",
                      "skip_reading_prefix_cache"})
"""Engine parameters that only the service may set: through them one client could read another's cache."""

MAX_CHOICES = 16
MAX_CARTRIDGES = 16


def _check_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a character pair; no tokenizer reads it.
        raise ValueError("the text holds half of a surrogate pair, which is not a character") from None
    return text


Text = Annotated[str, AfterValidator(_check_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Name = Annotated[Text, Field(min_length=1, max_length=512)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_and_drop(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        reserved = sorted(RESERVED & fields.keys())
        if reserved:
            raise ValueError(f"{reserved[0]} is set by the service only; remove it")
        # A null is how clients spell "not given".
        return {name: value for name, value in fields.items() if value is not None and name not in INERT}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Generation(Body, ABC):
    """What chat and completions share."""

    model: Name
    cartridges: list[Name] = Field([], max_length=MAX_CARTRIDGES)
    full_context: bool = False
    fallback: Literal["retrieval", "full_context"] | None = None
    fallback_entropy: float | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = []
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    frequency_penalty: float = 0
    presence_penalty: float = 0
    logit_bias: dict[str, float] = {}

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _unsupported(cls, value):
        if value:
            raise ValueError("not supported here; leave it out")
        return value

    @model_validator(mode="after")
    def _check_fallback(self) -> Self:
        if self.fallback_entropy is not None and self.fallback is None:
            raise ValueError("fallback_entropy goes with fallback: \"retrieval\" or \"full_context\"")
        if self.fallback and self.full_context:
            raise ValueError("full_context answers from the text already; leave fallback out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def answer_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def choices(self) -> int:
        """Answers that are asked for."""
        return self.n

    @property
    @abstractmethod
    def topk(self) -> int | None:
        """Top logprobs per token; None when no logprobs were asked for."""


class TextPart(BaseModel):
    type: Literal["text", "input_text"]
    text: Text


class ChatMessage(BaseModel):
    model_config = ConfigDict(frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart] | None = None
    """None is what clients send of an assistant that said nothing."""

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is missing")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ResponseFormat(BaseModel):
    type: Literal["text"]


class ChatRequest(Generation):
    messages: list[ChatMessage] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Any] = []
    tool_choice: Literal["none", "auto"] = "auto"

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, value: list[Any]) -> list[Any]:
        if value:
            raise ValueError("no function is called here; leave them out, and ask for text where a framework wants a "
                             "structured answer")
        return value

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def topk(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Generation):
    prompt: (Text | TokenIds | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES)]
             | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)])
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] = 1

    @property
    def prompts(self) -> list[str | list[int]]:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n

    @property
    def topk(self) -> int | None:
        return self.logprobs


class LoadRequest(Body):
    """POST /v1/cartridges: make a registry name resident; `ttl_s` idle seconds put it out again."""

    name: Name
    pin: bool = False
    ttl_s: float | None = Field(None, gt=0)


class UpdateRequest(Body):
    """PATCH /v1/cartridges/{name}."""

    pin: bool | None = None
    ttl_s: float | None = Field(None, gt=0)
