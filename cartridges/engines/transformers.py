"""The reference engine: a Hugging Face model on any machine, batching requests that share a prefix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from cartridges.attention import AttentionContext, OwnKV, install
from cartridges.engines.answer import stop_token_ids
from cartridges.engines.base import Completion, Request, Score, ScoreRequest
from cartridges.engines.batching import Piece, batches, decoding_pieces, pieces
from cartridges.engines.decoding import Decoding
from cartridges.engines.shared_prefix import SharedPrefixes, Trimmed, trim
from cartridges.forward import hidden_states, round_up, row_bias, stack_prefixes
from cartridges.models import BaseModel

ATTENTION_BUDGET = 1 << 26
"""Most attention weights of one layer at a time (elements): bounds memory when a prefix is long."""
PIECE_ROWS = 16
"""Most rows of one prefix that are padded to the same length when scoring: fewer waste less on padding."""
LOGITS_BUDGET = 512
"""Most positions whose full-vocabulary logits exist at a time."""
SLOTS_MULTIPLE = 16
"""Rows are padded to multiples of this many tokens."""


@dataclass(frozen=True)
class _Batch:
    """Rows of one forward pass: `input_ids` and `position_ids` `[B, slots]`, padded on the left.

    Row `r` computes request `indices[r]`. Only the rows in `real` count; the others repeat a request to fill the batch.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    context: AttentionContext
    indices: list[int]
    real: list[int]

    @property
    def slots(self) -> int:
        return self.input_ids.shape[1]


