"""Settings of the engines, for all stages that use one."""

from typing import Literal

from pydantic import Field

from cartridges.settings import Settings

Dtype = Literal["auto", "float32", "bfloat16"]
EngineName = Literal["auto", "transformers", "vllm"]


class VllmSettings(Settings):
    """The vLLM engine, for all stages that use it."""

    dtype: Dtype = "auto"
    """Compute and KV cache dtype. auto is `model.dtype`."""
    max_model_len: int = Field(0, ge=0)
    """Longest prefix and conversation together, in tokens. 0 is the model's window."""
    kv_cache_bytes: int = Field(0, ge=0)
    """Bytes of the KV cache. 0 is 2 GiB on a CPU, and vLLM's choice on a GPU."""
    gpu_memory_utilization: float = Field(0, ge=0, le=1)
    """Share of a GPU's memory that vLLM takes. 0 is vLLM's default (0.92); give less where something else, such as an
    asking model in the same actor, needs some."""
    block_size: int = Field(0, ge=0)
    """Tokens of a KV block. 0 is 32 on a CPU (the smallest that works there) and vLLM's default on a GPU.
    Cartridges with a multiple of this many tokens are shared completely between requests."""
    max_num_seqs: int = Field(64, ge=1)
    """Most requests decoded together."""
    enforce_eager: bool | None = None
    """Run without torch.compile and CUDA graphs: a start in seconds, slower decoding. None is true on a CPU, where
    compiling takes minutes and the result is not kept, and false on a GPU."""
    max_topk: int = Field(20, ge=0)
    """Most logprobs per token that a request may ask for."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs over which one model is split. Each loads its KV heads of a cartridge."""
    spool_dir: str | None = None
    """Directory through which workers read cartridges. None is a temporary directory. Workers on several machines
    need a shared one."""
    spool_bytes: int = Field(8 << 30, ge=1)
    """Most bytes of spooled cartridges. The least recently used are removed first."""
