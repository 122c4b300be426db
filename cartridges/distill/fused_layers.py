"""Norms and MLPs of the frozen base in training on a GPU: fused by torch's compiler.

Run operation by operation, a layer passes over its activations a dozen times between two matrix products, and each pass
is a kernel to start. Attention is not compiled with them: it takes its cartridge from outside the graph, and its own
kernel is compiled already (`flex_attention`). On a CPU compiling gained nothing (docs/log.md).
"""

from transformers import PreTrainedModel


def fuse(model: PreTrainedModel, **options) -> None:
    """Compile what is not attention in each layer of `model`, at its next call. `options` are torch.compile's.

    Does nothing the second time. Shapes are dynamic from the second one on.
    """
    body = model.base_model
    parts = [part for layer in body.layers for name, part in layer.named_children() if name != "self_attn"]
    for part in [*parts, body.norm]:
        if part._compiled_call_impl is None:
            part.compile(**options)
