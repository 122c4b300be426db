"""How an answer grows and ends: the same in every engine."""

from collections.abc import Sequence

from cartridges.engines.base import Request, TokenEvent
from cartridges.engines.detokenize import TextStream


class Answer:
    """The answer to one request, token by token: its readable text, and why it ended.

    With `detokenize` False there is no text; callers without stop strings decode the whole answer at the end.
    """

    def __init__(self, request: Request, tokenizer, stop_ids: frozenset[int], detokenize: bool = True):
        self.request, self.stop_ids, self.detokenize = request, stop_ids, detokenize
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._text = TextStream(tokenizer, request.stop)

    def take(self, token_id: int, engine_reason: str | None = None) -> str:
        """The text that became readable with `token_id`. Sets `finish_reason` when the answer ends.

        `engine_reason` is the reason for which the engine itself stops after this token.
        """
        self.token_ids.append(token_id)
        ended = token_id in self.stop_ids and not self.request.ignore_end
        piece = self._text.push(token_id) if self.detokenize and not ended else ""
        if ended or self._text.stopped:
            self.finish_reason = "stop"
        else:
            self.finish_reason = "length" if len(self.token_ids) >= self.request.max_tokens else engine_reason
        return piece + self._text.finish() if self.finish_reason else piece

    def event(self, token_id: int, logprob, topk_ids=None, topk_logprobs=None,
              engine_reason: str | None = None) -> TokenEvent:
        """`take`, as the event of a stream. The top k are arrays or tensors `[topk]`, None where not asked for."""
        text = self.take(token_id, engine_reason)
        topk = [() if row is None else tuple(row.tolist()) for row in (topk_ids, topk_logprobs)]
        return TokenEvent(token_id, text, float(logprob), *topk, self.finish_reason)


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first stop string in it."""
    return text[: min((text.index(string) for string in stop if string in text), default=len(text))]


def stop_token_ids(generation_config, tokenizer) -> frozenset[int]:
    """End-of-turn tokens: the model's generation settings and the tokenizer's EOS."""
    declared = generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in [*declared, tokenizer.eos_token_id] if i is not None)
