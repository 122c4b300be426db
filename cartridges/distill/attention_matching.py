"""Attention matching: an initialisation in closed form (arXiv 2602.16284).

The slots are fitted so that attention over them gives queries what attention over the corpus' KV gives. Each segment
of the corpus is read alone, and then once more after itself: the second reading supplies the queries and their
targets. For each layer and key-value head:

1. The keys with the largest attention weight under any query become the slots' keys, rotated by RoPE to end right
   before position p.
2. One vector is added to all keys, by least squares, so that the slots together get the corpus' attention weight.
3. The values are solved for by ridge regression, so that attention over slots and own tokens gives the target.

A layer's queries are computed on top of the fitted layers below it, so that it corrects their errors. The paper fits
a bias per key instead of step 2's vector, whose product with a query acts as one; so any engine can serve the result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from cartridges.attention import AttentionContext, cartridge_attention, causal_bias, install
from cartridges.compose import rotate
from cartridges.forward import through_layers
from cartridges.models import BaseModel, rope_frequencies

MOST_TOKENS = 16_384
"""Most tokens of the corpus that are read, or twice the slots if that is more. Of a longer one, segments are spread
evenly over it."""
LONGEST_SEGMENT = 8192
"""Tokens. The attention weights of a segment take memory with the square of its length."""
ROW_TOKENS = 128
BLOCK_ROWS = 8
"""Rows whose scores are in memory at once."""
SHIFTS = 2
"""Least-squares steps for the vector added to the keys: the joint weight is a logsumexp, so one is not enough."""
RIDGE = 1.0
"""Relative to the mean squared weight of a slot. It keeps values that no query determines near the corpus' own."""

# Axis letters: R rows of T tokens, N tokens of a segment, H key-value heads, G query heads each, D head_dim.


@dataclass
class Segment:
    """A part of the corpus, by its hidden states before the next layer.

    `context` `[1, N, hidden]`: the closed system turn around it. `teacher` and `student` `[R, T, hidden]`: its tokens
    once more, in rows, after the segment itself and after the cartridge. `real` `[R, T]`: False for padding.
    """

    context: torch.Tensor
    teacher: torch.Tensor
    student: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True)
class Source:
    """One layer of a segment.

    `keys` and `values` `[H, N, D]`, the keys rotated to the slots' positions. `weight` `[H, N]`: the largest attention
    weight that any query gave each key. `target` `[R, T, H*G, D]`: attention's output for the rows. `odds`
    `[H, queries]`: log of the weight of all keys over the weight of the row's own keys.
    """

    keys: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor
    odds: torch.Tensor


@dataclass(frozen=True)
class Attended:
    """A layer's attention for some rows: `query` `[R, H*G, T, D]`, own `keys` and `values` `[R, H, T, D]`, and `output`
    `[R, T, H*G, D]`."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor


@torch.no_grad()
def match_attention(base: BaseModel, text: str, num_tokens: int, stretch_tokens: int, num_frozen_tokens: int = 1
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[layers, H, num_tokens, D]`, float32, of `text` read at most `stretch_tokens` at a time.

    The first `num_frozen_tokens` slots (one at least: the attention sink) are the first tokens of the template as
    the model computes them. `text` must have `num_tokens` tokens at least.
    """
    install(base.model)
    sinks = max(1, num_frozen_tokens)
    segments = [_segment(base, ids) for ids in _parts(base, text, stretch_tokens, max(MOST_TOKENS, 2 * num_tokens))]
    fitted = [_fit_layer(base, segments, layer, num_tokens, sinks)
              for layer in range(base.model.config.num_hidden_layers)]
    return torch.stack([keys for keys, _ in fitted]), torch.stack([values for _, values in fitted])


