"""Settings, one frozen class per stage. The string under a field documents it."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from cartridges.engine_config import Dtype, EngineName, VllmSettings
from cartridges.serve_config import ServeSettings
from cartridges.settings import Settings

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class ModelSettings(Settings):
    name: str = DEFAULT_MODEL
    """Hub id or local directory of a Llama- or Qwen3-type instruct model."""
    revision: str | None = None
    """Hub revision. None is the hub's default branch."""
    dtype: Dtype = "auto"
    """Compute dtype. auto is bfloat16 on a GPU and on CPUs with AMX or AVX-512 bfloat16, float32 on other CPUs."""


class CorpusSettings(Settings):
    corpus_id: str | None = None
    """Row of a JSONL corpus, or a shell pattern (`services/*`) that joins several rows in file order."""
    keep_text: bool = True
    """Publish the corpus' text beside the cartridge, so that a service can answer with full context.
    Set it to false for a private corpus; then the registry holds only the cartridge."""


class ChunkSettings(Settings):
    max_tokens: int = Field(256, ge=16)
    """Longest chunk in tokens. It is short, because a small teacher answers correctly only from a short text, and
    long enough that most tables stay with their header."""


Filter = Literal["empty", "malformed", "refers_to_text", "answer_in_question", "teacher_disagrees",
                 "low_information_gain", "truncated", "round_trip", "ungrounded", "ungrounded_name", "duplicate",
                 "near_duplicate"]
"""Filters, named by the reason for which they drop a conversation."""


class AskingSettings(Settings):
    """The model that asks, if it is not the one that answers: at most one of `model` and `endpoint`."""

    model: ModelSettings | None = None
    """Another model, loaded by transformers beside the teacher in every actor."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible service, such as `https://host/v1`. Chunks of the corpus are sent there."""
    endpoint_model: str = ""
    """Name of the model at the service."""
    api_key_env: str = ""
    """Environment variable with the service's key, such as `OPENAI_API_KEY`. Empty sends no key."""
    concurrency: int = Field(8, ge=1)
    """Concurrent requests of one actor to the service."""

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
    """Conversations to plan before filtering. 0 derives the number from the corpus length and the budget."""
    families: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Share of the planned conversations for each seed family. Empty uses the default mixture."""
    topk: int = Field(20, ge=1)
    """Teacher log-probabilities stored per answer token (20 as in the paper)."""
    asking_temperature: float = Field(0.6, ge=0, allow_inf_nan=False)
    """Sampling temperature of the asking side (0.6 as in the paper)."""
    max_question_tokens: int = Field(48, ge=8)
    max_answer_tokens: int = Field(64, ge=1)
    """Longest answer that the teacher writes. Truncated answers are dropped and counted."""
    max_teacher_nll: float = Field(8.0, gt=0)
    """Known answers with a higher NLL under the teacher with the chunk (nats per token) are dropped, because the
    question does not ask for them. The limit is loose, because a clumsy question for a correct phrase teaches more
    than none (docs/log.md, coverage)."""
    min_information_gain: float | None = None
    """Answers that the chunk makes likelier by less than this (nats per token) are dropped. Null disables the
    filter and saves the closed-book pass."""
    drop_ungrounded: bool = True
    """Drop written answers with a number that is neither in the chunk nor in the question."""
    drop_ungrounded_names: bool = False
    """The same for names: capitalised words that do not start a sentence."""
    near_duplicate: float | None = Field(None, gt=0, le=1)
    """Jaccard similarity of word pairs in the last question and answer from which conversations are near duplicates.
    Only the first of them is kept. Null disables the filter."""
    filters_off: tuple[Filter, ...] = ()
    """Disabled filters, by the reasons that they give, such as `[duplicate, truncated]`."""
    general_share: float = Field(0.01, ge=0, lt=1)
    """Share of the planned conversations that are general requests, answered by the model without a chunk. They
    preserve the model's behaviour outside the corpus. Their answers are long: a share of 0.01 makes up 5 % of the
    loss. docs/log.md has the cost of larger shares."""
    asking: AskingSettings = AskingSettings()
    """Another model for the asking side. The teacher always answers and scores."""
    engine: EngineName = "auto"
    """auto is vLLM on a GPU if it is installed, else transformers (measurements in docs/log.md)."""
    num_actors: int = Field(0, ge=0)
    """Ray Data actors, each with one engine. 0 derives the number from the cluster when the run starts: one per GPU (or
    GPUs of an engine), or without GPUs one per node."""
    max_actors: int = Field(0, ge=0)
    """Most actors that Ray Data may start while there is work and room, for a cluster that grows. 0 is `num_actors`."""
    threads_per_actor: int = Field(0, ge=0)
    """CPU threads of an actor's engine. 0 divides a node's cores among the actors there."""
    batch_size: int = Field(128, ge=1)
    """Conversations that an actor processes at once, and the most that are lost when a worker is killed."""
    retries: int = Field(1, ge=0)
    """Number of times a conversation is retried, alone, after it or its batch raised."""
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
    """Peak learning rate. The default is 0.01, and 0.03 for plain Adam. The paper uses 0.02 for p <= 2048 at
    64k tokens per step; our steps are small (docs/log.md)."""
    key_lr_scale: float = Field(3.0, gt=0)
    """Factor on `lr` for keys, which are larger than values while the optimiser's steps are not."""
    warmup_share: float = Field(0.02, ge=0, le=1)
    final_lr_share: float = Field(0.02, ge=0, le=1)
    """Share of the peak at which linear decay ends."""
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = Field(0.5, gt=0)

    @property
    def peak_lr(self) -> float:
        return self.lr or {"orthogonal_adam": 0.01, "adam": 0.03}[self.name]


