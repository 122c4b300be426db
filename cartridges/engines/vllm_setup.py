"""vLLM's arguments and environment, derived from our settings."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cartridges.config import ModelSettings
from cartridges.engine_config import EngineName, VllmSettings
from cartridges.errors import UserError
from cartridges.models import choose_dtype
from cartridges.records import KVShape

INSTALL = "run `make vllm` (its CPU build), or on a GPU `.venv/bin/pip install -e '.[vllm]'`"


def is_installed() -> bool:
    return find_spec("vllm") is not None


def wants_vllm(engine: EngineName, where: str) -> bool:
    """Whether `engine`, the value of the setting `where`, selects vLLM. Raises `UserError` for a missing vLLM."""
    if engine == "vllm" and not is_installed():
        raise UserError(f"{where} is vllm, but vLLM is not installed; {INSTALL}")
    return engine == "vllm" or (engine == "auto" and is_installed())


def gpus_of_an_engine(settings: VllmSettings, engine: EngineName) -> int:
    """GPUs that one engine uses on a machine with GPUs."""
    return 1 if engine == "transformers" else settings.tensor_parallel_size


def for_model(settings: VllmSettings, model: ModelSettings) -> VllmSettings:
    """`settings`, with `auto` as dtype replaced by that of `model`."""
    return settings if settings.dtype != "auto" else settings.model_copy(update={"dtype": model.dtype})


def engine_arguments(model_dir: str | Path, settings: VllmSettings, shape: KVShape,
                     spool: str | Path) -> dict[str, Any]:
    """vLLM's arguments, including those that cartridges need: connector, prefix cache, T=1 logprobs.

    Raises `UserError` for a model that vLLM's CPU attention cannot run (it would fail at the first token).
    """
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    if cpu:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_head_sizes()
        if shape.head_dim not in sizes:
            raise UserError(f"vLLM has no attention on a CPU for head_dim {shape.head_dim} (it has "
                            f"{', '.join(map(str, sizes))}); use the transformers engine")
    dtype = choose_dtype(settings.dtype, "cpu" if cpu else "cuda")
    arguments = {
        "model": str(model_dir), "dtype": str(dtype).removeprefix("torch."), "trust_remote_code": False,
        "max_model_len": settings.max_model_len or None, "max_num_seqs": settings.max_num_seqs,
        "enable_prefix_caching": True, "logprobs_mode": "raw_logprobs", "max_logprobs": settings.max_topk,
        "generation_config": "vllm", "disable_log_stats": True,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": cpu if settings.enforce_eager is None else settings.enforce_eager,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (2 << 30 if cpu else None),
        "kv_transfer_config": {
            "kv_connector": "CartridgeConnector", "kv_role": "kv_both", "kv_load_failure_policy": "fail",
            "kv_connector_module_path": "cartridges.engines.vllm_connector",
            "kv_connector_extra_config": {"spool": str(spool)}},
    }
    chosen = {"block_size": settings.block_size or (32 if cpu else 0),
              "gpu_memory_utilization": settings.gpu_memory_utilization}
    return arguments | {name: value for name, value in chosen.items() if value}


def prepare(in_process: bool) -> None:
    """Set the environment variables that vLLM reads, unless the user has set them."""
    from torch.cuda import is_available as cuda_is_available

    if not is_installed():
        raise UserError(f"vLLM is not installed; {INSTALL}, or use the transformers engine")
    defaults = {
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout belongs to --json
        "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1",
        # Pinned threads are several times slower as soon as anything else runs on their cores.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # A fork after torch has used its threads can hang.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if in_process and not cuda_is_available():
        # Starts in seconds instead of a minute. (On a GPU a separate process avoids Python's lock.)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
