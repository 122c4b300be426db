"""The rows of a batch while they are decoded: what each has produced, and whether it is done."""

import numpy as np
import torch

from cartridges.engines.answer import Answer, cut_at_stop
from cartridges.engines.base import Completion, Request
from cartridges.engines.sampling import Draws, sample


class Decoding:
    """A batch of `requests`, one row each, decoded together."""

    def __init__(self, requests: list[Request], tokenizer, stop_ids: frozenset[int]):
        self.requests, self.tokenizer = requests, tokenizer
        self.answers = [Answer(request, tokenizer, stop_ids, detokenize=bool(request.stop)) for request in requests]
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
        for row, (token, answer) in enumerate(zip(tokens.tolist(), self.answers, strict=True)):
            if answer.finish_reason is None:
                answer.take(token)
                k = self.requests[row].topk
                self.kept[row].append((chosen[row], top_ids[row, :k], top_logprobs[row, :k]) if k
                                      else (chosen[row],))
        return None if all(answer.finish_reason for answer in self.answers) else tokens

    def completion(self, row: int) -> Completion:
        request, answer, kept = self.requests[row], self.answers[row], self.kept[row]
        text = cut_at_stop(self.tokenizer.decode(answer.token_ids, skip_special_tokens=True), request.stop)
        logprobs = np.array([item[0] for item in kept], np.float32)
        top_ids = np.stack([item[1] for item in kept]).astype(np.int32) if request.topk else None
        top_logprobs = np.stack([item[2] for item in kept]) if request.topk else None
        return Completion(tuple(answer.token_ids), text, answer.finish_reason, logprobs, top_ids, top_logprobs)
