"""Settings, one frozen class a stage. The string under a field says what it means."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from cartridges.settings import Settings

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Dtype = Literal["auto", "float32", "bfloat16"]
EngineName = Literal["auto", "transformers", "vllm"]


class ModelSettings(Settings):
    name: str = DEFAULT_MODEL
    """Hub id or local directory of a Llama- or Qwen3-type instruct model."""
    revision: str | None = None
    """Hub revision; None is the hub's default branch."""
    dtype: Dtype = "auto"
    """Compute dtype. auto: bfloat16 on a GPU and on CPUs with AMX or AVX-512's bfloat16, float32 on other CPUs."""


class CorpusSettings(Settings):
    corpus_id: str | None = None
    """Row of a JSONL corpus, or a shell pattern (`services/*`) that joins several in file order."""
    keep_text: bool = True
    """Publish the corpus' text beside the cartridge, so that a service can answer with full context.
    False for a private corpus: then the registry holds the cartridge alone."""


class ChunkSettings(Settings):
    max_tokens: int = Field(256, ge=16)
    """Longest chunk in tokens. Short, because a small teacher is right only about what is near; long
    enough for most tables to stay with their header."""


Filter = Literal["empty", "malformed", "refers_to_text", "answer_in_question", "teacher_disagrees",
                 "low_information_gain", "truncated", "round_trip", "ungrounded", "ungrounded_name", "duplicate",
                 "near_duplicate"]
"""Reasons for which a conversation is dropped; `nothing_to_ask` and errors are no filters."""


class AskingSettings(Settings):
    """Who asks, where it is not the model that answers: at most one of `model` and `endpoint`."""

    model: ModelSettings | None = None
    """Another model, beside the teacher in every actor (by transformers)."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible service, such as `https://host/v1`. Chunks of the corpus are sent there."""
    endpoint_model: str = ""
    """What the service calls its model."""
    api_key_env: str = ""
    """Environment variable that holds the service's key, such as `OPENAI_API_KEY`. Empty: none is sent."""
    concurrency: int = Field(8, ge=1)
    """Requests that an actor has in flight at the service."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "AskingSettings":
        if self.model and self.endpoint:
            raise ValueError("give a model or an endpoint, not both")
        if bool(self.endpoint) != bool(self.endpoint_model):
            raise ValueError("endpoint (a URL) and endpoint_model (the name of a model there) go together")
        if self.endpoint and urlsplit(self.endpoint).username:
            raise ValueError("endpoint must not hold a password; name the variable with the key in api_key_env")
        return self


class SynthesizeSettings(Settings):
    chunk: ChunkSettings = ChunkSettings()
    num_conversations: int = Field(0, ge=0)
    """Conversations to plan before filtering; 0 derives it from the corpus length and the budget."""
    families: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Seed family -> share of the planned conversations; empty takes the default mixture."""
    topk: int = Field(20, ge=1)
    """Teacher log-probabilities kept at each answer token (the paper's 20)."""
    asking_temperature: float = Field(0.6, ge=0, allow_inf_nan=False)
    """Sampling temperature of the asking side (the paper's 0.6)."""
    max_question_tokens: int = Field(48, ge=8)
    max_answer_tokens: int = Field(64, ge=1)
    """Longest answer the teacher writes. One that does not end by itself is dropped and counted."""
    max_teacher_nll: float = Field(8.0, gt=0)
    """Known answers that the teacher, with the chunk, finds less likely than this (nats a token) are
    dropped: the question does not ask for them. Loose, because a clumsy question for a right phrase teaches more
    than none (docs/log.md, coverage)."""
    min_information_gain: float | None = None
    """Answers that the chunk makes likelier by less than this (nats a token) are dropped; null switches
    the filter off and saves the closed-book pass."""
    drop_ungrounded: bool = True
    """Drop written answers with a number that stands neither in the chunk nor in the question."""
    drop_ungrounded_names: bool = False
    """The same for names: capitalised words that do not open a sentence."""
    near_duplicate: float | None = Field(None, gt=0, le=1)
    """Of conversations whose last question and answer share this much of their word pairs (Jaccard)
    only the first is kept; null switches the filter off."""
    filters_off: tuple[Filter, ...] = ()
    """Filters that drop nothing, by the reasons they would give, such as `[duplicate, truncated]`."""
    general_share: float = Field(0.01, ge=0, lt=1)
    """Share of the planned conversations that are everyday requests about no chunk, answered by the
    model without any: they hold a cartridge to the model's behaviour off the corpus. Their answers are long: of a
    hundredth 5 % of the loss, and what more of them costs is in docs/log.md."""
    asking: AskingSettings = AskingSettings()
    """Another model for the asking side; the teacher answers and scores in any case."""
    engine: EngineName = "auto"
    """auto takes vLLM on a GPU where it is installed, else transformers (docs/log.md has what was measured)."""
    num_actors: int = Field(0, ge=0)
    """Ray Data actors, each holding one engine; 0 takes what the cluster has when the run starts: one for the GPUs of
    an engine, or without GPUs one a node."""
    max_actors: int = Field(0, ge=0)
    """So many that Ray Data may start while there is work and room, such as on a cluster that grows; 0: no more than
    `num_actors`."""
    threads_per_actor: int = Field(0, ge=0)
    """CPU threads of an actor's engine; 0 shares the cores of its node among the actors there."""
    batch_size: int = Field(128, ge=1)
    """Conversations an actor handles at once; also the unit of loss when a worker is killed."""
    retries: int = Field(1, ge=0)
    """Times that a conversation is tried again, alone, after it or its batch raised."""
    max_failed_share: float = Field(0.05, ge=0, le=1)
    """The run fails as soon as more than this share of the planned conversations raised."""

    @model_validator(mode="after")
    def _some_family(self) -> "SynthesizeSettings":
        if self.families and not any(self.families.values()):
            raise ValueError("families: every share is 0")
        return self


