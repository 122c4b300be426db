"""The cartridge: a trainable KV cache of `p` slots in place of a corpus."""

import torch
from torch import nn

from cartridges.records import KVShape


class Cartridge(nn.Module):
    """Keys (after RoPE) and values for the first `p` cache positions of a frozen model.

    Source: the paper's parametrisation (arXiv 2506.06266, section on initialisation): slot 0 is the
    attention sink and stays frozen, because training diverges otherwise; all other slots are free parameters.

    `keys` and `values` are `[num_layers, num_key_value_heads, p, head_dim]`. The first
    `num_frozen_tokens` slots are buffers, and so is all of the first `num_frozen_layers` layers; the
    rest are float32 parameters, so that an optimiser given `parameters()` never sees the sink and
    bfloat16 does not round small updates away. Freezing matters only in training, and an artifact
    records only the length of the sink.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_frozen_tokens: int = 1,
                 num_frozen_layers: int = 0):
        super().__init__()
        if keys.shape != values.shape or keys.dim() != 4:
            raise ValueError(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} must be "
                             "[num_layers, num_key_value_heads, p, head_dim] alike")
        if not 0 <= num_frozen_tokens <= keys.shape[2]:
            raise ValueError(f"num_frozen_tokens {num_frozen_tokens} is not in 0..{keys.shape[2]}")
        if not 0 <= num_frozen_layers < keys.shape[0]:
            raise ValueError(f"num_frozen_layers {num_frozen_layers} is not in 0..{keys.shape[0] - 1}")
        for name, tensor in (("keys", keys), ("values", values)):
            tensor = tensor.detach().float()
            lower, upper = tensor[:num_frozen_layers], tensor[num_frozen_layers:]
            self.register_buffer(f"lower_{name}", lower.clone())
            self.register_buffer(f"frozen_{name}", upper[:, :, :num_frozen_tokens].clone())
            self.register_parameter(
                f"trainable_{name}", nn.Parameter(upper[:, :, num_frozen_tokens:].clone()))

    @property
    def num_tokens(self) -> int:
        return self.num_frozen_tokens + self.trainable_keys.shape[2]

    @property
    def num_frozen_tokens(self) -> int:
        return self.frozen_keys.shape[2]

    @property
    def num_frozen_layers(self) -> int:
        return self.lower_keys.shape[0]

    @property
    def shape(self) -> KVShape:
        upper, heads, _, head_dim = self.trainable_keys.shape
        return KVShape(self.num_frozen_layers + upper, heads, head_dim)

    def keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both `[num_layers, num_key_value_heads, p, head_dim]`, float32, differentiable."""
        keys, values = self.upper_keys_values()
        return torch.cat([self.lower_keys, keys]), torch.cat([self.lower_values, values])

    def upper_keys_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys_values()` of the layers above the frozen ones."""
        return (torch.cat([self.frozen_keys, self.trainable_keys], dim=2),
                torch.cat([self.frozen_values, self.trainable_values], dim=2))

    def with_frozen_layers(self, num_frozen_layers: int) -> "Cartridge":
        """The same keys and values with the first `num_frozen_layers` layers frozen."""
        return Cartridge(*self.keys_values(), self.num_frozen_tokens, num_frozen_layers)
