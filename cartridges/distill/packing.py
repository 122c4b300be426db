"""Conversations to packs of fixed shape: `rows x row_tokens`, several short conversations a row.

A pack is a pure function of (lengths, seed), so resuming recomputes it. It has rows instead of one long sequence,
because attention within a row is dense on a CPU and then costs `row_tokens` per query (for a GPU see
`flex_attention`). There are few shapes, because on a CPU a new one costs seconds (oneDNN builds kernels per shape).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cartridges.records import Conversation


@dataclass(frozen=True)
class PackPlan:
    """The conversations (by index) in each row of a pack. All begin with the same `shared_tokens` tokens, which are in
    the pack once. `distractors` are the distractor cartridges (by index) composed with the one in training."""

    row_tokens: int
    shared_tokens: int
    rows: tuple[tuple[int, ...], ...]
    distractors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pack:
    """Tensors of one micro batch. `R` rows, `T` tokens a row, `m` loss positions.

    `shared_ids` int64 `[S]` stand between the cartridge and every conversation (S may be 0).
    `input_ids`, `position_ids` (from 0; the prefix's length is added later) and
    `segment_ids` (0 is padding) are int64 `[R, T]`; `loss_positions` int64 `[m]` index the flattened
    rows, and predict `targets` `[m]`; `topk_ids` int64 and `topk_logprobs` float32 are `[m, k]`.
    `distractors` int64 `[d]`: distractor cartridges that stand before it as well.
    """

    shared_ids: torch.Tensor
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    loss_positions: torch.Tensor
    targets: torch.Tensor
    topk_ids: torch.Tensor
    topk_logprobs: torch.Tensor
    distractors: torch.Tensor

    @property
    def num_loss_tokens(self) -> int:
        return len(self.loss_positions)

    def to(self, device) -> "Pack":
        return Pack(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def plan_packs(conversations: Sequence[Conversation], row_tokens: int, pack_tokens: int,
               seed: int) -> list[PackPlan]:
    """Every conversation once, in an order drawn by `seed`; of the conversations only the lengths count.

    A conversation longer than `row_tokens` goes to rows of twice, four times ... that length, up to
    `pack_tokens`; one longer than that is cut there (`count_truncated` says how many).
    """
    order = np.random.default_rng(seed).permutation(len(conversations))
    lengths = own_lengths(conversations)
    buckets: dict[tuple[int, int], list[int]] = {}
    for index in order:
        length = _row_length(lengths[index], row_tokens, pack_tokens)
        buckets.setdefault((length, conversations[index].shared_tokens), []).append(int(index))
    plans = []
    for (length, shared), members in sorted(buckets.items()):
        rows = _fill_rows([min(lengths[i], length) for i in members], length)
        per_pack = pack_tokens // length
        chosen = [tuple(members[i] for i in row) for row in rows]
        plans += [PackPlan(length, shared, tuple(chosen[start:start + per_pack]))
                  for start in range(0, len(chosen), per_pack)]
    return [plans[i] for i in np.random.default_rng([seed, 1]).permutation(len(plans))]


@dataclass(frozen=True)
class PlanSize:
    """Real tokens in the rows of a pack (shared ones and padding are not counted), and those with a loss."""

    tokens: int
    loss_tokens: int


def plan_size(conversations: Sequence[Conversation], plan: PackPlan) -> PlanSize:
    """The size of the pack that `collate` makes of `plan`, without making it."""
    members = [conversations[index] for row in plan.rows for index in row]
    lengths = [min(length, plan.row_tokens) for length in own_lengths(members)]
    # The last token that fits has nothing to predict.
    losses = sum(int(one.loss_mask[plan.shared_tokens:plan.shared_tokens + length - 1].sum())
                 for one, length in zip(members, lengths, strict=True))
    return PlanSize(sum(lengths), losses)


def with_label(topk_ids: np.ndarray, topk_logprobs: np.ndarray, targets: np.ndarray,
               share: float) -> tuple[np.ndarray, np.ndarray]:
    """Top-k rows `[m, k]` with `share` of their mass moved to the known next token.

    An answer known from the text is right even where a small teacher hesitates to give it. A token
    outside the top-k takes the place of the last entry, whose mass joins the tail.
    """
    if share == 0 or not len(targets):
        return topk_ids, topk_logprobs
    ids, probabilities = topk_ids.copy(), (1 - share) * np.exp(topk_logprobs)
    missing = ~(ids == targets[:, None]).any(axis=1)
    ids[missing, -1], probabilities[missing, -1] = targets[missing], 0.0
    probabilities += share * (ids == targets[:, None])
    return ids, np.log(np.maximum(probabilities, 1e-12)).astype(np.float32)


def own_lengths(conversations: Sequence[Conversation]) -> list[int]:
    """Tokens of each conversation beyond those that it shares."""
    return [len(conversation.input_ids) - conversation.shared_tokens for conversation in conversations]


def unshared(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The same conversations, each packed whole, with no shared tokens."""
    return [replace(conversation, shared_tokens=0) for conversation in conversations]


def count_truncated(conversations: Sequence[Conversation], pack_tokens: int) -> int:
    return sum(length > pack_tokens for length in own_lengths(conversations))


def segment_bias(segment_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[R, T, T]`: 0 where a token may look (its own conversation, not ahead), -inf elsewhere."""
    T = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    seen = same & torch.ones(T, T, dtype=torch.bool, device=segment_ids.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=segment_ids.device).masked_fill(~seen, float("-inf"))


def _row_length(length: int, row_tokens: int, pack_tokens: int) -> int:
    while row_tokens < min(length, pack_tokens):
        row_tokens *= 2
    return min(row_tokens, pack_tokens)


def _fill_rows(lengths: Sequence[int], capacity: int, window: int = 32) -> list[list[int]]:
    """Best fit among the `window` youngest open rows: near-full rows, order still random."""
    rows: list[list[int]] = []
    free: list[int] = []
    for index, length in enumerate(lengths):
        recent = range(max(0, len(rows) - window), len(rows))
        fitting = [r for r in recent if free[r] >= length]
        if fitting:
            row = min(fitting, key=lambda r: free[r])
        else:
            rows.append([])
            free.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        free[row] -= length
    return rows


def collate(conversations: Sequence[Conversation], plan: PackPlan, pack_tokens: int,
            label_share: float = 0.0) -> Pack:
    """The tensors of `plan`; idle rows and row ends are padding. `label_share`: see `with_label`."""
    shape = (max(1, pack_tokens // plan.row_tokens), plan.row_tokens)
    input_ids, position_ids, segment_ids = (np.zeros(shape, np.int64) for _ in range(3))
    positions, targets, ids, logprobs = [], [], [], []
    shared = plan.shared_tokens
    shared_ids = conversations[plan.rows[0][0]].input_ids[:shared].astype(np.int64)
    for r, row in enumerate(plan.rows):
        start = 0
        for segment, index in enumerate(row, start=1):
            conversation = conversations[index]
            if not np.array_equal(conversation.input_ids[:shared], shared_ids):
                raise ValueError(f"conversation {conversation.conversation_id} does not begin with the "
                                 "tokens that its pack shares")
            own = conversation.input_ids[shared:]
            n = min(len(own), plan.row_tokens)
            at = slice(start, start + n)
            input_ids[r, at] = own[:n]
            position_ids[r, at] = np.arange(n)
            segment_ids[r, at] = segment
            predicting = np.flatnonzero(conversation.loss_mask) - shared
            kept = predicting < n - 1
            positions.append(r * plan.row_tokens + start + predicting[kept])
            target = own[predicting[kept] + 1]
            share = label_share if conversation.info.get("known") else 0.0
            rows = with_label(conversation.topk_ids[kept], conversation.topk_logprobs[kept], target, share)
            targets.append(target)
            ids.append(rows[0])
            logprobs.append(rows[1])
            start += n
    return Pack(*map(torch.from_numpy, (
        shared_ids, input_ids, position_ids, segment_ids, np.concatenate(positions).astype(np.int64),
        np.concatenate(targets).astype(np.int64), np.concatenate(ids).astype(np.int64),
        np.concatenate(logprobs).astype(np.float32), np.array(plan.distractors, np.int64))))
