"""`cartridges bench serve`: the same questions through full context and through cartridges, in one run.

Full context has prefix caching on and its prompts resident, as the cartridges are. Both arms get the same
budget of KV bytes, the same questions and the same forced length of answer, on one engine, in turns.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle
from typing import Any

from cartridges.config import BuildSettings
from cartridges.engine_config import EngineName
from cartridges.engines.base import Engine, Request
from cartridges.forward import round_up
from workflows.bench.arms import (
    BLOCK,
    Arm,
    Cartridges,
    Contexts,
    Sizes,
    batch_size,
    fit_contexts,
    make_arms,
    questions,
)
from workflows.bench.extrapolate import extrapolate
from workflows.runtime.progress import Progress

FIRST_TOKENS = 3
"""Single requests whose median is a run's time to first token."""
NOTES = (
    "cartridges are untrained: windows of a text's KV. Speed does not depend on training; answers do",
    "every request has a corpus of its own unless a row says otherwise; all prefixes are resident",
    "ratios are medians over runs: full context over cartridge for times and bytes, the other way for throughput",
    "decode is of the steps after the first token, at the largest batch that fits the KV budget",
    "one run on each arm and context was not counted",
)


def bench_serve(settings: BuildSettings, contexts: Sequence[int], num_tokens: int | None, kv_budget: int,
                output_tokens: int, runs: int, max_batch: int, one_corpus: bool = False) -> dict[str, Any]:
    """`runs` counted runs of every context. `kv_budget` is in bytes; p is `num_tokens` or a tenth.

    `one_corpus` also measures batches whose requests all ask about one corpus, which share its KV.
    """
    from cartridges.evaluation.report_card import machine
    from cartridges.models import load_base_model

    base = load_base_model(settings.model)
    asked = [base.template.conversation_ids([{"role": "user", "content": text}]) for text in questions()]
    own = max(map(len, asked)) + output_tokens
    bytes_per_token = base.shape.bytes_per_token(base.dtype.itemsize)
    sizes = fit_contexts(contexts, num_tokens, own, base.identity.max_position_embeddings, bytes_per_token)
    corpora = ("one each", "one") if one_corpus else ("one each",)
    plans = [(size, kind) for size in sizes for kind in corpora]
    for size in sizes:  # a budget that is too small is found before anything is measured
        batch_size("full_context", size, "one each", kv_budget, max_batch)
    cartridges = Cartridges(base, max(size.cartridge for size in sizes), max_batch)
    texts, where = Contexts(base.template), machine(base)
    kind_of_engine = choose_engine(settings.serve.engine)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        # Both arms stay resident; what a run's questions left behind must find room as well.
        room = 2 * kv_budget + 4 * max(size.request_bytes("full_context") for size in sizes)
        engine = stack.enter_context(_Opened(kind_of_engine, base, settings, room, max_batch))
        progress = stack.enter_context(Progress(len(plans) * (runs + 1) * 2, "bench serve", "measurements"))
        for size, kind in plans:
            arms = make_arms(size, kind, kv_budget, max_batch, texts, cartridges)
            rows += Measurement(engine, arms, size, cycle(asked), output_tokens).run(runs, progress)
    return summarize(rows, sizes, num_tokens, kv_budget, max_batch, runs) | {
        "engine": kind_of_engine, "kv_budget_bytes": kv_budget, "max_batch": max_batch,
        "output_tokens": output_tokens, "machine": where}


def choose_engine(setting: EngineName) -> str:
    """vLLM where it is installed, unless the settings say otherwise."""
    from cartridges.engines.vllm_setup import wants_vllm

    return "vllm" if wants_vllm(setting, "--engine") else "transformers"


class _Opened:
    """The engine of that name, closed with the block. Its KV cache has `room` bytes."""

    def __init__(self, name: str, base, settings: BuildSettings, room: int, max_batch: int):
        self.name, self.base, self.settings, self.room, self.max_batch = name, base, settings, room, max_batch

    def __enter__(self) -> Engine:
        if self.name == "transformers":
            from cartridges.engines.transformers import TransformersEngine

            return TransformersEngine(self.base, self.max_batch, self.room)
        from cartridges.engines.vllm import VllmEngine
        from cartridges.models import resolve_model_dir

        dtype = str(self.base.dtype).removeprefix("torch.")
        # The budget is the bench's; a cache of another dtype than the model's would be another measurement.
        self.engine = VllmEngine(resolve_model_dir(self.settings.model), self.settings.vllm.model_copy(update={
            "dtype": dtype, "kv_cache_bytes": self.room, "block_size": BLOCK, "max_num_seqs": self.max_batch}))
        return self.engine

    def __exit__(self, *exception: object) -> None:
        if self.name == "vllm":
            self.engine.close()