def _parts(base: BaseModel, text: str, stretch_tokens: int, most_tokens: int) -> list[list[int]]:
    """Token ids of equal segments, of about `most_tokens` in all where the text has more."""
    ids = base.template.text_ids(text)
    # A segment stands in its turn of the template, and a row after it.
    room = base.identity.max_position_embeddings - len(base.template.system_ids("")) - ROW_TOKENS
    count = -(-len(ids) // min(stretch_tokens, LONGEST_SEGMENT, room))
    taken = min(count, -(-most_tokens * count // len(ids)))
    bounds = np.linspace(0, len(ids), count + 1).astype(int)
    middles = ((np.arange(taken) + 0.5) * count / taken).astype(int)
    return [ids[bounds[index]:bounds[index + 1]] for index in middles.tolist()]


def _segment(base: BaseModel, ids: Sequence[int]) -> Segment:
    embed, device = base.model.base_model.embed_tokens, base.model.device
    system = base.template.system_ids(base.tokenizer.decode(ids))
    rows = torch.zeros(-(-len(ids) // ROW_TOKENS), ROW_TOKENS, dtype=torch.long, device=device)
    rows.view(-1)[:len(ids)] = torch.as_tensor(list(ids), device=device)
    real = (torch.arange(rows.numel(), device=device) < len(ids)).view(rows.shape)
    hidden = embed(rows)
    return Segment(embed(torch.as_tensor(system, device=device)[None]), hidden, hidden, real)


def _fit_layer(base: BaseModel, segments: list[Segment], layer: int, num_tokens: int, sinks: int
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[H, num_tokens, D]` of `layer`. Advances the segments' states past it."""
    frequencies = rope_frequencies(base.identity)
    moved = num_tokens - segments[0].context.shape[1]
    sources = [_read(base.model, segment, layer, num_tokens, frequencies) for segment in segments]
    keys, values = _choose(sources, num_tokens, sinks)
    keys[:, :sinks] = rotate(keys[:, :sinks], frequencies, -moved)
    # The rows' queries do not depend on the slots of this layer.
    row_queries = [RowQueries(base.model, layer, _attention(base.model, one.student, layer, num_tokens), one.real)
                   for one in segments]
    for _ in range(SHIFTS):
        keys[:, sinks:] += _shift(sources, row_queries, keys)
    values[:, sinks:] += _correction(sources, row_queries, keys, values, sinks)
    for segment in segments:
        segment.student, _ = _pass(base.model, segment.student, layer, keys, values)
    return keys, values


def _read(model, segment: Segment, layer: int, num_tokens: int, frequencies: torch.Tensor) -> Source:
    """Read the segment, and its rows after it, through `layer`."""
    segment.context, context = _pass(model, segment.context, layer)
    keys, values = context.keys[0].float(), context.values[0].float()
    segment.teacher, rows = _pass(model, segment.teacher, layer, keys, values)
    found = [(scored.weights().amax(dim=1), scored.odds)
             for scored in RowQueries(model, layer, rows, segment.real).scores(keys)]
    return Source(rotate(keys, frequencies, num_tokens - keys.shape[1]), values,
                  torch.stack([weight for weight, _ in found]).amax(dim=0), rows.output,
                  torch.cat([odds for _, odds in found], dim=1))


def _choose(sources: list[Source], num_tokens: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys with the largest weights, with their values, after the first `sinks` of the first segment. The sinks of
    the other segments are left out."""
    def chosen(tensors: list[torch.Tensor]) -> torch.Tensor:
        joined = torch.cat(tensors, dim=1)
        return joined.gather(1, kept[..., None].expand(-1, -1, joined.shape[-1]))

    weight = torch.cat([functional.pad(source.weight[:, sinks:], (sinks, 0), value=-1) for source in sources], dim=1)
    weight[:, :sinks] = torch.inf
    kept = weight.topk(num_tokens, dim=1).indices.sort(dim=1).values
    return chosen([source.keys for source in sources]), chosen([source.values for source in sources])


def _shift(sources: list[Source], row_queries: list["RowQueries"], keys: torch.Tensor) -> torch.Tensor:
    """The vector `[H, 1, D]` to add to each key except the sinks', so that the slots together get the corpus' weight:
    least squares over all queries."""
    H, _, D = keys.shape
    gram, moment = keys.new_zeros(H, D, D), keys.new_zeros(H, D, 1)
    for source, rows in zip(sources, row_queries, strict=True):
        done = 0
        for scored in rows.scores(keys):
            count = scored.odds.shape[1]
            missing = source.odds[:, done:done + count] - scored.odds
            gram += scored.query.transpose(1, 2) @ scored.query
            moment += scored.query.transpose(1, 2) @ missing[..., None].clamp(-3, 3)
            done += count
    return _solve(gram, moment).transpose(1, 2)


def _correction(sources: list[Source], row_queries: list["RowQueries"], keys: torch.Tensor, values: torch.Tensor,
                sinks: int) -> torch.Tensor:
    """The change `[H, p - sinks, D]` of `values` after the sinks: ridge regression over all queries."""
    H, p, D = values.shape
    gram, moment = values.new_zeros(H, p - sinks, p - sinks), values.new_zeros(H, p - sinks, D)
    for source, rows in zip(sources, row_queries, strict=True):
        missing = source.target.float() - rows.output(keys, values).float()
        for scored in rows.scores(keys):
            weights = scored.weights()[..., sinks:]
            gram += weights.transpose(1, 2) @ weights
            moment += weights.transpose(1, 2) @ _by_head(missing[scored.rows], rows.real[scored.rows], H)
    return _solve(gram, moment)


def _solve(gram: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-8)
    regular = gram + ridge[:, None, None] * torch.eye(gram.shape[1], device=gram.device)
    # Not linalg.solve: torch's on a CPU did not come back from a batch of 448 by 448 (docs/log.md).
    return torch.cholesky_solve(moment, torch.linalg.cholesky(regular))


def _pass(model, hidden: torch.Tensor, layer: int, keys: torch.Tensor | None = None,
          values: torch.Tensor | None = None) -> tuple[torch.Tensor, Attended]:
    """Run `hidden` `[R, T, hidden]` through `layer`, after a prefix of `keys` and `values` `[H, P, D]` if given.

    Returns the next hidden states and the attention.
    """
    context = _prefix(layer, hidden.dtype, keys, values)
    positions = (0 if keys is None else keys.shape[1]) + torch.arange(hidden.shape[1], device=hidden.device)
    hidden = through_layers(model, hidden, positions.expand(len(hidden), -1), context, layer, layer + 1)
    return hidden, _attended(context)


def _attention(model, hidden: torch.Tensor, layer: int, start: int) -> Attended:
    """The attention of `layer` alone, for rows at positions from `start` with no prefix."""
    part, context = model.base_model.layers[layer], _prefix(layer, hidden.dtype)
    positions = (start + torch.arange(hidden.shape[1], device=hidden.device)).expand(len(hidden), -1)
    part.self_attn(part.input_layernorm(hidden), position_embeddings=model.base_model.rotary_emb(hidden, positions),
                   attention_mask=None, context=context)
    return _attended(context)


def _prefix(layer: int, dtype: torch.dtype, keys: torch.Tensor | None = None,
            values: torch.Tensor | None = None) -> AttentionContext:
    if keys is None:
        return AttentionContext(collected=[], observed=[])
    before = ([None] * layer + [tensor.to(dtype)[None]] for tensor in (keys, values))
    return AttentionContext(*before, collected=[], observed=[])


def _attended(context: AttentionContext) -> Attended:
    (query, output), (keys, values) = context.observed[0], context.collected[0]
    return Attended(query, keys, values, output)


@dataclass(frozen=True)
class PrefixScores:
    """Scores of a block of `rows` for a prefix.

    `query` `[H, queries, D]`, scaled; `scores` `[H, queries, P]`; `of_prefix` and `of_own` `[H, queries]`: logsumexp of
    the scores over the prefix and over the row's own keys.
    """

    rows: slice
    query: torch.Tensor
    scores: torch.Tensor
    of_prefix: torch.Tensor
    of_own: torch.Tensor

    @property
    def odds(self) -> torch.Tensor:
        """Log odds of the prefix against the row's own tokens, `[H, queries]`."""
        return self.of_prefix - self.of_own

    def weights(self) -> torch.Tensor:
        """Attention weights of the prefix' keys, `[H, queries, P]`."""
        return (self.scores - torch.logaddexp(self.of_prefix, self.of_own)[..., None]).exp_()


class RowQueries:
    """The queries of some rows, to be scored against several prefixes, `BLOCK_ROWS` rows at a time.

    Only `real` `[R, T]` tokens count.
    """

    def __init__(self, model, layer: int, rows: Attended, real: torch.Tensor):
        self.attention, self.rows, self.real = model.base_model.layers[layer].self_attn, rows, real
        H = rows.keys.shape[1]
        self.blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, len(real), BLOCK_ROWS)]
        self.queries = [rows.query[block].float().unflatten(1, (H, -1)) * self.attention.scaling
                        for block in self.blocks]
        self.of_own = [self._of_own(query, rows.keys[block]) for query, block in
                       zip(self.queries, self.blocks, strict=True)]

    def scores(self, keys: torch.Tensor) -> Iterator[PrefixScores]:
        """Scores for a prefix of `keys` `[H, P, D]`, block by block."""
        for block, query, of_own in zip(self.blocks, self.queries, self.of_own, strict=True):
            query = self._real(query.permute(1, 0, 3, 2, 4), block)
            scores = query @ keys.transpose(1, 2)
            yield PrefixScores(block, query, scores, scores.logsumexp(-1), self._real(of_own, block))

    def output(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attention's output `[R, T, H*G, D]` for the rows after a prefix of `keys` and `values`."""
        rows = self.rows
        context = _prefix(self.attention.layer_idx, rows.query.dtype, keys, values)
        return cartridge_attention(self.attention, rows.query, rows.keys, rows.values, None, self.attention.scaling,
                                   context=context)[0]

    def _of_own(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        T = query.shape[3]
        ahead = causal_bias(T, T, torch.float32, keys.device)[:, None]
        return (torch.einsum("rhgtd,rhsd->hrtgs", query, keys.float()) + ahead).logsumexp(-1)

    def _real(self, tensor: torch.Tensor, block: slice) -> torch.Tensor:
        """`[H, R, T, G, ...]` to `[H, queries, ...]`."""
        real = self.real[block]
        return tensor.flatten(1, 3) if real.all() else tensor[:, real].flatten(1, 2)


def _by_head(output: torch.Tensor, real: torch.Tensor, heads: int) -> torch.Tensor:
    """`[R, T, H*G, D]` to `[H, queries, D]`, in the order of `PrefixScores`."""
    return output[real].unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)
