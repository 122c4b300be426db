"""`cartridges bench load`: many registered corpora, asked unevenly, on one replica that holds a few of them.

The service is the one that `cartridges serve` starts, asked over HTTP. Its peer in the same run is itself with
nothing to load: the same questions over as many corpora as it can hold.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from cartridges.config import BuildSettings
from cartridges.serve_config import ReplicaSettings
from workflows.bench.arms import Cartridges, questions
from workflows.bench.serve import choose_engine
from workflows.runtime.progress import Progress

COLD = 5
"""Requests to a corpus that is not loaded, each followed by the same once more."""
COUNTERS = {"hits": "cartridges_cache_hits", "misses": "cartridges_cache_misses",
            "loads": "cartridges_loads", "evictions": "cartridges_evictions"}
NOTES = (
    "cartridges are untrained: windows of a text's KV. Speed does not depend on training; answers do",
    "skewed: corpus i is asked with a probability in proportion to 1 / i ** skew; resident: as many corpora as are "
    "held, each as often, all loaded before",
    "ratios are medians over runs of skewed over resident; cold_ttft is a first request on a corpus over its second",
    "seconds are the clients', over HTTP; one run of each was not counted",
)


@dataclass(frozen=True)
class Load:
    """How many corpora are registered and how many are held at once, how they are asked, and for how much."""

    corpora: int
    resident: int
    requests: int
    clients: int
    skew: float
    num_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Answer:
    """Of one request: seconds to the first token and to the last, and the tokens; an error's name instead."""

    ttft_s: float
    seconds: float
    tokens: int
    error: str | None = None


def bench_load(settings: BuildSettings, load: Load, runs: int) -> dict[str, Any]:
    """`runs` counted runs: ratios of skewed over resident, what was loaded and put out, and the rows."""
    from cartridges.evaluation.report_card import machine
    from cartridges.models import load_base_model

    base = load_base_model(settings.model)
    with tempfile.TemporaryDirectory() as directory:
        size = _register(base, load, Path(directory))
        wanted = settings.serve.model_copy(update={
            "port": 0, "resident_bytes": size * load.resident, "max_queue": max(load.clients, settings.serve.max_queue),
            "shared": ReplicaSettings(min_replicas=1, max_replicas=1)})
        rows, cold = _measure(directory, settings.model_copy(update={"serve": wanted}), load, runs)
    return summarize(rows, cold, load) | {"engine": choose_engine(settings.serve.engine), "runs": runs,
                                          "machine": machine(base)}


def _register(base, load: Load, root: Path) -> int:
    """Publish the cartridges; bytes that the service takes for one."""
    from cartridges import artifact
    from cartridges.registry import Registry

    registry, made = Registry(root / "registry"), Cartridges(base, load.num_tokens, load.corpora)
    with Progress(load.corpora, "bench load", "cartridges") as progress:
        for number in range(load.corpora):
            record = artifact.CorpusRecord(id=_name(number), fingerprint=_name(number), tokens=10 * load.num_tokens)
            artifact.save(root / "artifact", made.make(load.num_tokens, number).cartridge, model=base.identity,
                          corpus=record, settings={})
            registry.publish(_name(number), root / "artifact")
            progress.update()
    return base.shape.bytes_per_token(4) * load.num_tokens  # float32, as a replica holds them


def _name(number: int) -> str:
    return f"corpus-{number}"


def _measure(directory: str, settings: BuildSettings, load: Load, runs: int
             ) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    from workflows.serving.serve import running_service

    with running_service(str(Path(directory) / "registry"), settings) as service:
        return asyncio.run(_Clients(service.url, load).measure(runs))


