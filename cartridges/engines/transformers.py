"""The reference engine: a Hugging Face model, any machine, batches of shared prefixes."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cartridges.attention import OwnKV, install
from cartridges.engines.base import (
    CartridgePrefix,
    Completion,
    Prefix,
    RawPrefix,
    Request,
    Score,
    ScoreRequest,
    TextPrefix,
)
from cartridges.engines.batching import Piece, batches, common_starts, decoding_pieces, pieces
from cartridges.engines.sampling import Draws, sample
from cartridges.forward import PrefixKV, extend, hidden_states, prefill, round_up, row_bias, stack_prefixes
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
        self.prefixes = PrefixCache(base, cache_bytes)
        self.head = base.model.get_output_embeddings()
        self.stop_ids = stop_token_ids(base)

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        results: dict[int, Completion] = {}
        rows = _trimmed(requests, [len(request.input_ids) - 1 for request in requests])
        parts = decoding_pieces([row.key for row in rows], [len(row.input_ids) for row in rows], self.max_rows)
        for batch in batches(parts, self.max_rows):
            for index, completion in self._generate_batch(requests, rows, batch):
                results[index] = completion
        return [results[index] for index in range(len(requests))]

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        results: dict[int, Score] = {}
        rows = _trimmed(requests, [_first_loss(request) for request in requests])
        most = self._score_rows(rows)
        parts = pieces([row.key for row in rows], [len(row.input_ids) for row in rows], min(most, PIECE_ROWS))
        for batch in batches(parts, most):
            for index, score in self._score_batch(requests, rows, batch):
                results[index] = score
        return [results[index] for index in range(len(requests))]

    def _score_rows(self, rows: list["_Trimmed"]) -> int:
        """Rows that keep the attention weights of the longest request within the budget."""
        if not rows:
            return self.max_rows
        longest = max(len(row.input_ids) for row in rows)
        slots = max(self.prefixes.num_tokens(row) for row in {row.key: row for row in rows}.values())
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
        slots = round_up(max(len(trimmed[i].input_ids) for piece in batch for i in piece.indices), 16)
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
        longest = max(len(trimmed[i].input_ids) for piece in batch for i in piece.indices)
        slots = round_up(longest, 16)
        rows = self._rows(trimmed, batch, slots)
        decoding = _Decoding([requests[index] for index in rows.indices], self.base.tokenizer,
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


@dataclass(frozen=True)
class _Trimmed:
    """A request without its first tokens: `common`, shared with others, is part of its prefix."""

    prefix: Prefix
    common: tuple[int, ...]
    input_ids: tuple[int, ...]

    @property
    def key(self):
        return prefix_key(self.prefix), self.common


def _trimmed(requests: Sequence[Request | ScoreRequest], limits: list[int]) -> list[_Trimmed]:
    starts = common_starts([prefix_key(r.prefix) for r in requests], [r.input_ids for r in requests], limits)
    return [_Trimmed(r.prefix, tuple(r.input_ids[:start]), tuple(r.input_ids[start:]))
            for r, start in zip(requests, starts, strict=True)]


def _first_loss(request: ScoreRequest) -> int:
    """Tokens before the first predicting position."""
    return request.loss_mask.index(True) if True in request.loss_mask else len(request.input_ids) - 1


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


class _Decoding:
    """What the rows of a batch have produced so far, and whether they are done."""

    def __init__(self, requests: list[Request], tokenizer, stop_ids: frozenset[int]):
        self.requests, self.tokenizer, self.stop_ids = requests, tokenizer, stop_ids
        self.outputs: list[list[int]] = [[] for _ in requests]
        self.reasons: list[str | None] = [None] * len(requests)
        self.kept: list[list[tuple]] = [[] for _ in requests]
        self.draws = [Draws(request.seed) for request in requests]
        self.temperatures = torch.tensor([request.temperature for request in requests])
        self.topk = max(request.topk for request in requests)

    def step(self, logprobs: torch.Tensor) -> torch.Tensor | None:
        """Take the next token of every row from T=1 `logprobs` `[B, V]`; None when all are done."""
        draws = torch.tensor([draw.next() for draw in self.draws])
        tokens = sample(logprobs, self.temperatures.to(logprobs.device),
                        [request.top_p for request in self.requests], draws)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0].cpu().numpy()
        if self.topk:
            top = logprobs.topk(self.topk, dim=-1)
            top_ids, top_logprobs = top.indices.cpu().numpy(), top.values.cpu().numpy()
        for row, token in enumerate(tokens.tolist()):
            if self.reasons[row] is None:
                self.outputs[row].append(token)
                k = self.requests[row].topk
                self.kept[row].append((chosen[row], top_ids[row, :k], top_logprobs[row, :k]) if k
                                      else (chosen[row],))
                self.reasons[row] = self._reason(row, token)
        return None if all(self.reasons) else tokens

    def _reason(self, row: int, token: int) -> str | None:
        request = self.requests[row]
        if token in self.stop_ids and not request.ignore_end:
            return "stop"
        if request.stop and any(stop in self._text(row) for stop in request.stop):
            return "stop"
        return "length" if len(self.outputs[row]) >= request.max_tokens else None

    def _text(self, row: int) -> str:
        return self.tokenizer.decode(self.outputs[row], skip_special_tokens=True)

    def completion(self, row: int) -> Completion:
        request, kept = self.requests[row], self.kept[row]
        text = self._text(row)
        cuts = [text.index(stop) for stop in request.stop if stop in text]
        text = text[: min(cuts)] if cuts else text
        logprobs = np.array([item[0] for item in kept], np.float32)
        top_ids = np.stack([item[1] for item in kept]).astype(np.int32) if request.topk else None
        top_logprobs = np.stack([item[2] for item in kept]) if request.topk else None
        return Completion(tuple(self.outputs[row]), text, self.reasons[row], logprobs, top_ids, top_logprobs)


class PrefixCache:
    """KV of prefixes, least recently used out first once they exceed `max_bytes`."""

    def __init__(self, base: BaseModel, max_bytes: int):
        self.base, self.max_bytes = base, max_bytes
        self.entries: OrderedDict[object, PrefixKV] = OrderedDict()

    def get(self, row: _Trimmed) -> PrefixKV:
        """The KV of a row's prefix and of what it shares with other rows."""
        before = self._get(prefix_key(row.prefix), lambda: self._make(row.prefix))
        if not row.common:
            return before
        return self._get(row.key, lambda: extend(self.base.model, before, row.common))

    def num_tokens(self, row: _Trimmed) -> int:
        return self.get(row).num_tokens

    def _get(self, key, make) -> PrefixKV:
        if key not in self.entries:
            self.entries[key] = make()
            while len(self.entries) > 1 and sum(kv.num_bytes for kv in self.entries.values()) > self.max_bytes:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        return self.entries[key]

    def _make(self, prefix: Prefix) -> PrefixKV:
        if isinstance(prefix, CartridgePrefix):
            keys, values = prefix.cartridge.keys_values()
            to = dict(dtype=self.base.dtype, device=self.base.device)
            return PrefixKV(keys.detach().to(**to), values.detach().to(**to))
        ids = prefix_ids(self.base, prefix)
        if not ids:
            shape = self.base.shape
            empty = torch.zeros(shape.num_layers, shape.num_key_value_heads, 0, shape.head_dim,
                                dtype=self.base.dtype, device=self.base.device)
            return PrefixKV(empty, empty)
        return prefill(self.base.model, ids)


def prefix_ids(base: BaseModel, prefix: TextPrefix | RawPrefix | None) -> list[int]:
    """The tokens of a prefix that is text."""
    if isinstance(prefix, RawPrefix):
        return base.tokenizer.encode(prefix.text, add_special_tokens=False)
    return base.template.system_ids(prefix.text) if prefix else base.template.default_ids()


def prefix_key(prefix: Prefix):
    """What makes two prefixes the same: the text, or the digest of the cartridge's bytes."""
    return prefix.digest if isinstance(prefix, CartridgePrefix) else prefix


def stop_token_ids(base: BaseModel) -> frozenset[int]:
    """End-of-turn tokens: the model's generation settings and the tokenizer's EOS."""
    declared = base.model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in [*declared, base.tokenizer.eos_token_id] if i is not None)
