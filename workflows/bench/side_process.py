"""One side of the training bench in a process of its own, so that its memory can be told from the others'.

    python -m workflows.bench.side_process

JSON lines: the job on stdin, what it is ready for on stdout; then a line with what to do, and its result.
"""

import json
import os
import sys
from typing import Any

from cartridges.config import BuildSettings
from cartridges.errors import UserError


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    try:
        runner = Runner(json.loads(sys.stdin.readline()))
    except UserError as mistake:  # one line for the person, whose command is another process
        return _reply(replies, {"mistake": str(mistake)})
    _reply(replies, runner.description())
    for line in sys.stdin:
        _reply(replies, {"round": runner.round, "bare": runner.bare}[line.strip()]())


def _reply(stream, content: dict[str, Any]) -> None:
    print(json.dumps(content), file=stream, flush=True)


class Runner:
    """`job`: `side`, `conversations` (a directory), `settings` (of `BuildSettings`), `steps`."""

    def __init__(self, job: dict[str, Any]):
        from transformers.utils.logging import disable_progress_bar

        from cartridges.distill.packing import collate
        from cartridges.models import load_base_model
        from cartridges.selfstudy.storage import load_conversations
        from workflows.bench.conversations import choose_work
        from workflows.bench.sides import make_side

        disable_progress_bar()
        self.settings = BuildSettings.model_validate(job["settings"])
        self.base = load_base_model(self.settings.model)
        self.work = choose_work(load_conversations(job["conversations"]), self.settings, job["steps"])
        self.side = make_side(job["side"], self.base, self.work, self.settings)
        wanted = self.settings.train
        self.packs = [collate(self.work.conversations, plan, wanted.pack_tokens, wanted.label_share)
                      for plans in self.work.plans for plan in plans]

    def description(self) -> dict[str, Any]:
        """The round's sizes and the machine."""
        from cartridges.distill.matmul import computed, flops, needed
        from cartridges.evaluation.report_card import machine

        model, p = self.base.model, self.settings.train.num_tokens
        work = {
            "conversations": len(self.work.chosen), "tokens": self.work.tokens, "steps": len(self.work.plans),
            "loss_tokens": sum(pack.num_loss_tokens for pack in self.packs),
            "packed_tokens": sum(needed(pack, p).tokens for pack in self.packs),
            "packed_slots": sum(computed(pack, p).tokens for pack in self.packs),
            "peer_batch_size": self.work.batch_size,
            "flops_needed": sum(flops(model, needed(pack, p)) for pack in self.packs),
            "flops_computed": sum(flops(model, computed(pack, p)) for pack in self.packs)}
        return {"work": work, "machine": machine(self.base), "memory": self._peak_memory()}

    def round(self) -> dict[str, Any]:
        """`seconds` is None where the GPU's memory does not suffice."""
        result = self._round()
        self._leave_memory_to_others()
        return result

    def _round(self) -> dict[str, Any]:
        import torch

        try:
            if self.base.device.startswith("cuda"):
                self.side.round()  # not counted: the allocator begins with nothing, because a round leaves nothing
            self._forget_peak_memory()
            return {"seconds": self.side.round(), "memory": self._peak_memory()}
        except torch.OutOfMemoryError:
            return {"seconds": None, "memory": None}

    def bare(self) -> dict[str, Any]:
        """Seconds of the round's matrix products alone."""
        from cartridges.distill.matmul import bare_seconds

        packs = [pack.to(self.base.device) for pack in self.packs]
        return {"seconds": bare_seconds(self.base, packs, self.settings.train.num_tokens)}

    def _peak_memory(self) -> int | None:
        """Most bytes taken on a GPU since the last round began; on a CPU the parent watches the process."""
        import torch

        return torch.cuda.max_memory_allocated() if self.base.device.startswith("cuda") else None

    def _leave_memory_to_others(self) -> None:
        """The sides share one GPU: what a side's allocator keeps for its next round, the others would lack."""
        import gc

        import torch

        gc.collect()  # a trainer that ran out of memory is held by cycles
        if self.base.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _forget_peak_memory(self) -> None:
        """The bare products of `bare` and the loading of the model are no part of a round's peak."""
        import torch

        if self.base.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
