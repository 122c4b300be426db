"""Helpers of the serving tests: exact-KV cartridges in a registry, and a server on a free port."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

from cartridges.artifact import CorpusRecord, save
from cartridges.cartridge import Cartridge
from cartridges.config import ModelSettings
from cartridges.corpus_text import keep_text
from cartridges.engines.stream import TransformersStreamingEngine
from cartridges.models import load_base_model
from cartridges.registry import Registry
from cartridges.serve_config import ServeSettings
from workflows.serving.app import create_app
from workflows.serving.backend import LocalBackend
from workflows.serving.catalog import Catalog
from workflows.serving.metrics import Metrics
from workflows.serving.service import CartridgeService

PATIENCE = 800
"""Seconds for what takes long on a machine that does other things besides."""

TEXTS = {"harbour": "The harbour master of Quell is Ida Brand. The toll is 41 crowns a ship.",
         "orchard": "The orchard of Venn grows 730 pear trees, and its keeper is Tomas Reed."}


def load_stock(directory):
    """A copy of the tiny model of its own, with Hugging Face's attention until an engine puts ours into it."""
    return load_base_model(ModelSettings(name=str(directory), dtype="float32"), device="cpu")


def exact_cartridge(base, text: str) -> Cartridge:
    """The KV that the model itself computes for the system turn around `text`."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=base.model.config)
    with torch.no_grad():
        base.model(input_ids=torch.tensor([base.template.system_ids(text)]), past_key_values=cache)
    keys = torch.cat([layer.keys for layer in cache.layers])
    values = torch.cat([layer.values for layer in cache.layers])
    return Cartridge(keys, values)


def publish(base, registry: Registry, name: str, text: str, scratch, kept: str | None = None) -> str:
    """`kept`: the corpus' text to publish beside the cartridge."""
    cartridge = exact_cartridge(base, text)
    directory = scratch / f"{name}-{abs(hash(text))}"
    save(directory, cartridge, model=base.identity, dtype="float32", settings={},
         corpus=CorpusRecord(id=name, fingerprint="f" * 32, tokens=cartridge.num_tokens))
    if kept is not None:
        keep_text(directory, kept)
    return registry.publish(name, directory)


def make_registry(base, root, scratch, keep_text: bool = False) -> Registry:
    registry = Registry(root)
    for name, text in TEXTS.items():
        publish(base, registry, name, text, scratch, kept=text if keep_text else None)
    return registry


def make_service(base, registry: Registry, engine: TransformersStreamingEngine,
                 **settings) -> CartridgeService:
    chosen = ServeSettings(**settings)
    backend = LocalBackend(engine, registry, base.identity, chosen.resident_bytes, engine.forget)
    catalog = Catalog(registry, base.identity, chosen.cartridges)
    return CartridgeService(catalog, backend, base.template, chosen)


@contextmanager
def listening(service: CartridgeService) -> Iterator[str]:
    """Serve the service's app; yields the URL."""
    with listening_app(create_app(service)) as url:
        yield url


@contextmanager
def listening_app(app) -> Iterator[str]:
    """Serve an ASGI app by uvicorn in a thread; yields the URL."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


def value_of(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def serve_process(registry, model_dir, told: Path, *options: str) -> Iterator[subprocess.Popen]:
    """`cartridges serve` on a free port, in a Ray of its own; what it says goes to `told`."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "workflows.cli", "serve", "--registry", str(registry), "--port", "0",
               "--model", str(model_dir), *options]
    with told.open("wb") as stderr, told.with_suffix(".out").open("wb") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, cwd=root,
                                   env=os.environ | {"PYTHONPATH": str(root), "RAY_ADDRESS": ""})
    process.told = told
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def url_of(process: subprocess.Popen) -> str:
    """Where it listens, once it serves the base model and the two cartridges."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := re.search(r"serving 3 models at (http://127\.0\.0\.1:\d+)/v1", process.told.read_text()):
            return found[1]
        assert process.poll() is None, process.told.read_text()
        time.sleep(0.2)
    raise AssertionError(process.told.read_text())


def metric(url: str, line: str) -> float:
    """The samples of /metrics that begin with `line`, whichever replica they are of, as their sum."""
    text = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
    rows = [re.sub(r',?replica="\w+"', "", row).replace("{}", "") for row in text.splitlines()]
    return sum(float(row.rpartition(" ")[2]) for row in rows if row.startswith(line + " "))