class _Clients:
    """`load.clients` clients, each asking again as soon as it is answered."""

    def __init__(self, url: str, load: Load):
        from openai import AsyncOpenAI

        self.url, self.load, self.rng = url, load, np.random.default_rng(0)
        self.client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self.questions = cycle(questions())

    async def measure(self, runs: int) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
        """Rows of the arms in turns, and of the single requests on corpora that are not loaded."""
        rows = []
        with Progress(2 * (runs + 1), "bench load", "measurements") as progress:
            for number in range(runs + 1):
                for arm in ("resident", "skewed") if number % 2 else ("skewed", "resident"):
                    row = {"run": number, "arm": arm, **await self._run(arm)}
                    rows += [row] if number else []
                    progress.update(note=arm)
        return rows, [await self._cold(number) for number in range(COLD)]

    async def _run(self, arm: str) -> dict[str, Any]:
        if arm == "resident":
            for number in range(self.load.resident):
                await self._ask(number)
        drawn = self._draw(arm)
        before, started = await self._counters(), time.perf_counter()
        asked = iter(drawn)

        async def client() -> list[Answer]:
            return [await self._ask(number) for number in asked]

        answers = sum(await asyncio.gather(*(client() for _ in range(self.load.clients))), [])
        seconds, after = time.perf_counter() - started, await self._counters()
        good = [answer for answer in answers if answer.error is None]
        return {"seconds": seconds, "requests_per_s": len(good) / seconds,
                "tokens_per_s": sum(answer.tokens for answer in good) / seconds,
                "ttft_s": statistics.median(answer.ttft_s for answer in good) if good else None,
                "corpora": len(set(drawn)), "errors": [answer.error for answer in answers if answer.error],
                **{name: after[name] - before[name] for name in COUNTERS}}

    def _draw(self, arm: str) -> list[int]:
        """The corpora of the requests, in order."""
        if arm == "resident":
            return list(islice(cycle(range(self.load.resident)), self.load.requests))
        weights = 1 / np.arange(1, self.load.corpora + 1) ** self.load.skew
        return self.rng.choice(self.load.corpora, self.load.requests, p=weights / weights.sum()).tolist()

    async def _cold(self, number: int) -> dict[str, float]:
        """The least asked corpora: the last ones."""
        corpus = self.load.corpora - 1 - number
        before = await self._counters()
        first, again = await self._ask(corpus), await self._ask(corpus)
        loaded = (await self._counters())["loads"] - before["loads"]
        return {"cold_s": first.ttft_s, "warm_s": again.ttft_s, "loads": loaded}

    async def _ask(self, corpus: int) -> Answer:
        from openai import OpenAIError

        started, first, tokens = time.perf_counter(), None, 0
        try:
            stream = await self.client.chat.completions.create(
                model=_name(corpus), messages=[{"role": "user", "content": next(self.questions)}], temperature=0,
                max_tokens=self.load.output_tokens, stream=True, stream_options={"include_usage": True})
            async for event in stream:
                if event.choices and first is None:
                    first = time.perf_counter() - started
                tokens = event.usage.completion_tokens if event.usage else tokens
        except OpenAIError as error:
            return Answer(0.0, time.perf_counter() - started, 0, type(error).__name__)
        seconds = time.perf_counter() - started
        return Answer(seconds if first is None else first, seconds, tokens)

    async def _counters(self) -> dict[str, float]:
        """The service's own counters, summed over models."""
        import httpx
        from prometheus_client.parser import text_string_to_metric_families

        async with httpx.AsyncClient(timeout=60) as client:
            text = (await client.get(f"{self.url}/metrics")).text
        sums = {family.name: sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
                for family in text_string_to_metric_families(text)}
        return {name: sums.get(metric, 0.0) for name, metric in COUNTERS.items()}


def summarize(rows: list[dict[str, Any]], cold: Sequence[dict[str, float]], load: Load) -> dict[str, Any]:
    """Ratios as medians over runs, sums over the skewed runs, the settings and the rows."""
    skewed, resident = ([row for row in rows if row["arm"] == arm] for arm in ("skewed", "resident"))
    hits, misses = (sum(row[name] for row in skewed) for name in ("hits", "misses"))
    loads = [one for one in cold if one["loads"]]
    return {
        "ratios": {"throughput": _median(skewed, resident, "requests_per_s"),
                   "ttft": _median(skewed, resident, "ttft_s"),
                   "cold_ttft": statistics.median(one["cold_s"] / one["warm_s"] for one in loads) if loads else None},
        "hit_share": hits / max(hits + misses, 1), "loads": sum(row["loads"] for row in skewed),
        "evictions": sum(row["evictions"] for row in skewed), "errors": sum(len(row["errors"]) for row in rows),
        "load": asdict(load), "rows": rows, "cold": list(cold), "notes": list(NOTES)}


def _median(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> float | None:
    ratios = [a[key] / b[key] for a, b in zip(over, under, strict=True) if a[key] and b[key]]
    return statistics.median(ratios) if ratios else None
