"""Translates our requests to vLLM's prompts and parameters, and its outputs to our records.

Only this module writes placeholders, `cache_salt` and `kv_transfer_params`, because they must agree. A salt
without parameters, or a forward pass over placeholders, would silently put garbage into the prefix cache that
later requests with the cartridge read.
"""

import hashlib
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cartridges.engines.answer import cut_at_stop, stop_token_ids
from cartridges.engines.base import (
    CartridgePrefix,
    Completion,
    Prefix,
    Request,
    Score,
    ScoreRequest,
)
from cartridges.engines.prefix_cache import prefix_ids
from cartridges.errors import UserError
from cartridges.models import kv_shape, load_config, load_tokenizer
from cartridges.template import ChatTemplate


@dataclass(frozen=True)
class Prompt:
    """`prefix_tokens` ids of the prefix, followed by the conversation.

    For a cartridge the prefix ids are placeholders and `content` is the hash of the spooled file; for text
    `content` is None. Prompts share prefix-cache blocks only under the same `salt`.
    """

    token_ids: tuple[int, ...]
    prefix_tokens: int
    salt: str | None
    content: str | None

    def to_vllm(self) -> dict[str, Any]:
        prompt = {"prompt_token_ids": list(self.token_ids)}
        return prompt | ({"cache_salt": self.salt} if self.salt else {})

    def extra_args(self) -> dict[str, Any] | None:
        if self.content is None:
            return None
        return {"kv_transfer_params": {"cartridge": self.content, "num_tokens": self.prefix_tokens}}

    def alone(self) -> "Prompt":
        """The same prompt under a unique salt, so that none of it is in the cache."""
        return replace(self, salt=f"{self.salt or 'text'}-{uuid.uuid4().hex}")


class Translator:
    """Translates requests for the model in `model_dir`, with a context window of `window` tokens (0: the model's)
    and at most `max_topk` logprobs per token."""

    def __init__(self, model_dir: str | Path, window: int = 0, max_topk: int = 20):
        directory = Path(model_dir)
        config = load_config(directory)
        self.tokenizer = load_tokenizer(directory)
        self.template = ChatTemplate(self.tokenizer)
        self.shape = kv_shape(config)
        self.window = window or config.max_position_embeddings
        self.max_topk = max_topk
        self.stop_ids = stop_token_ids(_generation_config(directory, config), self.tokenizer)
        # Any id of the vocabulary works: its KV is never computed.
        self._placeholder = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0

    def prompt(self, prefix: Prefix, input_ids: tuple[int, ...], content: str | None, tenant: str = "",
               purpose: str = "") -> Prompt:
        """`content` is the hash of a `CartridgePrefix`'s spooled file. Tenants never share cached blocks."""
        if not input_ids:
            raise UserError("the prompt has no tokens; send at least one")
        ids = self._prefix_ids(prefix)
        parts = [part for part in (content, _tenant_salt(tenant), purpose if content else "") if part]
        return Prompt((*ids, *input_ids), len(ids), "-".join(parts) or None, content)

    def _prefix_ids(self, prefix: Prefix) -> list[int]:
        if isinstance(prefix, CartridgePrefix):
            if prefix.cartridge.shape != self.shape:
                raise UserError(f"cartridge {prefix.digest[:16]} is {prefix.cartridge.shape}, the model "
                                f"needs {self.shape}; serve it with the model it was built for")
            return [self._placeholder] * prefix.cartridge.num_tokens
        return prefix_ids(self.template, prefix)

    def check_limits(self, prompt: Prompt, answer_tokens: int, topk: int) -> None:
        if topk > self.max_topk:
            raise UserError(f"{topk} logprobs per token exceed this engine's maximum of {self.max_topk}; ask for "
                            "fewer")
        given = len(prompt.token_ids) - prompt.prefix_tokens
        if len(prompt.token_ids) + answer_tokens > self.window:
            raise UserError(f"prefix ({prompt.prefix_tokens}), prompt ({given}) and answer ({answer_tokens}) "
                            f"exceed the model's window of {self.window} tokens")

    def generation(self, request: Request, prompt: Prompt, **kwargs):
        """`SamplingParams` that generate `request`. Logprobs are the engine's raw ones, at T=1."""
        from vllm import SamplingParams

        self.check_limits(prompt, request.max_tokens, request.topk)
        params = SamplingParams(
            max_tokens=request.max_tokens, temperature=request.temperature, top_p=request.top_p,
            seed=request.seed if request.temperature > 0 else None,
            stop_token_ids=[] if request.ignore_end else sorted(self.stop_ids), ignore_eos=request.ignore_end,
            logprobs=request.topk, flat_logprobs=True, extra_args=prompt.extra_args(), **kwargs)
        return guarded(prompt, params)

    def scoring(self, request: ScoreRequest, prompt: Prompt):
        """`SamplingParams` that score a given conversation in one prefill."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.check_limits(prompt, 1, request.topk)
        # False, not None: None turns the cache off, and the placeholders would be computed as text.
        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=request.topk, flat_logprobs=True, detokenize=False,
            skip_reading_prefix_cache=False, extra_args=prompt.extra_args(),
            output_kind=RequestOutputKind.FINAL_ONLY)
        return guarded(prompt, params)

    def completion(self, request: Request, output) -> Completion:
        """`output` is vLLM's `CompletionOutput` of a finished request."""
        ids = tuple(output.token_ids)
        text = cut_at_stop(self.tokenizer.decode(ids, skip_special_tokens=True), request.stop)
        chosen, top_ids, top_logprobs = rows(output.logprobs, range(len(ids)), request.topk)
        return Completion(ids, text, output.finish_reason, chosen, top_ids, top_logprobs)

    def score(self, request: ScoreRequest, prompt: Prompt, prompt_logprobs) -> Score:
        # Counted from the end, because cached tokens may have no rows at the front.
        back = len(prompt_logprobs) - len(prompt.token_ids) + prompt.prefix_tokens
        at = [back + position + 1 for position in loss_positions(request)]
        return Score(*rows(prompt_logprobs, at, request.topk))


def guarded(prompt: Prompt, params):
    """`params`. Raises `ValueError` if they would compute placeholders as if they were text."""
    sent = (params.extra_args or {}).get("kv_transfer_params")
    if prompt.content is None:
        if sent is not None:
            raise ValueError("kv_transfer_params without a cartridge")
        return params
    salted = (prompt.salt or "").startswith(prompt.content)
    if not salted or sent != prompt.extra_args()["kv_transfer_params"]:
        raise ValueError("a cartridge's placeholders need its kv_transfer_params and its salt")
    if params.skip_reading_prefix_cache or params.prompt_logprob_token_ids is not None:
        raise ValueError("prompt logprobs and skip_reading_prefix_cache would compute a cartridge's "
                         "placeholders as text and spoil it for later requests")
    return params


def loss_positions(request: ScoreRequest) -> list[int]:
    return [position for position, wanted in enumerate(request.loss_mask) if wanted]


def rows(flat, at, topk: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Logprobs of the chosen tokens `[n]`, and top-k ids and logprobs `[n, topk]`, at positions `at` of vLLM's
    `FlatLogprobs`.

    A position holds the chosen token, then the top k by falling probability. Where vLLM has merged outputs that
    were not fetched in time, a chosen token that is in the top k occurs only once.
    """
    starts = [flat.start_indices[position] for position in at]
    chosen = np.array([flat.logprobs[start] for start in starts], np.float32)
    if not topk:
        return chosen, None, None
    ranked = [_ranked(flat, start, flat.end_indices[position])[:topk]
              for start, position in zip(starts, at, strict=True)]
    ids = np.array([[token for token, _ in row] for row in ranked], np.int32)
    logprobs = np.array([[logprob for _, logprob in row] for row in ranked], np.float32)
    return chosen, ids.reshape(-1, topk), logprobs.reshape(-1, topk)


def _ranked(flat, start: int, end: int) -> list[tuple[int, float]]:
    """The distinct tokens of a position by falling logprob; ties keep vLLM's order."""
    distinct = dict(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True))
    return sorted(distinct.items(), key=lambda item: -item[1])


def _tenant_salt(tenant: str) -> str:
    return f"tenant.{hashlib.sha256(tenant.encode()).hexdigest()[:16]}" if tenant else ""


def _generation_config(directory: Path, config):
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_model_config(config)
