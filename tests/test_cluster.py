"""Submitting a build: inputs are uploaded, mistakes are named before the cluster sees them."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cartridges.errors import UserError
from workflows import submit as submission
from workflows.submit import JobLog, auth_token, connect, stage_inputs

ROOT = Path(__file__).resolve().parents[1]
REGISTRY = ["--registry", "s3://bucket/registry"]


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A folder with one text and a `.gitignore` that names it; the current directory is its parent."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("The tide gate opens at 06:40.")
    (folder / ".gitignore").write_text("a.txt\n")
    return folder


def test_inputs_are_copied_and_renamed(corpus, tmp_path):
    (tmp_path / "q.jsonl").write_text("{}\n")
    staging = tmp_path / "staging"
    args = stage_inputs(["--questions=q.jsonl", "docs", "--name", "tides", *REGISTRY, "--json"], staging)
    assert args[0] == "--questions" and args[3:] == ["--name", "tides", *REGISTRY, "--json"]
    assert (staging / args[1]).read_text() == "{}\n"
    assert (staging / args[2] / "a.txt").read_text() == (corpus / "a.txt").read_text()


def test_what_the_cluster_shares_is_not_copied(corpus, tmp_path):
    for value in ("s3://bucket/docs", "/no/such/here", str(corpus)):
        staging = tmp_path / "staging"
        assert stage_inputs([value, *REGISTRY], staging, shared=(str(tmp_path),))[0] == value
        assert not staging.exists()


@pytest.mark.parametrize("args, says", [
    (["missing.txt", *REGISTRY], "missing.txt does not exist"),
    (["docs", "--registry", "runs/registry"], "--registry runs/registry would be lost"),
    (["docs", "--workdir", "runs/x", *REGISTRY], "--workdir runs/x would be lost"),
    (["docs", "--name", "x"], "a job needs --registry"),
    (["docs", "--config", "no.yaml", *REGISTRY], "no.yaml does not exist"),
    (["docs", "--model", "docs", *REGISTRY], "--model docs is a directory on this machine"),
    (["--name", "x", *REGISTRY], "needs one CORPUS"),
    (["docs", *REGISTRY, "--name"], "--name needs a value"),
])
def test_mistakes_get_one_line(corpus, tmp_path, args, says):
    with pytest.raises(UserError, match=says) as caught:
        stage_inputs(args, tmp_path / "staging")
    assert "\n" not in str(caught.value)


def test_a_corpus_too_large_to_upload_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "UPLOAD_LIMIT_BYTES", 10)
    with pytest.raises(UserError, match="CARTRIDGES_SHARED"):
        stage_inputs(["docs", *REGISTRY], tmp_path / "staging")


def test_token_comes_from_where_ray_keeps_it(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert auth_token() is None
    (tmp_path / "token").write_text("abc\n")
    assert auth_token() == "abc"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "def")
    assert auth_token() == "def"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth_token() is None


def test_no_job_server_is_one_line():
    with pytest.raises(UserError, match="no Ray job server answers at http://127.0.0.1:9"):
        connect("127.0.0.1:9")
    with pytest.raises(UserError, match="is not a job server"):
        connect("ray://127.0.0.1:10001")


def test_log_keeps_the_result_out_of_stderr(capsys):
    log = JobLog()
    for piece in ("step 1\nste", "p 2\nCARTRIDGES-RES", 'ULT {"version": "ab"}\nlast'):
        log.feed(piece)
    log.close()
    assert log.result == {"version": "ab"}
    assert capsys.readouterr().err == "step 1\nstep 2\nlast\n"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A Ray head with token authentication on ports of its own: `(dashboard URL, token)`."""
    token, port = "1f" * 32, free_port()
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as scratch:  # short: socket paths
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
                   "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=4",
                   "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--disable-usage-stats",
                   f"--dashboard-agent-listen-port={free_port()}",
                   f"--ray-client-server-port={free_port()}",
                   f"--temp-dir={scratch}", f"--object-store-memory={256 * 2**20}"]
        with open(f"{scratch}/start.log", "w") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_it_answers(url, token, process)
            yield url, token
        finally:
            process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
            process.wait(timeout=60)


def wait_until_it_answers(url: str, token: str, process: subprocess.Popen, seconds: float = 120) -> None:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ray start ended with {process.returncode}"
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise TimeoutError(f"no job server at {url} after {seconds} s")


@pytest.mark.slow
def test_job_runs_on_a_head_with_authentication(head, monkeypatch, capfd):
    url, token = head
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
    with pytest.raises(UserError, match="refuses this token"):
        connect(url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    client = connect(url)
    job_id = client.submit_job(entrypoint="echo started && echo 'CARTRIDGES-RESULT {\"version\": \"ab\"}'")
    assert submission._follow(client, job_id) == {"version": "ab"}
    assert client.get_job_status(job_id).value == "SUCCEEDED"
    assert "started" in capfd.readouterr().err