class TransformersEngine:
    """`Engine` over a frozen `BaseModel`.

    `max_rows`: most conversations decoded together. `cache_bytes`: most bytes of prefix KV kept for reuse.
    """

    def __init__(self, base: BaseModel, max_rows: int = 64, cache_bytes: int = 1 << 30):
        install(base.model)
        self.base = base
        self.max_rows = max_rows
        self.prefixes = SharedPrefixes(base, cache_bytes)
        self.head = base.model.get_output_embeddings()
        self.stop_ids = stop_token_ids(base.model.generation_config, base.tokenizer)
        self._prefix_tokens = 0

    def prefix_hit_share(self) -> float:
        """Share of all prefix tokens requested so far that came from the cache; 0 before the first request."""
        return max(0.0, 1 - self.prefixes.computed_tokens / self._prefix_tokens) if self._prefix_tokens else 0.0

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        trimmed = trim(requests, [len(request.input_ids) - 1 for request in requests])
        parts = decoding_pieces([one.key for one in trimmed], [len(one.input_ids) for one in trimmed], self.max_rows)
        completions = {index: completion for batch in batches(parts, self.max_rows)
                       for index, completion in self._generate_batch(requests, trimmed, batch)}
        return [completions[index] for index in range(len(requests))]

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        trimmed = trim(requests, [_first_loss(request) for request in requests])
        max_rows = self._max_scored_rows(trimmed)
        parts = pieces([one.key for one in trimmed], [len(one.input_ids) for one in trimmed],
                       min(max_rows, PIECE_ROWS))
        scores = {index: score for batch in batches(parts, max_rows)
                  for index, score in self._score_batch(requests, trimmed, batch)}
        return [scores[index] for index in range(len(requests))]

    def _max_scored_rows(self, trimmed: list[Trimmed]) -> int:
        """Rows, a power of two, that keep the attention weights of the longest request within the budget."""
        if not trimmed:
            return self.max_rows
        longest = max(len(one.input_ids) for one in trimmed)
        slots = max(self.prefixes.get(one).num_tokens for one in {one.key: one for one in trimmed}.values())
        heads = self.base.model.config.num_attention_heads
        fitting = ATTENTION_BUDGET // (heads * longest * (slots + longest))
        return max(1, min(self.max_rows, 1 << max(0, fitting.bit_length() - 1)))

    def _batch(self, trimmed: list[Trimmed], parts: list[Piece]) -> _Batch:
        """Idle rows repeat the piece's first request, so that every row is a real computation."""
        prefixes = [self.prefixes.get(trimmed[piece.indices[0]]) for piece in parts]
        indices, real, offsets = [], [], []
        for piece, prefix in zip(parts, prefixes, strict=True):
            real += range(len(indices), len(indices) + len(piece.indices))
            indices += [*piece.indices, *[piece.indices[0]] * (piece.rows - len(piece.indices))]
            offsets += [prefix.num_tokens] * piece.rows
            self._prefix_tokens += prefix.num_tokens * len(piece.indices)
        device, slots = self.base.device, round_up(max(piece.longest for piece in parts), SLOTS_MULTIPLE)
        lengths = [len(trimmed[index].input_ids) for index in indices]
        input_ids = torch.zeros(len(indices), slots, dtype=torch.long, device=device)
        for row, index in enumerate(indices):
            input_ids[row, slots - lengths[row]:] = torch.as_tensor(trimmed[index].input_ids, device=device)
        starts = torch.as_tensor([offset + length - slots for offset, length in zip(offsets, lengths, strict=True)])
        position_ids = (starts[:, None] + torch.arange(slots)[None]).clamp(min=0).to(device)
        context = stack_prefixes(prefixes)
        context.own_bias = row_bias(lengths, slots, self.base.dtype, device)
        return _Batch(input_ids, position_ids, context, indices, real)

    def _score_batch(self, requests: Sequence[ScoreRequest], trimmed: list[Trimmed],
                     parts: list[Piece]) -> Iterator[tuple[int, Score]]:
        batch = self._batch(trimmed, parts)
        hidden = hidden_states(self.base.model, batch.input_ids, batch.position_ids, batch.context)
        for row in batch.real:
            request = requests[batch.indices[row]]
            positions = torch.as_tensor(request.loss_mask).nonzero()[:, 0]
            targets = torch.as_tensor(request.input_ids)[positions + 1].to(hidden.device)
            # Counted from the end, positions are the same in the trimmed row, which is padded on the left.
            at = (batch.slots - len(request.input_ids) + positions).to(hidden.device)
            yield batch.indices[row], self._score(hidden[row, at], targets, request.topk)

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, topk: int) -> Score:
        """Logprobs of `targets` `[m]` after `hidden` `[m, hidden]`, and the top-k rows."""
        chosen, top_ids, top_logprobs = [], [], []
        for rows, wanted in zip(hidden.split(LOGITS_BUDGET), targets.split(LOGITS_BUDGET), strict=True):
            logprobs = self._logprobs(rows)
            chosen.append(logprobs.gather(1, wanted[:, None])[:, 0].cpu().numpy())
            if topk:
                top = logprobs.topk(topk, dim=-1)
                top_ids.append(top.indices.cpu().numpy().astype(np.int32))
                top_logprobs.append(top.values.cpu().numpy())
        if not topk:
            return Score(np.concatenate(chosen))
        return Score(np.concatenate(chosen), np.concatenate(top_ids), np.concatenate(top_logprobs))

    def _generate_batch(self, requests: Sequence[Request], trimmed: list[Trimmed],
                        parts: list[Piece]) -> Iterator[tuple[int, Completion]]:
        batch = self._batch(trimmed, parts)
        decoding = Decoding([requests[index] for index in batch.indices], self.base.tokenizer, self.stop_ids)
        self._decode(batch, decoding)
        for row in batch.real:
            yield batch.indices[row], decoding.completion(row)

    def _decode(self, batch: _Batch, decoding: Decoding) -> None:
        """Prefill, then one token a row and step until every row is done."""
        context, cursor = batch.context, batch.slots
        room = round_up(max(request.max_tokens for request in decoding.requests), SLOTS_MULTIPLE)
        context.own = self._own_kv(len(batch.indices), batch.slots + room)
        context.own_bias = functional.pad(context.own_bias, (0, room), value=float("-inf"))
        hidden = hidden_states(self.base.model, batch.input_ids, batch.position_ids, context)[:, -1]
        step_bias = context.own_bias[:, -1:].clone()
        position_ids = batch.position_ids[:, -1:]
        while (tokens := decoding.step(self._logprobs(hidden))) is not None:
            context.own.cursor = cursor
            step_bias[:, :, cursor] = 0
            context.own_bias = step_bias
            position_ids = position_ids + 1
            hidden = hidden_states(self.base.model, tokens[:, None], position_ids, context)[:, -1]
            cursor += 1

    def _logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden).float().log_softmax(-1)

    def _own_kv(self, rows: int, slots: int) -> OwnKV:
        shape = self.base.shape
        size = (rows, shape.num_key_value_heads, slots, shape.head_dim)
        keys, values = ([torch.zeros(size, dtype=self.base.dtype, device=self.base.device)
                         for _ in range(shape.num_layers)] for _ in range(2))
        return OwnKV(keys, values)


def _first_loss(request: ScoreRequest) -> int:
    """Tokens before the first predicting position."""
    return request.loss_mask.index(True) if True in request.loss_mask else len(request.input_ids) - 1
