"""A vLLM KV connector that loads a cartridge's `p` slots instead of computing them.

vLLM creates it in the scheduler and in every worker. The request's prompt starts with `p` placeholder ids; the
scheduler side reports that their KV exists elsewhere, and the worker side writes the cartridge's keys (after RoPE,
as in any KV cache) and values into the blocks. From then on they are ordinary prefix-cache blocks: shared, evicted,
loaded again.

Writes go through the attention layer's own cache update, so no layout is assumed. What has run on a CPU and on a GPU,
docs/vllm.md tells.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from cartridges.engines.spool import SpoolError, check_spooled, spool_file

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class Load:
    """Slots `[start, end)` of the cartridge file `content`, to be written to `blocks`, the request's block ids."""

    content: str
    start: int
    end: int
    blocks: tuple[int, ...]


@dataclass
class Loads(KVConnectorMetadata):
    """The loads of one step, sent by the scheduler to the workers."""

    loads: list[Load] = field(default_factory=list)


class CartridgeConnector(KVConnectorBase_V1):
    """Reads a request's `kv_transfer_params = {"cartridge": <sha256>, "num_tokens": p}`.

    Its configuration is `kv_connector_extra_config = {"spool": <directory>}`. Any `p` is served exactly. If `p` is a
    multiple of the block size, requests share all blocks; otherwise the last block is loaded for each request.
    """

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config):
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = _refuse_unsuitable(vllm_config, kv_cache_config)
        self._root = Path(vllm_config.kv_transfer_config.kv_connector_extra_config["spool"])
        self._pending: list[Load] = []
        self._failed: set[int] = set()
        self._layer_names: list[str] = []
        self._files = CartridgeFiles(self._root)

    # Scheduler side.

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        """Number of tokens beyond the local prefix cache that can be loaded now. No side effects."""
        _, num_tokens = _cartridge(request)
        return max(0, min(num_tokens, request.num_tokens - 1) - num_computed_tokens), False

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        if num_external_tokens == 0:
            return
        content, num_tokens = _cartridge(request)
        end = min(num_tokens, request.num_tokens - 1)
        (block_ids,) = blocks.get_block_ids()
        self._pending.append(Load(content, end - num_external_tokens, end, tuple(block_ids)))

    def build_connector_meta(self, scheduler_output) -> Loads:
        loads, self._pending = self._pending, []
        return Loads(loads)

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._layer_names = list(kv_caches)

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        """Copy the slots before the forward pass; 128 tokens of a 135M model take 4-8 ms."""
        for load in self._get_connector_metadata().loads:
            first, last = load.start // self._block_size, (load.end - 1) // self._block_size
            try:
                self._copy(load, forward_context.no_compile_layers)
            except (OSError, SafetensorError, SpoolError) as error:
                # Reported instead of raised: vLLM then fails only the requests that use these blocks.
                logger.error("cartridge %s could not be loaded: %s", load.content, error)
                self._failed.update(load.blocks[first: last + 1])

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def _copy(self, load: Load, layers: dict[str, Any]) -> None:
        positions = torch.arange(load.start, load.end)
        blocks = torch.tensor(load.blocks)
        slots = blocks[positions // self._block_size] * self._block_size + positions % self._block_size
        tensors = self._files.read(load, self._heads())
        for name in self._layer_names:
            layer = layers[name]
            place = {"device": layer.kv_cache.device, "dtype": self._vllm_config.model_config.dtype}
            # [heads, n, head_dim] -> [n, heads, head_dim]
            key, value = (tensor[extract_layer_index(name)].transpose(0, 1).to(**place).contiguous()
                          for tensor in tensors)
            layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots.to(layer.kv_cache.device))

    def _heads(self) -> slice:
        """The KV heads of this tensor-parallel rank (replicated if there are fewer heads than ranks)."""
        config = self._vllm_config
        return rank_heads(config.model_config.get_total_num_kv_heads(),
                          config.parallel_config.tensor_parallel_size, get_tensor_model_parallel_rank())


class CartridgeFiles:
    """Reads spooled cartridges. Each file's bytes are checked once, and again after a change."""

    def __init__(self, root: Path):
        self.root = root
        self._checked: dict[str, tuple[int, int, int]] = {}

    def read(self, load: Load, heads: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[num_layers, heads, end - start, head_dim]`. Raises `SpoolError` or `OSError`."""
        path = spool_file(self.root, load.content)
        stat = path.stat()
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._checked.get(load.content) != stamp:
            check_spooled(self.root, load.content)
            self._checked[load.content] = stamp
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name)[:, heads, load.start: load.end] for name in ("keys", "values"))


def rank_heads(num_heads: int, num_ranks: int, rank: int) -> slice:
    """The KV heads, of `num_heads`, on tensor-parallel `rank` of `num_ranks`, as vLLM splits them."""
    if num_heads >= num_ranks:
        share = num_heads // num_ranks
        return slice(rank * share, (rank + 1) * share)
    head = rank // (num_ranks // num_heads)
    return slice(head, head + 1)


def _cartridge(request) -> tuple[str, int]:
    params = request.kv_transfer_params
    return (params["cartridge"], params["num_tokens"]) if params else ("", 0)


def _refuse_unsuitable(vllm_config, kv_cache_config) -> int:
    """The block size. Raises `ValueError` if a cache slot is not plainly one token's keys and values."""
    groups = kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    # type(), not isinstance(): compressed caches (MLA) are subclasses.
    if len(specs) != 1 or type(specs[0]) is not FullAttentionSpec or specs[0].sliding_window is not None:
        raise ValueError("cartridges need a model with full attention in every layer; this one's KV cache is "
                         f"{', '.join(type(spec).__name__ for spec in specs)}")
    if vllm_config.cache_config.cache_dtype != "auto":
        raise ValueError(f"cartridges are not written to a {vllm_config.cache_config.cache_dtype} KV cache; "
                         "use kv_cache_dtype=auto")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise ValueError("cartridges do not support decode context parallelism")
    return specs[0].block_size
