"""The reference engine: a Hugging Face model, any machine, batches of shared prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cartridges.attention import OwnKV, install
from cartridges.engines.base import Completion, Request, Score, ScoreRequest
from cartridges.engines.batching import Piece, batches, decoding_pieces, pieces
from cartridges.engines.decoding import Decoding, stop_token_ids
from cartridges.engines.shared_prefix import SharedPrefixes, Trimmed, trim
from cartridges.forward import hidden_states, round_up, row_bias, stack_prefixes
from cartridges.models import BaseModel

ATTENTION_BUDGET = 1 << 26
"""Most attention weights of one layer at a time (elements): bounds memory when a prefix is long."""
PIECE_ROWS = 16
"""Most rows of one prefix that are padded to the same length when scoring: fewer waste less on padding."""
LOGITS_BUDGET = 512
"""Most positions whose full-vocabulary logits exist at a time."""


class TransformersEngine:
    """`Engine` over a frozen `BaseModel`.

    `max_rows`: conversations decoded together. `cache_bytes`: KV of prefixes kept for reuse.
    """

    def __init__(self, base: BaseModel, max_rows: int = 64, cache_bytes: int = 1 << 30):
        install(base.model)
        self.base = base
        self.max_rows = max_rows
        self.prefixes = SharedPrefixes(base, cache_bytes)
        self.head = base.model.get_output_embeddings()
        self.stop_ids = stop_token_ids(base)
        self._prefix_tokens = 0

    def prefix_hit_share(self) -> float:
        """Of all tokens of prefixes that requests stood behind so far, the share that was not computed for them;
        0 before any."""
        return max(0.0, 1 - self.prefixes.computed_tokens / self._prefix_tokens) if self._prefix_tokens else 0.0

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        results: dict[int, Completion] = {}
        rows = trim(requests, [len(request.input_ids) - 1 for request in requests])
        parts = decoding_pieces([row.key for row in rows], [len(row.input_ids) for row in rows], self.max_rows)
        for batch in batches(parts, self.max_rows):
            for index, completion in self._generate_batch(requests, rows, batch):
                results[index] = completion
        return [results[index] for index in range(len(requests))]

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        results: dict[int, Score] = {}
        rows = trim(requests, [_first_loss(request) for request in requests])
        most = self._score_rows(rows)
        parts = pieces([row.key for row in rows], [len(row.input_ids) for row in rows], min(most, PIECE_ROWS))
        for batch in batches(parts, most):
            for index, score in self._score_batch(requests, rows, batch):
                results[index] = score
        return [results[index] for index in range(len(requests))]

    def _score_rows(self, rows: list["Trimmed"]) -> int:
        """Rows that keep the attention weights of the longest request within the budget."""
        if not rows:
            return self.max_rows
        longest = max(len(row.input_ids) for row in rows)
        slots = max(self.prefixes.get(row).num_tokens for row in {row.key: row for row in rows}.values())
        heads = self.base.model.config.num_attention_heads
        rows = ATTENTION_BUDGET // (heads * longest * (slots + longest))
        return max(1, min(self.max_rows, 1 << max(0, rows.bit_length() - 1)))

    def _rows(self, requests, batch: list[Piece], slots: int):
        """Tensors of a batch: ids and positions `[B, slots]`, padded on the left, and its context.

        Idle rows repeat the piece's first request, so that every row is a real computation.
        """
        prefixes = [self.prefixes.get(requests[piece.indices[0]]) for piece in batch]
        context = stack_prefixes(prefixes)
        indices, lengths, offsets = [], [], []
        for piece, prefix in zip(batch, prefixes, strict=True):
            rows = list(piece.indices) + [piece.indices[0]] * (piece.rows - len(piece.indices))
            indices += rows
            lengths += [len(requests[index].input_ids) for index in rows]
            offsets += [prefix.num_tokens] * piece.rows
            self._prefix_tokens += prefix.num_tokens * len(piece.indices)
        device = self.base.device
        ids = torch.zeros(len(indices), slots, dtype=torch.long, device=device)
        for row, index in enumerate(indices):
            ids[row, slots - lengths[row]:] = torch.as_tensor(requests[index].input_ids, device=device)
        starts = torch.as_tensor([offset + length - slots for offset, length in zip(offsets, lengths)])
        positions = (starts[:, None] + torch.arange(slots)[None]).clamp(min=0).to(device)
        context.own_bias = row_bias(lengths, slots, self.base.dtype, device)
        real = [row for piece_start, piece in _starts(batch) for row in
                range(piece_start, piece_start + len(piece.indices))]
        return _Rows(ids, positions, context, indices, lengths, real)

    def _score_batch(self, requests, trimmed, batch):
        slots = round_up(max(piece.longest for piece in batch), 16)
        rows = self._rows(trimmed, batch, slots)
        hidden = hidden_states(self.base.model, rows.ids, rows.positions, rows.context)
        for row in rows.real:
            request = requests[rows.indices[row]]
            # Positions from the end hold for the trimmed row, which is padded on the left, as well.
            positions = torch.as_tensor(request.loss_mask).nonzero()[:, 0]
            targets = torch.as_tensor(request.input_ids)[positions + 1].to(hidden.device)
            at = hidden[row, (slots - len(request.input_ids) + positions).to(hidden.device)]
            yield rows.indices[row], self._score_rows_of(at, targets, request.topk)

    def _score_rows_of(self, hidden, targets, topk: int) -> Score:
        chosen, top_ids, top_logprobs = [], [], []
        for start in range(0, len(targets), LOGITS_BUDGET):
            logprobs = self.head(hidden[start:start + LOGITS_BUDGET]).float().log_softmax(-1)
            chosen.append(logprobs.gather(1, targets[start:start + LOGITS_BUDGET, None])[:, 0])
            if topk:
                top = logprobs.topk(topk, dim=-1)
                top_ids.append(top.indices)
                top_logprobs.append(top.values)
        logprobs = torch.cat(chosen).cpu().numpy() if chosen else np.zeros(0, np.float32)
        if not topk:
            return Score(logprobs)
        if not chosen:
            return Score(logprobs, np.zeros((0, topk), np.int32), np.zeros((0, topk), np.float32))
        return Score(logprobs, torch.cat(top_ids).cpu().numpy().astype(np.int32),
                     torch.cat(top_logprobs).cpu().numpy())

    def _generate_batch(self, requests, trimmed, batch):
        slots = round_up(max(piece.longest for piece in batch), 16)
        rows = self._rows(trimmed, batch, slots)
        decoding = Decoding([requests[index] for index in rows.indices], self.base.tokenizer,
                             self.stop_ids)
        context, own_bias = rows.context, rows.context.own_bias
        room = round_up(max(r.max_tokens for r in decoding.requests), 16)
        context.own = self._buffers(len(rows.indices), slots + room)
        closed = own_bias.new_full((*own_bias.shape[:2], room), float("-inf"))
        context.own_bias = torch.cat([own_bias, closed], dim=2)
        hidden = hidden_states(self.base.model, rows.ids, rows.positions, context)[:, -1]
        step_bias = context.own_bias[:, -1:].clone()
        position = rows.positions[:, -1:]
        cursor = slots
        while True:
            tokens = decoding.step(self.head(hidden).float().log_softmax(-1))
            if tokens is None:
                break
            context.own.cursor = cursor
            step_bias[:, :, cursor] = 0
            context.own_bias = step_bias
            position = position + 1
            hidden = hidden_states(self.base.model, tokens[:, None], position, context)[:, -1]
            cursor += 1
        for row in rows.real:
            yield rows.indices[row], decoding.completion(row)

    def _buffers(self, rows: int, slots: int) -> OwnKV:
        shape = self.base.shape
        size = (rows, shape.num_key_value_heads, slots, shape.head_dim)
        make = lambda: [torch.zeros(size, dtype=self.base.dtype, device=self.base.device)  # noqa: E731
                        for _ in range(shape.num_layers)]
        return OwnKV(make(), make())


@dataclass
class _Rows:
    ids: torch.Tensor
    positions: torch.Tensor
    context: object
    indices: list[int]
    lengths: list[int]
    real: list[int]


def _starts(batch: list[Piece]):
    start = 0
    for piece in batch:
        yield start, piece
        start += piece.rows


def _first_loss(request: ScoreRequest) -> int:
    """Tokens before the first predicting position."""
    return request.loss_mask.index(True) if True in request.loss_mask else len(request.input_ids) - 1
