"""`cartridges build` as a Ray job: what the cluster needs is uploaded, its log is followed.

The client uploads its own `cartridges` and `workflows` packages and the small input files, so that
the cluster runs the same code on the same bytes. What is large, and all that the build writes, must
lie where the cluster can reach it. There, `python -m workflows.cli.submit BUILD-ARGUMENTS` runs the
build and prints its JSON on one marked line of the job's log.
"""

import asyncio
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PACKAGES = ("cartridges", "workflows")
UPLOAD_LIMIT_BYTES = 64 * 2**20
"""Ray keeps an upload in the head's memory and refuses more than 100 MiB; code takes some of it."""
RESULT_MARK = "CARTRIDGES-RESULT "
POLL_SECONDS = 1.0
RECONNECTS = 5
"""How often a lost log connection is opened again while the job still runs."""
FLAGS = ("--json", "--curriculum", "--each")
"""Options of `build` without a value; every other one takes one."""
INPUT_OPTIONS = ("--questions", "--config")
OUTPUT_OPTIONS = ("--registry", "--workdir")


def submit(args: list[str], address: str | None = None, wait: bool = True,
           env: dict[str, str] | None = None, shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run `cartridges build *args` on the cluster whose job server (dashboard) is at `address`.

    `address` defaults to `RAY_API_SERVER_ADDRESS`, else this machine's. Inputs below one of the
    `shared` directories (default: `CARTRIDGES_SHARED`, separated by `:`) are not uploaded. `env`
    goes to the job's environment, which everyone with access to the dashboard can read: no secrets.
    With `wait`, the job's log goes to stderr and the call returns when the job has ended.

    Returns `{"job_id", "address", "status", "message", "build"}`: `status` is Ray's (`PENDING`,
    `RUNNING`, `SUCCEEDED`, `FAILED`, `STOPPED`), `build` the build's JSON or None. Raises `UserError`
    if the arguments cannot work on a cluster or the job server cannot be reached.
    """
    shared = shared or tuple(filter(None, os.environ.get("CARTRIDGES_SHARED", "").split(":")))
    with tempfile.TemporaryDirectory(prefix="cartridges-submit-") as scratch:
        staging = Path(scratch) / "job"
        job_args = stage_inputs(args, staging, shared)
        client = connect(address)
        job_id = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "workflows.cli.submit", *job_args]),
            runtime_env={"working_dir": _archive(staging),
                         "env_vars": {"PYTHONUNBUFFERED": "1", **(env or {})}},
            metadata={"command": shlex.join(["cartridges", "build", *args])})
    print(f"submitted {job_id} to {client.get_address()}", file=sys.stderr)
    result = _follow(client, job_id) if wait else None
    info = client.get_job_info(job_id)
    return {"job_id": job_id, "address": client.get_address(), "status": info.status.value,
            "message": _first_line(info.message or ""), "build": result}


def _first_line(message: str) -> str:
    """What happened, without the end of the log that Ray appends."""
    return message.partition("\n")[0].partition(", last available logs")[0]


def stage_inputs(args: list[str], staging: Path, shared: tuple[str, ...] = ()) -> list[str]:
    """Copy the input files named by the build's `args` into `staging`; the job's arguments.

    Raises `UserError`, one line, for an input that is missing or too large to upload, and for an
    output that would be lost with the job.
    """
    job_args = _with_registry(_separate_values(args))
    options = {job_args[i]: i + 1 for i in _option_positions(job_args)}
    inputs = [_corpus_position(job_args), *(options[name] for name in INPUT_OPTIONS if name in options)]
    for position in inputs:
        job_args[position] = _staged(job_args[position], staging, f"inputs/{position}", shared)
    for name in OUTPUT_OPTIONS:
        if name in options:
            _check_output(name, job_args[options[name]])
    if "--workdir" not in options:
        print("no --workdir: this works on a cluster of one machine, and cannot be resumed; give an absolute "
              "path that the cluster shares", file=sys.stderr)
    if "--model" in options:
        _check_model(job_args[options["--model"]])
    return job_args


def _with_registry(args: list[str]) -> list[str]:
    """`args` with the registry said: the cluster does not know this machine's default."""
    if "--registry" in args:
        return args
    default = os.environ.get("CARTRIDGES_REGISTRY")
    if not default:
        raise UserError("a job needs --registry: a URL (s3://bucket/registry) or an absolute path "
                        "that the cluster shares; what a job writes elsewhere is lost with it")
    return [*args, "--registry", default]


def _separate_values(args: list[str]) -> list[str]:
    """`--name=value` as two arguments."""
    return [part for arg in args
            for part in (arg.split("=", 1) if arg.startswith("--") and "=" in arg else [arg])]