class Measurement:
    """Both arms on one engine, in turns, each run with fresh questions."""

    def __init__(self, engine: Engine, arms: list[Arm], sizes: Sizes, asked: Iterator[list[int]],
                 output_tokens: int):
        self.engine, self.arms, self.sizes, self.asked = engine, arms, sizes, asked
        self.output_tokens = output_tokens

    def run(self, runs: int, progress: Progress) -> list[dict[str, Any]]:
        cold = {arm.name: self._prime(arm) for arm in self.arms}
        rows = []
        for number in range(runs + 1):
            for arm in self.arms if number % 2 else self.arms[::-1]:
                row = {"run": number, **self._measure(arm), "cold_ttft_s": cold[arm.name]}
                rows += [row] if number else []
                progress.update(note=f"{arm.name}, {row['context_tokens']} tokens, batch {arm.batch}")
        return rows

    def _prime(self, arm: Arm) -> float:
        """Every prefix into the cache; seconds to the first token of the last one, which was not there."""
        last = len(arm.prefixes) - 1
        if last:
            self._seconds(self._requests(arm, range(last), 1))
        return self._seconds(self._requests(arm, [last], 1))

    def _measure(self, arm: Arm) -> dict[str, Any]:
        singles = [self._seconds(self._requests(arm, [number], 1)) for number in range(FIRST_TOKENS)]
        first = self._seconds(self._requests(arm, range(arm.batch), 1))
        whole = self._seconds(self._requests(arm, range(arm.batch), self.output_tokens))
        # None where noise made the batch's first token take longer than all of them.
        step = (whole - first) / (self.output_tokens - 1) if whole > first else None
        return {
            "arm": arm.name, "corpora": arm.corpora, "context_tokens": self.sizes.context,
            "num_tokens": self.sizes.cartridge, "prefix_tokens": self.sizes.prefix(arm.name),
            "own_tokens": self.sizes.own, "batch": arm.batch, "ttft_s": statistics.median(singles),
            "first_s": first, "whole_s": whole, "step_s": step,
            "decode_tokens_per_s": arm.batch / step if step else None,
            "kv_bytes_per_request": self._bytes(arm)}

    def _bytes(self, arm: Arm) -> float:
        if arm.corpora == "one each":
            return self.sizes.request_bytes(arm.name)
        own = round_up(self.sizes.own, BLOCK) * self.sizes.bytes_per_token
        return own + self.sizes.prefix(arm.name) * self.sizes.bytes_per_token / arm.batch

    def _requests(self, arm: Arm, numbers: Sequence[int], tokens: int) -> list[Request]:
        return [Request(tuple(next(self.asked)), arm.prefix(number), max_tokens=tokens, ignore_end=True)
                for number in numbers]

    def _seconds(self, requests: list[Request]) -> float:
        started = time.perf_counter()
        completions = self.engine.generate(requests)
        seconds = time.perf_counter() - started
        assert all(len(done.output_ids) == asked.max_tokens
                   for done, asked in zip(completions, requests, strict=True))
        return seconds


def summarize(rows: list[dict[str, Any]], sizes: Sequence[Sizes], num_tokens: int | None, kv_budget: int,
              max_batch: int, runs: int) -> dict[str, Any]:
    """Ratios for each context, the shared ones apart; the extrapolation; the rows."""
    own_corpora = [row for row in rows if row["corpora"] == "one each"]
    shared = [row for row in rows if row["corpora"] == "one"]
    result = {"ratios": [_ratios(own_corpora, size) for size in sizes],
              "extrapolation": extrapolate(own_corpora, sizes[0].own, sizes[0].bytes_per_token, kv_budget,
                                           max_batch, num_tokens),
              "rows": rows, "runs": runs, "notes": list(NOTES)}
    return result | ({"ratios_one_corpus": [_ratios(shared, size) for size in sizes]} if shared else {})


def _ratios(rows: list[dict[str, Any]], size: Sizes) -> dict[str, Any]:
    of = {arm: [row for row in rows if row["arm"] == arm and row["context_tokens"] == size.context
                and row["num_tokens"] == size.cartridge] for arm in ("full_context", "cartridge")}
    full, ours = of["full_context"], of["cartridge"]
    return {
        "context_tokens": size.context, "num_tokens": size.cartridge,
        "decode": _median(ours, full, "decode_tokens_per_s"), "ttft": _median(full, ours, "ttft_s"),
        "kv_bytes": _median(full, ours, "kv_bytes_per_request"),
        "cold_ttft": _median(full, ours, "cold_ttft_s"),
        "batch": {arm: found[0]["batch"] for arm, found in of.items()},
        "decode_tokens_per_s": {arm: _middle(row["decode_tokens_per_s"] for row in found)
                                for arm, found in of.items()},
        "ttft_s": {arm: _middle(row["ttft_s"] for row in found) for arm, found in of.items()}}


def _median(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> float | None:
    pairs = zip(over, under, strict=True)
    return _middle(a[key] / b[key] if a[key] and b[key] else None for a, b in pairs)


def _middle(values) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
