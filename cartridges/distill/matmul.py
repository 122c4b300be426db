"""How much of the machine's own matrix-product rate a training step reaches."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cartridges.distill.losses import SLICE
from cartridges.distill.packing import Pack, PackPlan, own_lengths, plan_size
from cartridges.forward import round_up
from cartridges.models import BaseModel
from cartridges.records import Conversation


@dataclass(frozen=True)
class Counts:
    """What the formula needs of a pack: tokens, (query, key) pairs a head, positions with a loss."""

    tokens: int
    pairs: int
    losses: int


def needed(pack: Pack, num_tokens: int) -> Counts:
    """The real tokens alone; each sees the cartridge, the shared turns and its own conversation so far."""
    real = pack.segment_ids > 0
    shared = len(pack.shared_ids)
    own = int(real.sum()) * (num_tokens + shared) + int((pack.position_ids[real] + 1).sum())
    return Counts(int(real.sum()) + shared, own + shared * num_tokens + shared * (shared + 1) // 2,
                  pack.num_loss_tokens)


def planned(conversations: Sequence[Conversation], plan: PackPlan, num_tokens: int) -> Counts:
    """`needed` of the pack that `plan` makes, without making it."""
    members = [conversations[index] for row in plan.rows for index in row]
    lengths = [min(length, plan.row_tokens) for length in own_lengths(members)]
    before = num_tokens + plan.shared_tokens
    own = sum(length * before + length * (length + 1) // 2 for length in lengths)
    shared = plan.shared_tokens
    return Counts(sum(lengths) + shared, own + shared * num_tokens + shared * (shared + 1) // 2,
                  plan_size(conversations, plan).loss_tokens)


def computed(pack: Pack, num_tokens: int) -> Counts:
    """With padding and the masked half of a row, as the fixed shapes have it."""
    rows, slots = pack.segment_ids.shape
    shared = len(pack.shared_ids)
    return Counts(rows * slots + shared,
                  rows * slots * (num_tokens + shared + slots) + shared * (num_tokens + shared),
                  round_up(pack.num_loss_tokens, SLICE))


def flops(model, counts: Counts, first_layer: int = 0) -> int:
    """Floating-point operations of a step's matrix products, a product and a sum being two. The layers below
    `first_layer` are not counted: what they make of a conversation is known from an earlier step.

    The base is frozen: its weights have no gradients, only the activations do. With W the weights of
    the layers' linear maps, W1 those of the first layer's queries, keys and values (whose input is
    the frozen embedding, or known), n tokens, a pairs, m loss positions, L layers, H query heads of D, V words:

        linear maps   2 n W forward, 2 n (W - W1) for the gradients of their inputs
        attention     L a H D (4 forward: scores and sum; 8 backward: the four gradients of those)
        head          2 m V hidden forward and as much backward, at loss positions only

    Nothing is counted for weights' gradients, for what is computed twice, or for elementwise work.
    """
    config = model.config
    heads = config.num_attention_heads * _head_dim(model)
    weights = sum(linear.weight.numel() for linear in _linears(model, first_layer))
    first = sum(linear.weight.numel() for linear in _first_projections(model))
    layers = config.num_hidden_layers - first_layer
    head = model.get_output_embeddings().weight.numel()
    return (2 * counts.tokens * (2 * weights - first)
            + 12 * layers * counts.pairs * heads + 4 * counts.losses * head)


@torch.no_grad()
def bare_seconds(base: BaseModel, packs: Sequence[Pack], num_tokens: int) -> float:
    """Seconds for the matrix products of `packs` alone, with nothing between them."""
    return sum(_time(step_products(base, pack, num_tokens), base.device) for pack in packs)


Product = tuple[torch.Tensor, torch.Tensor]


def step_products(base: BaseModel, pack: Pack, num_tokens: int) -> list[Product]:
    """What a step on `pack` multiplies: its dtype, its shapes, the model's own weights."""
    (rows, slots), shared = pack.segment_ids.shape, len(pack.shared_ids)
    attended = [(rows, slots, num_tokens + shared), *([(1, shared, num_tokens)] if shared else [])]
    tokens = [of * length for of, length, _ in attended]
    if base.device.startswith("cuda"):
        tokens = [sum(tokens)]  # a flat pack (flex_attention) goes through a linear map at once
    products = [product for count in tokens for product in _linear_maps(base, count)]
    products += [product for one in attended for product in _attention_of(base, *one)]
    slices = round_up(pack.num_loss_tokens, SLICE) // SLICE
    return products + _both_ways(base, SLICE, base.model.get_output_embeddings().weight, {}) * slices


def _linear_maps(base: BaseModel, tokens: int) -> list[Product]:
    """Of all layers, for so many tokens at once."""
    made: dict[int, torch.Tensor] = {}
    products = []
    first = {id(linear) for linear in _first_projections(base.model)}
    for linear in _linears(base.model):
        both = _both_ways(base, tokens, linear.weight, made)
        products += both[:1] if id(linear) in first else both
    return products


def _attention_of(base: BaseModel, rows: int, slots: int, prefix: int) -> list[Product]:
    """Of all layers, for `rows` rows of `slots` tokens after `prefix` tokens."""
    config, D = base.model.config, _head_dim(base.model)
    H = config.num_key_value_heads
    G = config.num_attention_heads // H
    attention = [*_attention(base, H, rows * G * slots, prefix, D), *_attention(base, rows * H, G * slots, slots, D)]
    return attention * config.num_hidden_layers


def _both_ways(base: BaseModel, tokens: int, weight: torch.Tensor, made: dict[int, torch.Tensor]):
    """A linear map forward, and the gradient of its input. `made` keeps activations by width."""
    for width in weight.shape:
        if width not in made:
            made[width] = _random(base, tokens, width)
    outputs, inputs = weight.shape
    return [(made[inputs], weight.t()), (made[outputs], weight)]


def _attention(base: BaseModel, batch: int, queries: int, keys: int, D: int):
    """Scores, sum of values, and the four gradients of those two."""
    rows, columns = _random(base, batch, queries, D), _random(base, batch, keys, D)
    scores = _random(base, batch, queries, keys)
    wide, tall = (rows, columns.transpose(1, 2)), (scores, columns)
    return [wide, tall, wide, tall, (scores.transpose(1, 2), rows), (scores.transpose(1, 2), rows)]


def _time(products: list[Product], device: str) -> float:
    _synchronize(device)  # the operands may still be in the making
    started = time.perf_counter()
    for left, right in products:
        torch.matmul(left, right)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _random(base: BaseModel, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=base.device).to(base.dtype)


def _linears(model, first_layer: int = 0) -> list[nn.Linear]:
    return [module for module in model.base_model.layers[first_layer:].modules() if isinstance(module, nn.Linear)]


def _first_projections(model) -> list[nn.Linear]:
    attention = model.base_model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def _head_dim(model) -> int:
    return model.base_model.layers[0].self_attn.head_dim