class OptimizerSettings(Settings):
    name: Literal["orthogonal_adam", "adam"] = "orthogonal_adam"
    """Adam with orthogonalised steps (`distill.optimizer`), or Adam as in the paper."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; by default 0.01, and 0.03 for plain Adam: the paper's is 0.02 for p <= 2048 and
    64k tokens a step, and our steps are small (docs/log.md)."""
    key_lr_scale: float = Field(3.0, gt=0)
    """Keys learn at `lr` times this: after RoPE they are larger than values, and the steps are not."""
    warmup_share: float = Field(0.02, ge=0, le=1)
    final_lr_share: float = Field(0.02, ge=0, le=1)
    """Linear decay ends at this share of the peak."""
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = Field(0.5, gt=0)

    @property
    def peak_lr(self) -> float:
        return self.lr or {"orthogonal_adam": 0.01, "adam": 0.03}[self.name]


class TrainSettings(Settings):
    num_tokens: int = Field(256, ge=2)
    """p: slots of the cartridge."""
    num_frozen_tokens: int = Field(1, ge=0)
    """Slots never trained; slot 0 is the attention sink."""
    init: Literal["prefix", "sampled_chunks", "attention_matching", "unrelated", "random",
                  "cartridge"] = "attention_matching"
    """Start: slots fitted to the attention to the corpus' own KV; KV of the corpus prefix, of sampled chunks or of
    unrelated text; random vectors; or an existing cartridge."""
    stretch_tokens: int = Field(512, ge=64)
    """`init=attention_matching` reads the corpus in stretches of about so many tokens, each alone; as many as the
    corpus has reads it at once, up to 8,192 and what the window leaves."""
    init_cartridge: str | None = None
    """Directory of the cartridge that `init=cartridge` continues from."""
    loss: Literal["distillation", "next_token", "none"] = "distillation"
    """`next_token` is the baseline; `none` publishes the start as an instant draft."""
    trained_layers: float = Field(0.5, gt=0, le=1)
    """Share of the layers, from the top, whose slots are trained; below them the start stays, so give
    `init=random` all. What the layers below make of a conversation is kept (docs/training.md): half of the
    layers took half the time a step."""
    distractors: tuple[str, ...] = ()
    """Directories of cartridges of other corpora, such as `<registry>/<name>/<version>`: they stand beside the
    one in training in some packs, read-only, so that it still answers when others are loaded with it."""
    distractor_share: float = Field(0.25, ge=0, le=1)
    """Share of the packs that are read with distractors."""
    max_distractors: int = Field(3, ge=1)
    """At most so many at once. Each number of slots that this makes is a shape of its own."""
    label_share: float = Field(0.5, ge=0, le=1)
    """Share of the target given to the known next token where the answer is known from the text; the
    rest is the teacher's distribution."""
    optimizer: OptimizerSettings = OptimizerSettings()
    row_tokens: int = Field(128, ge=16)
    """Length of a row: conversations are packed into rows of this many tokens (longer ones into
    rows of twice, four times, ... that length)."""
    pack_tokens: int = Field(512, ge=64)
    """Tokens of one pack (a micro batch of fixed shape). Small, because on a CPU many small steps learn
    more in the same time; on a GPU take 2048 or more."""
    packs_per_step: int = Field(1, ge=1)
    steps: int = Field(0, ge=0)
    """Optimiser steps; 0 derives them from `epochs`."""
    epochs: float = Field(5.0, gt=0)
    num_workers: int = Field(1, ge=1)
    threads_per_worker: int = Field(0, ge=0)
    """CPU threads of a worker; 0 shares the machine's cores among the workers."""
    held_out: int = Field(0, ge=0)
    """Self-study questions kept from training, to evaluate on. `build` keeps 64 where it has no others."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between generations on the held-out questions; the cartridge that answers most of them is published.
    0: none, and the last is."""
    zero_stage: int = Field(0, ge=0, le=3)
    """1 and 2 cut the optimiser's state up (with plain Adam); 3 spreads the frozen base model over the workers, for
    one that is larger than a GPU, and then computes example turns and lower layers anew for each conversation."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what they made: less memory, for a longer step."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)


Arm = Literal["closed_book", "full_context", "truncated", "cartridge", "wrong_cartridge", "exact_kv"]


class EvaluateSettings(Settings):
    arms: tuple[Arm, ...] = ("closed_book", "full_context", "truncated", "cartridge",
                             "wrong_cartridge", "exact_kv")
    max_questions: int = Field(0, ge=0)
    """Questions drawn by seed when there are more; 0 asks all."""
    max_answer_tokens: int = Field(32, ge=1)
    bootstrap_samples: int = Field(2000, ge=100)
    composition_share: float = Field(0.8, ge=0, le=1)
    """Share of its gain in accuracy over closed book that a cartridge must keep beside others."""
    wrong_cartridge: str | None = None
    """Registry name for the wrong_cartridge arm; None trains nothing and uses the bundled decoy:
    the exact KV of an unrelated text, cut to p."""


class VllmSettings(Settings):
    """The vLLM engine, for whatever uses it."""

    dtype: Dtype = "auto"
    """Compute and KV cache dtype. auto: `model.dtype`."""
    max_model_len: int = Field(0, ge=0)
    """Longest prefix + conversation in tokens; 0 is the model's window."""
    kv_cache_bytes: int = Field(0, ge=0)
    """Bytes of the KV cache; 0 is 2 GiB on a CPU and what vLLM finds free on a GPU."""
    block_size: int = Field(0, ge=0)
    """Tokens of a KV block; 0 is 32 on a CPU (the smallest that works there), vLLM's own on a GPU.
    Cartridges of a multiple of it are shared whole."""
    max_num_seqs: int = Field(64, ge=1)
    """Requests that decode together."""
    max_topk: int = Field(20, ge=0)
    """Most logprobs a request may ask for at a token."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs one model is split over; each loads its KV heads of a cartridge."""
    spool_dir: str | None = None
    """Where cartridges are written for the workers to read; None is a temporary directory. Workers on
    several machines need one that they share."""
    spool_bytes: int = Field(8 << 30, ge=1)
    """Bytes of spooled cartridges kept; the least recently used go first."""


