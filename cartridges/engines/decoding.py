"""A batch of the reference engine on its way: what its rows have produced, and whether they are done."""

import numpy as np
import torch

from cartridges.engines.base import Completion, Request
from cartridges.engines.sampling import Draws, sample
from cartridges.models import BaseModel


class Decoding:
    """What the rows of a batch have produced so far, and whether they are done."""

    def __init__(self, requests: list[Request], tokenizer, stop_ids: frozenset[int]):
        self.requests, self.tokenizer, self.stop_ids = requests, tokenizer, stop_ids
        self.outputs: list[list[int]] = [[] for _ in requests]
        self.reasons: list[str | None] = [None] * len(requests)
        self.kept: list[list[tuple]] = [[] for _ in requests]
        self.draws = [Draws(request.seed) for request in requests]
        self.temperatures = torch.tensor([request.temperature for request in requests])
        self.topk = max(request.topk for request in requests)

    def step(self, logprobs: torch.Tensor) -> torch.Tensor | None:
        """Take the next token of every row from T=1 `logprobs` `[B, V]`; None when all are done."""
        draws = torch.tensor([draw.next() for draw in self.draws])
        tokens = sample(logprobs, self.temperatures.to(logprobs.device),
                        [request.top_p for request in self.requests], draws)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0].cpu().numpy()
        if self.topk:
            top = logprobs.topk(self.topk, dim=-1)
            top_ids, top_logprobs = top.indices.cpu().numpy(), top.values.cpu().numpy()
        for row, token in enumerate(tokens.tolist()):
            if self.reasons[row] is None:
                self.outputs[row].append(token)
                k = self.requests[row].topk
                self.kept[row].append((chosen[row], top_ids[row, :k], top_logprobs[row, :k]) if k
                                      else (chosen[row],))
                self.reasons[row] = self._reason(row, token)
        return None if all(self.reasons) else tokens

    def _reason(self, row: int, token: int) -> str | None:
        request = self.requests[row]
        if token in self.stop_ids and not request.ignore_end:
            return "stop"
        if request.stop and any(stop in self._text(row) for stop in request.stop):
            return "stop"
        return "length" if len(self.outputs[row]) >= request.max_tokens else None

    def _text(self, row: int) -> str:
        return self.tokenizer.decode(self.outputs[row], skip_special_tokens=True)

    def completion(self, row: int) -> Completion:
        request, kept = self.requests[row], self.kept[row]
        text = self._text(row)
        cuts = [text.index(stop) for stop in request.stop if stop in text]
        text = text[: min(cuts)] if cuts else text
        logprobs = np.array([item[0] for item in kept], np.float32)
        top_ids = np.stack([item[1] for item in kept]).astype(np.int32) if request.topk else None
        top_logprobs = np.stack([item[2] for item in kept]) if request.topk else None
        return Completion(tuple(self.outputs[row]), text, self.reasons[row], logprobs, top_ids, top_logprobs)


def stop_token_ids(base: BaseModel) -> frozenset[int]:
    """End-of-turn tokens: the model's generation settings and the tokenizer's EOS."""
    declared = base.model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in [*declared, base.tokenizer.eos_token_id] if i is not None)