def _option_positions(args: list[str]) -> list[int]:
    """Where the options that take a value stand. Raises `UserError` for one without its value."""
    positions, i = [], 0
    while i < len(args):
        takes_value = args[i].startswith("--") and args[i] not in FLAGS
        if takes_value:
            if i + 1 == len(args):
                raise UserError(f"{args[i]} needs a value")
            positions.append(i)
        i += 2 if takes_value else 1
    return positions


def _corpus_position(args: list[str]) -> int:
    taken = {position + offset for position in _option_positions(args) for offset in (0, 1)}
    free = [i for i, arg in enumerate(args) if i not in taken and arg not in FLAGS]
    if len(free) != 1:
        raise UserError("the build to submit needs one CORPUS: "
                        "cartridges submit -- CORPUS --name NAME --registry ROOT")
    return free[0]


def _staged(value: str, staging: Path, folder: str, shared: tuple[str, ...]) -> str:
    """`value` as the job must read it: below the upload, or unchanged where the cluster has it."""
    path = Path(value)
    if "://" in value or any(path.is_relative_to(root) for root in shared):
        return value
    if not path.exists():
        if path.is_absolute():
            print(f"{value} is not on this machine; the cluster must have it", file=sys.stderr)
            return value
        raise UserError(f"{value} does not exist; give a file here, or its absolute path on the cluster")
    size = _size(path)
    if size > UPLOAD_LIMIT_BYTES:
        raise UserError(
            f"{value} has {size / 2**20:.0f} MiB, more than the {UPLOAD_LIMIT_BYTES / 2**20:.0f} that can "
            "be uploaded: put it on a file system that the cluster shares and name it in CARTRIDGES_SHARED")
    target = staging / folder / path.resolve().name
    target.parent.mkdir(parents=True)
    if path.is_dir():
        shutil.copytree(path, target, ignore_dangling_symlinks=True)
    else:
        shutil.copy2(path, target)
    return target.relative_to(staging).as_posix()


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _check_output(option: str, value: str) -> None:
    if "://" not in value and not Path(value).is_absolute():
        raise UserError(f"{option} {value} would be lost with the job: give a URL (s3://bucket/path) or an "
                        "absolute path that the cluster shares")


def _check_model(value: str) -> None:
    if not Path(value).is_absolute() and Path(value).is_dir():
        raise UserError(f"--model {value} is a directory on this machine: give a hub id, or the absolute "
                        "path that it has on the cluster")


def _archive(staging: Path) -> str:
    """A zip of `staging` and our packages.

    Ray would pack a directory itself, but leaves out what any `.gitignore` in a corpus names.
    """
    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        shutil.copytree(root / package, staging / package, ignore=shutil.ignore_patterns("__pycache__"))
    return shutil.make_archive(str(staging.parent / "upload"), "zip", staging)


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


class JobLog:
    """Prints a job's log line by line to stderr, and keeps the marked result out of it."""

    def __init__(self):
        self.result: dict[str, Any] | None = None
        self.characters = 0
        self._line = ""

    def feed(self, text: str) -> None:
        self.characters += len(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line)

    def close(self) -> None:
        if self._line:
            self._take(self._line)
            self._line = ""

    def _take(self, line: str) -> None:
        if line.startswith(RESULT_MARK):
            self.result = json.loads(line.removeprefix(RESULT_MARK))
        else:
            print(line, file=sys.stderr)


def _follow(client: "JobSubmissionClient", job_id: str) -> dict[str, Any] | None:
    log = JobLog()
    try:
        _follow_to_the_end(client, job_id, log)
    except KeyboardInterrupt:
        print(f"the job goes on; `ray job stop {job_id} --address {client.get_address()}` ends it",
              file=sys.stderr)
        raise
    log.close()
    return log.result


def _follow_to_the_end(client: "JobSubmissionClient", job_id: str, log: JobLog) -> None:
    import aiohttp
    import requests

    lost = 0
    while True:
        try:
            asyncio.run(_tail(client, job_id, log))
            if client.get_job_status(job_id).is_terminal():
                return
        except (RuntimeError, aiohttp.ClientError, requests.ConnectionError):
            lost += 1
            if lost > RECONNECTS:
                raise
        time.sleep(POLL_SECONDS)


async def _tail(client: "JobSubmissionClient", job_id: str, log: JobLog) -> None:
    """Feed what `log` has not seen; the server sends every log from its beginning."""
    seen = log.characters
    async for text in client.tail_job_logs(job_id):
        log.feed(text[seen:])
        seen = max(0, seen - len(text))


def main(args: list[str]) -> int:
    """On the cluster: the build, its JSON as one marked line of the job's log."""
    command = [sys.executable, "-m", "workflows.cli", "build", *args, "--json"]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.stdout.strip():
        print(RESULT_MARK + json.dumps(json.loads(done.stdout)), flush=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
