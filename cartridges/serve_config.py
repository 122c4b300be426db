"""Settings of the HTTP service."""

from pydantic import Field, model_validator

from cartridges.engine_config import EngineName
from cartridges.settings import Settings


class ReplicaSettings(Settings):
    min_replicas: int = Field(1, ge=0)
    """0 stops all replicas of an idle deployment; its next request waits for a replica to start."""
    max_replicas: int = Field(1, ge=1)
    target_ongoing: float = Field(8, gt=0, allow_inf_nan=False)
    """Target of autoscaling: requests in flight per replica."""
    idle_s: float = Field(60, ge=0, allow_inf_nan=False)
    """Seconds of lower load before a replica is stopped."""

    @model_validator(mode="after")
    def _least_and_most(self) -> "ReplicaSettings":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class ServeSettings(Settings):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    engine: EngineName = "auto"
    """auto is vLLM if it is installed, else transformers."""
    cartridges: tuple[str, ...] = ()
    """Names (`name[@version|@alias]`) that are offered. Empty offers the whole registry. Each is loaded by its first
    request, or by `POST /v1/cartridges`."""
    keys_file: str | None = None
    """File of API keys (`cartridges keys add`). Without one, only requests from this machine are answered."""
    open_to_network: bool = False
    """Answer the network without keys, for use behind a gateway that checks its own."""
    audit_log: str | None = None
    """File to which every request appends a JSON line: caller, model and token counts, never a prompt or an answer."""
    max_tokens_limit: int = Field(2048, ge=1)
    max_queue: int = Field(128, ge=1)
    """Most answers in flight (a request's prompts times n). Beyond that the service answers 429; a single request for
    more is a 400."""
    shared: ReplicaSettings = ReplicaSettings()
    """Replicas for all cartridges without dedicated ones."""
    dedicated: dict[str, ReplicaSettings] = {}
    """Dedicated replicas of cartridges, by name. They can be changed while the service runs."""
    max_active: int = Field(16, ge=1)
    """Most requests that a transformers replica decodes at once; the others wait."""
    default_temperature: float = Field(0.0, ge=0, le=2)
    """Temperature of requests that set none. It is 0, because cartridges are asked for facts (OpenAI's default is
    1)."""

    full_context: bool = True
    """Allow `full_context: true`, which answers with the corpus in the prompt if the registry has its text. It costs a
    prefill of up to the whole window."""
    search_at_start: bool = False
    """Read all texts and index them at start; otherwise the first `auto` request waits for that. (A key restricted to
    some cartridges has its own index, made at its first request.)"""
    fallback_entropy: float = Field(0.5, ge=0)
    """Mean entropy of the cartridge's first tokens (nats per token) above which a request with `fallback` is answered
    from the corpus' text. It was chosen for the default model (docs/serving.md)."""
    fallback_tokens: int = Field(8, ge=1)
    """Number of those first tokens. They are held back until the decision."""
    retrieval_tokens: int = Field(256, ge=192)
    """Most tokens of retrieved passages for an answer from the text."""
    resident_bytes: int = Field(2 << 30, ge=1)
    """Most bytes of loaded cartridges in a replica. The least recently used are unloaded first."""
    max_body_bytes: int = Field(4 << 20, ge=1024)
    """Longest request body in bytes; longer ones are answered with 413."""
    request_timeout_s: float = Field(600, gt=0)
    """Seconds after which an unfinished request ends with an error."""
    drain_s: float = Field(10, ge=0)
    """Seconds for running requests to finish when the service is stopped."""
