"""ZeRO stage 3: the frozen base model is partitioned over the workers; a layer is whole only while it is used.

DeepSpeed gathers a layer's weights when the layer is called and lets them go after it, in the backward pass too. That
is a collective: every worker must call the same layers in the same order (`distill.student.Student`).
"""

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from cartridges.config import ModelSettings
from cartridges.models import BaseModel, choose_dtype, load_base_model

_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    # Norms as well: what is held whole is the cartridge, nothing of the base.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "steps_per_print": 10**9,
}


def load_partitioned(settings: ModelSettings) -> BaseModel:
    """The base model, of which each worker keeps a share on its device. Needs an initialised process group.

    Every worker reads the whole into host memory first, one tensor after the other goes to the device from there.
    """
    import deepspeed

    from workflows.training.deepspeed_stepper import quiet

    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = str(choose_dtype(settings.dtype, device)).removeprefix("torch.")
    base = load_base_model(settings.model_copy(update={"dtype": dtype}), device="cpu")
    deepspeed.zero.Init(module=base.model, config_dict_or_path=_CONFIG)
    base.model.to(device)  # the buffers; of the weights nothing is left here
    deepspeed.initialize(model=base.model, config=_CONFIG, dist_init_required=False)
    return replace(base, device=device)


def gathered(weight: torch.Tensor) -> AbstractContextManager:
    """Within it, `weight` of a partitioned model is whole on every worker."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight])
