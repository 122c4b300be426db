"""Prefix attention on a CPU: two flash kernels merged by their log-sum-exps, and a short backward.

Attention over [prefix; own] is the mean of the attention over each part, weighted by the part's softmax
mass. So the forward pass writes neither scores nor weights to memory and never joins the two sets of
keys. The backward pass recomputes the weights from the merged log-sum-exp by plain matrix products,
which were faster than torch's flash backward for CPUs (docs/log.md). The identity is that of blockwise
attention (FlashAttention, arXiv 2205.14135).
"""

import torch

# Axis letters as in `attention`: B = N*M rows, H key-value heads, G query heads each, T queries,
# S own slots, P prefix slots, D head_dim.

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def supports(query: torch.Tensor) -> bool:
    return query.device.type == "cpu"


def merged_attention(query, key, value, prefix_key, prefix_value, prefix_bias, own_bias, scaling: float):
    """query `[B, H*G, T, D]`, key/value `[B, H, S, D]`, prefix `[N, H, P, D]`, `prefix_bias` `[N, P]` or
    None, `own_bias` `[B, T, S]` in query's dtype. Returns `[B, T, H*G, D]`."""
    return _Merged.apply(query, key, value, prefix_key, prefix_value, prefix_bias, own_bias, scaling)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, prefix_bias, own_bias, scaling):
        (B, HG, T, D), (N, H), S = query.shape, prefix_key.shape[:2], key.shape[2]
        ctx.dims = M, G = B // N, HG // H
        query = query.reshape(B, H, G * T, D)
        own_bias = own_bias[:, None, None].expand(B, 1, G, T, S).reshape(B, 1, G * T, S)
        grouped = _to_groups(query, N)
        bias = None if prefix_bias is None else prefix_bias[:, None, None].to(query.dtype)
        of_prefix, prefix_mass = _flash(grouped, prefix_key, prefix_value, 0.0, False, attn_mask=bias,
                                        scale=scaling)
        of_own, own_mass = _flash(query, key, value, 0.0, False, attn_mask=own_bias, scale=scaling)
        of_prefix = _to_rows(of_prefix, M)
        prefix_mass = _to_rows(prefix_mass.reshape(N, H, -1, 1), M)
        own_mass = own_mass.reshape(B, H, G * T, 1)
        share = torch.sigmoid(prefix_mass - own_mass).to(of_own.dtype)
        output = torch.lerp(of_own, of_prefix, share)
        if any(ctx.needs_input_grad):
            ctx.scaling = scaling
            ctx.save_for_backward(query, key, value, prefix_key, prefix_value, bias, own_bias, output,
                                  torch.logaddexp(prefix_mass, own_mass))
        return output.view(B, H, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, HG, D)

    @staticmethod
    def backward(ctx, upstream):
        query, key, value, prefix_key, prefix_value, prefix_bias, own_bias, output, mass = ctx.saved_tensors
        (B, H, GT, D), N, (M, G) = query.shape, prefix_key.shape[0], ctx.dims
        upstream = upstream.view(B, -1, H, G, D).permute(0, 2, 3, 1, 4).reshape(B, H, GT, D)
        # The mass is rounded to the scores' dtype; what that takes off the weights goes into `upstream`,
        # in which the gradients of keys, queries and values are all linear.
        rounded = mass.to(query.dtype)
        upstream = upstream * (rounded.to(mass.dtype) - mass).exp().to(query.dtype)
        delta = (upstream * output).sum(-1, keepdim=True)
        of_prefix = _gradients(
            *(_to_groups(tensor, N) for tensor in (query, upstream, -rounded, -delta)),
            prefix_key, prefix_value, prefix_bias, ctx.scaling)
        of_own = _gradients(query, upstream, -rounded, -delta, key, value, own_bias, ctx.scaling)
        to_query = (_to_rows(of_prefix[0], M) + of_own[0]).reshape(B, H * G, GT // G, D)
        return to_query, *of_own[1:], *of_prefix[1:], None, None, None


def _gradients(query, upstream, minus_mass, minus_delta, key, value, bias, scaling: float):
    """Gradients of one part for query, key and value; every tensor is `[b, h, rows, D or 1]`."""
    shape = query.shape[:2]
    query, upstream, minus_mass, minus_delta, key, value = (
        tensor.flatten(0, 1) for tensor in (query, upstream, minus_mass, minus_delta, key, value))
    if bias is not None:
        minus_mass = minus_mass + bias.expand(-1, shape[1], -1, -1).flatten(0, 1)
    weights = torch.baddbmm(minus_mass, query, key.transpose(1, 2), alpha=scaling).exp_()
    to_value = torch.bmm(weights.transpose(1, 2), upstream)
    scores = torch.baddbmm(minus_delta, upstream, value.transpose(1, 2)).mul_(weights)
    to_query = torch.bmm(scores, key).mul_(scaling)
    to_key = torch.bmm(scores.transpose(1, 2), query).mul_(scaling)
    return tuple(tensor.unflatten(0, shape) for tensor in (to_query, to_key, to_value))


def _to_groups(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """`[N*M, H, R, D]` to `[N, H, M*R, D]`."""
    B, H, R, D = tensor.shape
    return tensor.reshape(groups, B // groups, H, R, D).transpose(1, 2).reshape(groups, H, -1, D)


def _to_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`[N, H, M*R, D]` to `[N*M, H, R, D]`."""
    N, H, MR, D = tensor.shape
    return tensor.reshape(N, H, rows, MR // rows, D).transpose(1, 2).reshape(N * rows, H, -1, D)
