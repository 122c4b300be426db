"""Submits a build to a Ray cluster's job server."""

import argparse
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges.errors import UserError
from workflows.job.inputs import archive, stage_inputs
from workflows.job.log import follow

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def submit(build: argparse.Namespace, to_words: Callable[[argparse.Namespace], list[str]], address: str | None = None,
           wait: bool = True, env: dict[str, str] | None = None, driver_gpus: float = 0) -> dict[str, Any]:
    """Run `cartridges build` with the arguments `build` on the cluster whose job server (dashboard) is at `address`.

    `to_words` writes such arguments as a command line. `address` defaults to `RAY_API_SERVER_ADDRESS`, else this
    machine's. `env` goes to the job's environment, which everyone with access to the dashboard can read: no secrets.
    With `driver_gpus` the driver, which calibrates a budget and makes the report card, runs on a node with GPUs.
    With `wait`, the job's log goes to stderr and the call returns when the job has ended.

    Returns `{"job_id", "address", "status", "message", "build"}`: `status` is Ray's (`PENDING`,
    `RUNNING`, `SUCCEEDED`, `FAILED`, `STOPPED`), `build` the build's JSON or None. Raises `UserError`
    if the arguments cannot work on a cluster or the job server cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="cartridges-submit-") as scratch:
        staging = Path(scratch) / "job"
        words = to_words(stage_inputs(build, staging))
        client = connect(address)
        job_id = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "workflows.job.entrypoint", *words]),
            entrypoint_num_gpus=driver_gpus or None,
            runtime_env={"working_dir": archive(staging),
                         "env_vars": {"PYTHONUNBUFFERED": "1", **(env or {})}},
            metadata={"command": shlex.join(["cartridges", "build", *to_words(build)])})
    print(f"submitted {job_id} to {client.get_address()}", file=sys.stderr)
    result = follow(client, job_id) if wait else None
    info = client.get_job_info(job_id)
    return {"job_id": job_id, "address": client.get_address(), "status": info.status.value,
            "message": _first_line(info.message or ""), "build": result}


def _first_line(message: str) -> str:
    """The first line, without the end of the log that Ray appends."""
    return message.partition("\n")[0].partition(", last available logs")[0]


def connect(address: str | None = None) -> "JobSubmissionClient":
    """A client of the job server, with the token that Ray's own commands would send.

    Raises `UserError` if nothing answers there, if it is no job server, or if it refuses the token.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)  # it tells of each request
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    address = address if "://" in address else f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{address} is not a job server: give the dashboard's URL, such as {DEFAULT_ADDRESS}")
    token = auth_token()
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    except AuthenticationError:
        raise UserError(f"{address} refuses {'this' if token else 'a client without a'} token: put the "
                        "cluster's into RAY_AUTH_TOKEN or ~/.ray/auth_token") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"no Ray job server answers at {address} ({str(error).splitlines()[0]}); "
                        "give the dashboard's URL with --address") from None


def auth_token() -> str | None:
    """The cluster's token, from where Ray keeps it; None if there is none or `RAY_AUTH_MODE=disabled`.

    Read here, because Ray's client sends it only under `RAY_AUTH_MODE=token`, which it reads once at
    import, while a cluster asks for it by default.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() or None if file.is_file() else None
