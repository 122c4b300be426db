"""Tiny random models, the real tokenizer and model, and the optional evaluation data."""

import os
import tempfile
from pathlib import Path

# Before anything imports wandb, ray or tokenizers: no network, nothing written outside the run.
_scratch = tempfile.TemporaryDirectory(prefix="cartridges-tests-", ignore_cleanup_errors=True)
for _name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
    os.environ.setdefault(_name, _scratch.name)
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        # Ten times the usual spread: attention that is nearly uniform would hide mistakes.
        "initializer_range": 0.2}


def make_tiny(kind: str = "llama", vocab_size: int = 320, tied: bool = True, seed: int = 0):
    """A frozen random float32 "llama" or "qwen3" model: 2 layers, 4 heads, 2 KV heads of 16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM),
                                 "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    config = config_class(**TINY, vocab_size=vocab_size, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model.float().eval().requires_grad_(False)


@pytest.fixture
def tiny_model():
    """Random Llama, vocabulary 320, tied head; no tokenizer."""
    return make_tiny("llama")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tiny_qwen3(request):
    """Random Qwen3 (it normalises queries and keys), tied and untied head."""
    return make_tiny("qwen3", tied=request.param)


@pytest.fixture(params=["llama", "llama-untied", "qwen3", "qwen3-untied"])
def any_tiny_model(request):
    """Each kind of model a cartridge must work with."""
    kind, _, untied = request.param.partition("-")
    return make_tiny(kind, tied=not untied)


@pytest.fixture(scope="session")
def base_model_dir() -> Path:
    """The real default model, downloaded once."""
    from cartridges.config import ModelSettings
    from cartridges.models import resolve_model_dir

    return resolve_model_dir(ModelSettings())


@pytest.fixture(scope="session")
def tiny_model_dir(base_model_dir, tmp_path_factory) -> Path:
    """A random tiny Llama on disk, with the real tokenizer and chat template (vocabulary 49152)."""
    from cartridges.models import load_tokenizer

    directory = tmp_path_factory.mktemp("tiny-llama")
    make_tiny("llama", vocab_size=49152).save_pretrained(directory)
    load_tokenizer(base_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen3_dir(base_model_dir, tmp_path_factory) -> Path:
    """As `tiny_model_dir`, of the Qwen3 type with an untied head."""
    from cartridges.models import load_tokenizer

    directory = tmp_path_factory.mktemp("tiny-qwen3")
    make_tiny("qwen3", vocab_size=49152, tied=False).save_pretrained(directory)
    load_tokenizer(base_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_vllm_dir(base_model_dir, tmp_path_factory) -> Path:
    """As `tiny_model_dir`, with a head_dim that vLLM's attention on a CPU has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cartridges.models import load_tokenizer

    directory = tmp_path_factory.mktemp("tiny-llama-32")
    config = LlamaConfig(vocab_size=49152, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.3,
                         max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    load_tokenizer(base_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_base_model(tiny_model_dir):
    """`tiny_model_dir` loaded as a float32 `BaseModel` on the CPU. Do not change it."""
    from cartridges.config import ModelSettings
    from cartridges.models import load_base_model

    return load_base_model(ModelSettings(name=str(tiny_model_dir), dtype="float32"), device="cpu")


@pytest.fixture(scope="module")
def one_ray():
    """One Ray for whatever a module's tests run in this process, where each command would start its own."""
    from workflows.runtime.local_ray import one_local_ray

    with one_local_ray():
        yield


@pytest.fixture(scope="module")
def base(tiny_model_dir):
    """A copy of the tiny model of its own, as a service loads it."""
    from tests.serve_support import load_stock

    return load_stock(tiny_model_dir)


@pytest.fixture(scope="module")
def engine(base):
    """The streaming engine of a service on `base`."""
    from cartridges.engines.stream import TransformersStreamingEngine

    engine = TransformersStreamingEngine(base)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def registry(base, tmp_path_factory):
    """A registry of the exact-KV cartridges of `serve_support.TEXTS`."""
    from tests.serve_support import make_registry

    return make_registry(base, tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="session")
def evaldata() -> Path:
    """Directory of evaluation corpora: `$CARTRIDGES_EVALDATA`, or beside the repository; else skip."""
    chosen = os.environ.get("CARTRIDGES_EVALDATA")
    directory = Path(chosen) if chosen else REPOSITORY.parent / "shared" / "evaldata"
    if not directory.is_dir():
        pytest.skip("no evaluation data (set CARTRIDGES_EVALDATA)")
    return directory