class TrainSettings(Settings):
    num_tokens: int = Field(256, ge=2)
    """p, the number of slots of the cartridge."""
    num_frozen_tokens: int = Field(1, ge=0)
    """Number of first slots that are not trained; slot 0 is the attention sink."""
    init: Literal["prefix", "sampled_chunks", "attention_matching", "unrelated", "random",
                  "cartridge"] = "attention_matching"
    """Initialisation: slots fitted to the attention to the corpus' KV, the KV of the corpus prefix, of sampled chunks
    or of unrelated text, random vectors, or an existing cartridge."""
    stretch_tokens: int = Field(512, ge=64)
    """`init=attention_matching` reads the corpus in separate parts of about this many tokens. A value as large as the
    corpus reads it at once, up to 8,192 tokens and the model's window."""
    init_cartridge: str | None = None
    """Directory of the cartridge from which `init=cartridge` continues."""
    loss: Literal["distillation", "next_token", "none"] = "distillation"
    """`next_token` is the baseline. `none` publishes the initialisation without training, as a draft."""
    trained_layers: float = Field(0.5, gt=0, le=1)
    """Share of the layers, from the top, whose slots are trained. Lower layers keep their initialisation, so
    `init=random` needs 1. Their outputs for a conversation are cached (docs/training.md): training half of the layers
    halved the time of a step."""
    distractors: tuple[str, ...] = ()
    """Directories of cartridges of other corpora, such as `<registry>/<name>/<version>`. In some packs they are loaded
    read-only beside the one in training, so that it still answers when others are loaded with it."""
    distractor_share: float = Field(0.25, ge=0, le=1)
    """Share of the packs that have distractors."""
    max_distractors: int = Field(3, ge=1)
    """Most distractors in one pack. Each resulting number of slots is another tensor shape."""
    label_share: float = Field(0.5, ge=0, le=1)
    """Share of the training target given to the next token if the answer is known from the text. The rest is the
    teacher's distribution."""
    optimizer: OptimizerSettings = OptimizerSettings()
    row_tokens: int = Field(128, ge=16)
    """Length of a row in tokens. Conversations are packed into rows; longer ones use rows of twice, four times, ...
    this length."""
    pack_tokens: int = Field(512, ge=64)
    """Tokens of one pack (a micro batch of fixed shape). The default is small, because on a CPU many small steps learn
    more in the same time; a GPU wants more, in fewer steps (docs/training.md)."""
    packs_per_step: int = Field(1, ge=1)
    steps: int = Field(0, ge=0)
    """Optimiser steps. 0 derives them from `epochs`."""
    epochs: float = Field(5.0, gt=0)
    num_workers: int = Field(1, ge=1)
    threads_per_worker: int = Field(0, ge=0)
    """CPU threads of a worker. 0 divides the machine's cores among the workers."""
    held_out: int = Field(0, ge=0)
    """Self-study questions held out from training, for evaluation. `build` holds out 64 if the user gives no
    questions."""

    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations by generation on the held-out questions. The cartridge that answers most of them is
    published. With 0 there are none, and the last cartridge is published."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage. 1 and 2 shard the optimiser state (with plain Adam). 3 shards the frozen base model over
    the workers, for a model larger than a GPU; example turns and lower layers are then computed again for each
    conversation."""
    gradient_checkpointing: bool = False
    """Recompute layers in the backward pass instead of storing their outputs: less memory, slower steps."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between resumable checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)


Arm = Literal["closed_book", "full_context", "truncated", "cartridge", "wrong_cartridge", "exact_kv"]


class EvaluateSettings(Settings):
    arms: tuple[Arm, ...] = ("closed_book", "full_context", "truncated", "cartridge",
                             "wrong_cartridge", "exact_kv")
    max_questions: int = Field(0, ge=0)
    """Most questions, drawn by seed if there are more. 0 asks all."""
    max_answer_tokens: int = Field(32, ge=1)
    bootstrap_samples: int = Field(2000, ge=100)
    composition_share: float = Field(0.8, ge=0, le=1)
    """Share of its accuracy gain over closed book that a cartridge must keep when others are loaded beside it."""
    wrong_cartridge: str | None = None
    """Registry name of the cartridge for the wrong_cartridge arm. None uses the bundled decoy: the exact KV of an
    unrelated text, cut to p tokens."""


class CurriculumSettings(Settings):
    rounds: int = Field(1, ge=1)
    """Most rounds of synthesis and training; 1 is a plain build. Each further round plans the same number of
    conversations, more of them on the chunks that the cartridge has learned least, and continues training."""
    sharpness: float = Field(1.0, ge=0)
    """Exponent on a chunk's remaining KL in its share of the next round's conversations."""
    min_gain: float = 0.01
    """Nats per token by which a round must lower the NLL of the held-out questions. A round that does not is the last,
    and its cartridge is discarded."""


class CohortSettings(Settings):
    """Building one cartridge for each corpus of a collection (`build --each`)."""

    active: int = Field(8, ge=1)
    """Cartridges trained at once (a wave). The others wait and need no optimiser state."""
    acquainted: bool = False
    """Train each cartridge with others of its wave loaded beside it in some packs (`train.distractor_share`,
    `train.max_distractors`), so that several can be served together."""
    compression: float = Field(0, ge=0)
    """Corpus tokens per slot, which sizes each cartridge by its corpus in steps of 32 slots. 0 uses `train.num_tokens`
    for all."""


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
    """How much to do: wall-clock time for synthesis and training together, such as `90s`, `10m`, `2h`; or planned
    conversations (`2000conversations`); or tokens of the kept conversations (`500000tokens`)."""
    seed: int = 0
