"""The trainers of the training bench. Each runs the same round: the same conversations, the same number
of optimiser steps, the same loss, the same start.

    ours      `distill.trainer` with `TorchStepper`, packs, the cartridge's own attention; all layers, Adam
    upper     the same as the settings have it, by default the upper half of the layers
    peft      PEFT's cartridge tuner under transformers' `Trainer`, padded batches, logits of all positions
    padded    a plain loop: padded batches, the cartridge expanded into a `DynamicCache`, all logits
"""

import tempfile
import time
from typing import Protocol

import torch

from cartridges.cartridge import Cartridge
from cartridges.config import BuildSettings
from cartridges.distill.course import Course
from cartridges.distill.student import Student
from cartridges.distill.trainer import TorchStepper, Trainer
from cartridges.models import BaseModel
from workflows.bench.conversations import Work, sample_corpus
from workflows.bench.padded import full_logits_loss, pad

ATTENTION = "sdpa"
"""The peers' attention: transformers' default."""


class Side(Protocol):
    """One trainer, ready to run the round again and again."""

    def round(self) -> float:
        """Train on the round's conversations; the seconds it took, collating included."""
        ...


def like_for_like(settings: BuildSettings) -> BuildSettings:
    """Every layer's slots, by Adam: what all sides can do."""
    optimizer = settings.train.optimizer.model_copy(update={"name": "adam", "lr": None})
    train = settings.train.model_copy(update={"trained_layers": 1.0, "optimizer": optimizer})
    return settings.model_copy(update={"train": train})


def start(base: BaseModel, settings: BuildSettings) -> Cartridge:
    """The start of every side: the KV of the sample corpus' beginning, told over where p is longer."""
    from cartridges.distill.initialize import initialize

    text, wanted = sample_corpus().text, settings.train.model_copy(update={"init": "prefix"})
    repeats = 1 + wanted.num_tokens // max(1, len(base.tokenizer.encode(text, add_special_tokens=False)))
    return initialize(base, "\n\n".join([text] * repeats), wanted, settings.seed)


def make_side(name: str, base: BaseModel, work: Work, settings: BuildSettings) -> Side:
    """`base` is the side's own: what runs attention in it differs."""
    if name != "upper":
        settings = like_for_like(settings)
    cartridge = start(base, settings)
    if name in ("ours", "upper"):
        return Ours(base, cartridge, work, settings)
    base.model.set_attn_implementation(ATTENTION)
    return {"peft": Peft, "padded": Padded}[name](base, cartridge, work, settings)


class Ours:
    def __init__(self, base: BaseModel, cartridge: Cartridge, work: Work, settings: BuildSettings):
        self.base, self.work = base, work
        student = Student(base.model, cartridge, recompute=settings.train.gradient_checkpointing)
        stepper = TorchStepper([student], settings.train)
        self.trainer = Trainer(stepper, [Course(work.conversations, settings.train, settings.seed)], base.device)

    def round(self) -> float:
        self.trainer.next_step = 0
        started = time.perf_counter()
        self.trainer.run(until=len(self.work.plans))
        return _seconds_since(started, self.base.device)


class Padded:
    def __init__(self, base: BaseModel, cartridge: Cartridge, work: Work, settings: BuildSettings):
        self.base, self.cartridge, self.work, self.settings = base, cartridge.to(base.device), work, settings.train
        self.parameters = [parameter for parameter in cartridge.parameters() if parameter.requires_grad]
        wanted = settings.train.optimizer
        self.optimizer = torch.optim.Adam(self.parameters, lr=wanted.peak_lr, betas=wanted.betas)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        from transformers import DynamicCache

        rows = len(batch["input_ids"])
        keys, values = (tensor.to(self.base.dtype).unsqueeze(1).expand(-1, rows, -1, -1, -1)
                        for tensor in self.cartridge.keys_values())
        seen = torch.ones(rows, self.cartridge.num_tokens, dtype=torch.long, device=self.base.device)
        logits = self.base.model(
            input_ids=batch["input_ids"], attention_mask=torch.cat([seen, batch["attention_mask"]], dim=1),
            past_key_values=DynamicCache(list(zip(keys, values, strict=True)))).logits
        return full_logits_loss(logits, batch)

    def round(self) -> float:
        started = time.perf_counter()
        size = self.work.batch_size
        for first in range(0, len(self.work.chosen), size):
            batch = pad(self.work.chosen[first:first + size], self.settings.row_tokens, self.settings.label_share)
            self.loss({name: tensor.to(self.base.device) for name, tensor in batch.items()}).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.optimizer.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return _seconds_since(started, self.base.device)


class Peft:
    """PEFT's `CARTRIDGE` tuner. Frozen slots, dtype and start are as ours."""

    def __init__(self, base: BaseModel, cartridge: Cartridge, work: Work, settings: BuildSettings):
        from peft import CartridgeConfig, get_peft_model
        from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values

        self.base, self.work, self.settings = base, work, settings.train
        self.model = get_peft_model(base.model, CartridgeConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=cartridge.num_tokens,
            num_frozen_tokens=cartridge.num_frozen_tokens))
        keys, values = cartridge.keys_values()
        initialize_kv_prefix_from_past_key_values(
            self.model, past_key_values=[(k[None], v[None]) for k, v in zip(keys, values, strict=True)])
        self._scratch = tempfile.TemporaryDirectory(prefix="cartridges-bench-")

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return full_logits_loss(logits, batch)

    def round(self) -> float:
        stopwatch = _stopwatch(self.base.device)
        self._trainer(stopwatch).train()
        return stopwatch.seconds

    def _trainer(self, stopwatch):
        from transformers import PrinterCallback, TrainingArguments
        from transformers import Trainer as HuggingFaceTrainer

        side, wanted = self, self.settings

        class DistillationTrainer(HuggingFaceTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                return side.loss(inputs)

        arguments = TrainingArguments(
            output_dir=self._scratch.name, per_device_train_batch_size=self.work.batch_size, num_train_epochs=1,
            learning_rate=wanted.optimizer.peak_lr, adam_beta1=wanted.optimizer.betas[0],
            adam_beta2=wanted.optimizer.betas[1], max_grad_norm=wanted.optimizer.max_grad_norm,
            lr_scheduler_type="linear", train_sampling_strategy="sequential", remove_unused_columns=False,
            dataloader_pin_memory=False, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=not self.base.device.startswith("cuda"))
        trainer = DistillationTrainer(
            model=self.model, args=arguments, train_dataset=self.work.chosen, callbacks=[stopwatch],
            data_collator=lambda rows: pad(rows, wanted.row_tokens, wanted.label_share))
        trainer.remove_callback(PrinterCallback)
        return trainer


def _stopwatch(device: str):
    """Times the training loop of transformers' `Trainer`, without what it sets up before."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_train_end(self, *_, **__):
            self.seconds = _seconds_since(self.started, device)

    return Stopwatch()


def _seconds_since(started: float, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started