class ReplicaSettings(Settings):
    min_replicas: int = Field(1, ge=0)
    """0 lets an idle deployment sleep; its next request waits for a replica to start."""
    max_replicas: int = Field(1, ge=1)
    target_ongoing: float = Field(8, gt=0)
    """Requests in flight per replica that autoscaling aims at."""
    idle_s: float = Field(60, ge=0)
    """Seconds of less load before a replica goes."""


class ServeSettings(Settings):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    engine: EngineName = "auto"
    """auto takes vLLM where it is installed."""
    cartridges: tuple[str, ...] = ()
    """Names (`name[@version|@alias]`) loaded at start; empty offers the whole registry."""
    keys_file: str | None = None
    """API keys (`cartridges keys add`). None: no keys, and only this machine is answered."""
    open_to_network: bool = False
    """Without keys, answer the network too: for a gateway in front that asks for its own."""
    audit_log: str | None = None
    """File to which every request adds a JSON line: who, what, how much, never a prompt or an answer."""
    max_tokens_limit: int = Field(2048, ge=1)
    max_queue: int = Field(128, ge=1)
    """Requests in flight beyond which the service answers 429."""
    shared: ReplicaSettings = ReplicaSettings()
    """Replicas that serve every cartridge without replicas of its own."""
    dedicated: dict[str, ReplicaSettings] = {}
    """Cartridges with replicas of their own, by name; can be changed while the service runs."""
    max_active: int = Field(16, ge=1)
    """Requests a transformers replica decodes at once; the others wait their turn."""
    default_temperature: float = Field(0.0, ge=0, le=2)
    """For requests that give none: 0, because a cartridge is asked for facts (OpenAI's own is 1)."""
    full_context: bool = True
    """Answer `full_context: true` with the corpus in the prompt, where the registry keeps its text. It
    costs a prefill of up to the whole window."""
    search_at_start: bool = False
    """Read all texts as soon as the service starts, and make the index over all of them (a key that may use only some
    has one of its own, made at its first request); else the first `auto` request waits for that."""
    fallback_entropy: float = Field(0.5, ge=0)
    """Requests with `fallback` are answered from the corpus' text when the mean entropy of the cartridge's
    first tokens is above this (nats a token). Set for the default model; docs/serving.md has what was measured."""
    fallback_tokens: int = Field(8, ge=1)
    """How many first tokens that is. They are held back until it is known who answers."""
    retrieval_tokens: int = Field(256, ge=192)
    """Tokens of retrieved passages that such an answer is given from."""
    resident_bytes: int = Field(2 << 30, ge=1)
    """Bytes that loaded cartridges may take in a replica; the least recently used go first."""
    max_body_bytes: int = Field(4 << 20, ge=1024)
    """Longest request body; a longer one is answered with 413."""
    request_timeout_s: float = Field(600, gt=0)
    """Seconds after which an unfinished request is ended with an error."""
    drain_s: float = Field(10, ge=0)
    """Seconds that running requests have to finish when the service is stopped."""


class CurriculumSettings(Settings):
    rounds: int = Field(1, ge=1)
    """Most rounds of synthesis and training; 1 is a plain build. Every further one plans as many
    conversations again, more of them on the chunks that the cartridge has learned least, and trains on."""
    sharpness: float = Field(1.0, ge=0)
    """A chunk's share of the next round's conversations grows with its remaining KL to this power."""
    min_gain: float = 0.01
    """Nats a token by which a round must lower the NLL of the held-out questions, or it is the last and
    its cartridge is not taken."""


class CohortSettings(Settings):
    """One cartridge for each corpus of a collection (`build --each`)."""

    active: int = Field(8, ge=1)
    """Cartridges trained at once; the others wait, and have no optimiser state."""
    acquainted: bool = False
    """Each is trained with the others of its wave loaded beside it in some packs (`train.distractor_share`,
    `train.max_distractors`), so that several can be loaded together."""
    compression: float = Field(0, ge=0)
    """Corpus tokens to a slot: sizes each cartridge by its corpus, in steps of 32 slots. 0: `train.num_tokens` for
    all."""


class BuildSettings(Settings):
    model: ModelSettings = ModelSettings()
    corpus: CorpusSettings = CorpusSettings()
    synthesize: SynthesizeSettings = SynthesizeSettings()
    train: TrainSettings = TrainSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    cohort: CohortSettings = CohortSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    serve: ServeSettings = ServeSettings()
    vllm: VllmSettings = VllmSettings()
    budget: str | None = None
    """How much to do: wall-clock for synthesis and training together, such as `90s`, `10m`, `2h`; or planned
    conversations (`2000conversations`); or tokens of the conversations that are kept (`500000tokens`)."""
    seed: int = 0
