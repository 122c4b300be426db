"""A Ray for the length of one command: joined when there is one, started here when there is none."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

OBJECT_STORE_BYTES = 512 * 2**20
"""Enough for the batches in flight; Ray's default takes a third of a laptop's memory."""
START_ATTEMPTS = 10
_keeping: ExitStack | None = None


@contextmanager
def one_local_ray() -> Iterator[None]:
    """Within it, the first `local_ray` that starts or joins a Ray leaves it to the later ones; gone when it ends."""
    global _keeping
    before = _keeping
    with ExitStack() as _keeping:
        try:
            yield
        finally:
            _keeping = before


@contextmanager
def local_ray(num_cpus: int | None = None) -> Iterator[None]:
    """Joins `RAY_ADDRESS` (or the Ray this process already has), else starts one on loopback.

    `num_cpus` is how many *logical* CPUs a Ray started here offers; None offers at least four, so
    that on a small machine the light tasks (reading, writing, filtering) are scheduled beside the
    one actor that computes. Threads are set by each actor, not by this number. Whatever was started
    here is gone when the context ends, by an error or Ctrl-C too; inside `one_local_ray`, when that one ends.
    """
    join = bool(os.environ.get("RAY_ADDRESS"))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray Data's actors make the driver's C++ side print an error that is none; what matters is raised.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not join:
        # Read once when ray is imported; off means every server binds to loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray takes SIGTERM over: `sys.exit` in Python, and a stack trace by its C++ side. Whoever has a handler keeps it.
    in_main, before = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGTERM)
    # It says at every start that the default (token authentication) is the default.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel("ERROR")
    if join:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        _start(num_cpus)
    if in_main and callable(before):
        signal.signal(signal.SIGTERM, before)
    with ExitStack() as own:
        (_keeping or own).callback(ray.shutdown)
        yield


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Ray's C++ side says at every start, below Python's stderr, that it has read the log level set above. What goes
    wrong is raised."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _start(num_cpus: int | None) -> None:
    """`ray.init`, again where the machine was too busy: it gives its processes 30 s, not adjustable."""
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _stderr_closed():
                ray.init(
                    address="local",
                    num_cpus=num_cpus or max(4, os.cpu_count() or 1),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            return
        except Exception as error:  # Ray raises a bare Exception for this
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS:
                raise
            ray.shutdown()
