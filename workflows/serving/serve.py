"""`cartridges serve`: the HTTP service on Ray Serve, from start to the last process gone."""

import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from workflows.runtime.local_ray import local_ray

log = logging.getLogger(__name__)

APP = "cartridges"

DRAIN_PATIENCE_S = 10.0
"""Seconds beyond `serve.drain_s` after which stopping goes on without the ingress' answer."""


@dataclass(frozen=True)
class Service:
    """A running service: where it listens, and the model names it offers."""

    url: str
    models: tuple[str, ...]


def serve(registry: str, settings: BuildSettings) -> None:
    """Run the service until Ctrl-C or SIGTERM, then finish what runs and stop all that was started."""
    with _interrupted_by_signals() as install_handlers, running_service(registry, settings) as service:
        install_handlers()  # Ray has put its own there.
        names = ", ".join(service.models[:20])
        _say(f"serving {len(service.models)} models at {service.url}/v1: {names}")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            _say(f"stopping; running requests have {settings.serve.drain_s:g} s to finish")


@contextmanager
def running_service(registry: str, settings: BuildSettings) -> Iterator[Service]:
    """The service in a Ray of its own (or that of RAY_ADDRESS), once it answers; stopped when the block ends.

    Raises `UserError` for a wrong model, an unknown cartridge or a port that is taken, before anything is
    started.
    """
    registry, settings = _absolute(registry), _with_absolute_files(settings)
    _check_access(settings)
    models = _check(registry, settings)
    # A proxy gets five seconds to start, which a busy machine needs for its imports alone; then it is killed.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    port = settings.serve.port or _free_port(settings.serve.host)
    _check_port(settings.serve.host, port)
    url = f"http://{settings.serve.host}:{port}"
    with ExitStack() as ended, ExitStack() as started:
        started.enter_context(local_ray())
        _deploy(registry, settings, port, started)
        started.callback(_hush, ended)  # the last is the first to be called
        _wait(url)
        yield Service(url, models)


def _deploy(registry: str, settings: BuildSettings, port: int, started: ExitStack) -> None:
    """Start Serve and the applications; `started` stops them."""
    from ray import serve as ray_serve

    from workflows.serving.deployments import build_app, run_dedicated

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ours = not _serve_is_running()
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": settings.serve.host, "port": port},
                    logging_config={"log_level": "WARNING", "enable_access_log": False})
    # Of a Serve that was here before, our applications go and it stays; ours goes whole and at once, because a
    # proxy without its application would answer 404, which clients take for an answer.
    started.callback(ray_serve.shutdown if ours else _delete_apps)
    for name, replicas in settings.serve.dedicated.items():
        run_dedicated(name, registry, settings, replicas)
    plain = settings.model_dump(mode="json")
    ray_serve.run(build_app({"registry": registry, "settings": plain}), name=APP, route_prefix="/")
    started.callback(_drain, settings.serve.drain_s)


def _hush(ended: ExitStack) -> None:
    """Until `ended` closes, Ray says nothing on stdout: it would tell that the calls that end its controller failed."""
    ended.enter_context(redirect_stdout(io.StringIO()))


def _drain(seconds: float) -> None:
    """The ingress refuses new requests, and those it has accepted have `seconds` to finish."""
    from ray import serve as ray_serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        ray_serve.get_app_handle(APP).broadcast("drain").results(timeout_s=seconds + DRAIN_PATIENCE_S)
    except (RayError, RayServeException, TimeoutError) as error:  # It has not started, or is gone already.
        log.warning("not drained: %s", error)


def _delete_apps() -> None:
    from ray import serve as ray_serve

    from workflows.serving.deployments import DEDICATED

    # The ingress first: what it has accepted still finds its replicas.
    names = sorted(ray_serve.status().applications, key=lambda name: name != APP)
    for name in names:
        if name == APP or name.startswith(DEDICATED):
            try:
                ray_serve.delete(name)
            except TimeoutError:  # What follows ends it without asking; a cluster's Serve goes on trying.
                _say(f"{name} did not stop in time")


def _serve_is_running() -> bool:
    from ray import serve as ray_serve

    return bool(ray_serve.status().proxies)


def _check(registry: str, settings: BuildSettings) -> tuple[str, ...]:
    """The model names. A user's mistakes are found here, where they can be told in one line."""
    from cartridges.models import load_identity, resolve_model_dir
    from cartridges.registry import Registry
    from workflows.serving.catalog import Catalog

    opened, identity = Registry(registry), load_identity(resolve_model_dir(settings.model))
    catalog = Catalog(opened, identity)
    for ref in (*settings.serve.cartridges, *settings.serve.dedicated):
        try:
            catalog.resolve(ref)
        except Exception as error:
            raise UserError(f"serve settings: {error}") from None
    offered = Catalog(opened, identity, settings.serve.cartridges).entries()
    return (identity.name, *(entry.name for entry in offered))


def _check_access(settings: BuildSettings) -> None:
    """Raises `UserError` for a keys file or an audit log that cannot be opened, and for a network without keys."""
    from workflows.serving.access import Authenticator, is_loopback
    from workflows.serving.access_middleware import AuditLog

    serve_ = settings.serve
    Authenticator(serve_.keys_file)
    if serve_.audit_log is not None:
        AuditLog(serve_.audit_log, lambda: None)
    if serve_.keys_file is None and not serve_.open_to_network and not is_loopback(serve_.host):
        raise UserError(f"serve.host {serve_.host} would open the service to the network without API keys; make "
                        "some (`cartridges keys add`) and set serve.keys_file, or set serve.open_to_network=true")


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, "
                            "or 0 for a free one") from None


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _wait(url: str, patience_s: float = 60) -> None:
    """Until the proxy has the route (it may come a moment after the app is up)."""
    import httpx

    deadline = time.monotonic() + patience_s
    while True:
        try:
            if httpx.get(f"{url}/healthz", timeout=patience_s).status_code == 200:
                return
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not answer as the service after {patience_s:g} s")
        time.sleep(0.2)


def _absolute(registry: str) -> str:
    """Replicas may have another working directory."""
    return registry if "://" in registry else os.path.abspath(registry)


def _with_absolute_files(settings: BuildSettings) -> BuildSettings:
    files = {name: os.path.abspath(path) for name in ("keys_file", "audit_log")
             if (path := settings.serve.model_dump()[name]) is not None}
    return settings.model_copy(update={"serve": settings.serve.model_copy(update=files)})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _interrupted_by_signals() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM raise `KeyboardInterrupt`; what it yields sets that up once more."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def install() -> None:
        for number in numbers:
            signal.signal(number, _interrupt)

    install()
    try:
        yield install
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt
