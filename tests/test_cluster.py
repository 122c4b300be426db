"""Submitting a build: inputs are uploaded, mistakes are named before the cluster sees them."""

import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from cartridges.config import BuildSettings
from cartridges.errors import UserError
from workflows import cli
from workflows.cli.commands.submit import build_words
from workflows.cli.options import settings_from
from workflows.job import inputs
from workflows.job.client import auth_token, connect
from workflows.job.inputs import stage_inputs
from workflows.job.log import JobLog, follow

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
KINDS = {"rayjob": "RayJob", "rayservice": "RayService", "raycluster-autoscaler": "RayCluster",
         "storage": "PersistentVolumeClaim"}
RAY_KINDS = ("rayjob", "rayservice", "raycluster-autoscaler")
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


def parsed(*words: str):
    """The namespace of `cartridges submit`."""
    return cli.build_parser().parse_args(["submit", *words])


def test_inputs_are_copied_and_renamed(corpus, tmp_path):
    (tmp_path / "q.jsonl").write_text("{}\n")
    staging = tmp_path / "staging"
    job = stage_inputs(parsed("--questions=q.jsonl", "docs", "--name", "tides", *REGISTRY, "--json"), staging)
    assert job.name == "tides" and job.registry == REGISTRY[1]
    assert (staging / job.questions).read_text() == "{}\n"
    assert (staging / job.corpus / "a.txt").read_text() == (corpus / "a.txt").read_text()


def test_what_the_cluster_shares_is_not_copied(corpus, tmp_path):
    for value in ("s3://bucket/docs", "/no/such/here", str(corpus)):
        staging = tmp_path / "staging"
        build = parsed(value, "--name", "tides", *REGISTRY)
        assert stage_inputs(build, staging, shared=(str(tmp_path),)).corpus == value
        assert not staging.exists()


@pytest.mark.parametrize("words, says", [
    (["missing.txt", *REGISTRY], "missing.txt does not exist"),
    (["docs", "--registry", "runs/registry"], "--registry runs/registry would be lost"),
    (["docs", "--workdir", "runs/x", *REGISTRY], "--workdir runs/x would be lost"),
    (["docs"], "a job needs --registry"),
    (["docs", "--config", "no.yaml", *REGISTRY], "no.yaml does not exist"),
    (["docs", "--model", "docs", *REGISTRY], "--model docs is a directory on this machine"),
])
def test_mistakes_get_one_line(corpus, tmp_path, monkeypatch, words, says):
    monkeypatch.delenv("CARTRIDGES_REGISTRY", raising=False)
    with pytest.raises(UserError, match=says) as caught:
        stage_inputs(parsed(*words, "--name", "x"), tmp_path / "staging")
    assert "\n" not in str(caught.value)


def test_a_corpus_too_large_to_upload_is_refused(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "UPLOAD_LIMIT_BYTES", 10)
    with pytest.raises(UserError, match="CARTRIDGES_SHARED"):
        stage_inputs(parsed("docs", "--name", "x", *REGISTRY), tmp_path / "staging")


def test_the_job_builds_what_was_asked_for():
    """The words of the job parse to what `submit` was given, whatever stands before the build's own arguments."""
    words = ["docs", "--name", "tides", *REGISTRY, "--each", "--curriculum", "--num-tokens", "64", "--seed", "0",
             "--corpus-id=-x", "--set", "train.epochs=3", "--set", "synthesize.families={cloze: 0.5}"]
    for before in ([], ["--"], ["--no-wait", "--address", "http://head:8265", "--"]):
        submitted = parsed(*before, *words)
        built = cli.build_parser().parse_args(["build", *build_words(submitted)])
        own = vars(built).keys() - {"command", "run", "show", "resumable"}
        assert {name: getattr(built, name) for name in own} == {name: getattr(submitted, name) for name in own}


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


def manifest(name: str) -> dict:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def cluster_spec(name: str) -> dict:
    spec = manifest(name)["spec"]
    return {"rayjob": spec.get("rayClusterSpec"), "rayservice": spec.get("rayClusterConfig"),
            "raycluster-autoscaler": spec}[name]


def ray_version() -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = [line for line in dependencies if line.startswith("ray[")]
    return pinned.partition("==")[2]


@pytest.mark.parametrize("name", KINDS)
def test_manifest_is_of_its_kind(name):
    loaded = manifest(name)
    assert loaded["kind"] == KINDS[name] and loaded["metadata"]["name"]
    assert loaded["apiVersion"] == ("ray.io/v1" if name in RAY_KINDS else "v1")


@pytest.mark.parametrize("name", RAY_KINDS)
def test_pods_are_safe_and_share_what_stages_need(name):
    spec = cluster_spec(name)
    assert spec["rayVersion"] == ray_version() and spec["authOptions"] == {"mode": "token"}
    workers = spec["workerGroupSpecs"]
    for group in [spec["headGroupSpec"], *workers]:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]} == (
                {"shared", "shm", "keys"} if name == "rayservice" else {"shared", "shm"})
        claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
        assert claim == manifest("storage")["metadata"]["name"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
    for group in workers:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "nvidia.com/gpu" in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_rayjob_runs_a_build_that_our_command_line_accepts():
    spec = manifest("rayjob")["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "workflows.cli"]
    args = cli.build_parser().parse_args(words[3:])
    assert args.command == "build" and args.json
    settings = settings_from(args)
    gpus = sum(group["replicas"] for group in cluster_spec("rayjob")["workerGroupSpecs"])
    assert settings.train.num_workers == settings.synthesize.num_actors == gpus - spec["entrypointNumGpus"]
    # What survives the pods: the shared volume, and object storage.
    assert args.workdir.startswith("/shared/") and "://" in args.registry


def test_rayservice_imports_our_app():
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    (app,) = config["applications"]
    settings = BuildSettings.model_validate(app["args"]["settings"])
    # It listens to the network: not without keys, which come from the secret.
    (container,) = cluster_spec("rayservice")["headGroupSpec"]["template"]["spec"]["containers"]
    (keys,) = [mount for mount in container["volumeMounts"] if mount["name"] == "keys"]
    assert settings.serve.keys_file.startswith(f"{keys['mountPath']}/") and keys["readOnly"]
    module, _, name = app["import_path"].partition(":")
    built = getattr(importlib.import_module(module), name)(app["args"])
    from ray.serve._private.build_app import build_app

    deployments = build_app(built, name="cartridges").deployments
    assert {deployment["name"] for deployment in app["deployments"]} == {
        deployment.name for deployment in deployments}


def test_machines_are_what_the_cluster_launcher_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = manifest("machines")
    validate_config(prepare_config(config))
    assert len(config["provider"]["worker_ips"]) == config["max_workers"]
    started = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert all("RAY_AUTH_MODE=token" in line for line in started)


def test_image_has_our_ray_and_no_root():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    (base,) = [line for line in lines if line.startswith("FROM ")]
    assert f"ray:{ray_version()}-py311" in base and [line for line in lines if line][-1] == "USER ray"
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = re.sub(r"--\S+ ", "", line).split()[1:]
            assert all((ROOT / source).exists() for source in sources), line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A Ray head with token authentication on ports of its own: `(dashboard URL, token)`."""
    token = "1f" * 32
    # /tmp: the paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        process, url = start_head(Path(scratch), token)
        try:
            yield url, token
        finally:
            process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it started
            process.wait(timeout=60)


def start_head(scratch: Path, token: str, attempts: int = 3) -> tuple[subprocess.Popen, str]:
    """Ray gives a head 30 s to come up and ends it after; on a busy machine that is not always enough."""
    binaries = Path(sys.executable).parent
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token,
           "PATH": f"{binaries}:{os.environ['PATH']}"}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)
    for attempt in range(attempts):
        port, client_port = free_port(), free_port()
        command = [str(binaries / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
                   f"--port={free_port()}", "--num-cpus=4", "--dashboard-host=127.0.0.1",
                   f"--dashboard-port={port}", "--disable-usage-stats",
                   f"--dashboard-agent-listen-port={free_port()}",
                   f"--ray-client-server-port={client_port}", f"--temp-dir={scratch / str(attempt)}",
                   f"--object-store-memory={256 * 2**20}"]
        with (scratch / f"start-{attempt}.log").open("w") as output:
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        if answers(f"http://127.0.0.1:{port}", token, client_port, process):
            return process, f"http://127.0.0.1:{port}"
    raise RuntimeError(f"ray start ended {attempts} times: " + (scratch / "start-0.log").read_text()[-2000:])


def answers(url: str, token: str, client_port: int, process: subprocess.Popen, seconds: float = 300) -> bool:
    """Whether all of the head comes up; False if it ends before. Raises after `seconds`."""
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        try:
            # Ray's client server listens last, and is the one that gives up after 30 s.
            socket.create_connection(("127.0.0.1", client_port), timeout=5).close()
            with urllib.request.urlopen(request, timeout=5) as answer:
                if answer.status == 200:
                    return True
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > deadline:
            process.terminate()
            process.wait(timeout=60)
            raise TimeoutError(f"no job server at {url} after {seconds} s")
        time.sleep(0.5)
    return False


@pytest.mark.slow
def test_job_runs_on_a_head_with_authentication(head, monkeypatch, capfd):
    url, token = head
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong" * 8)
    with pytest.raises(UserError, match="refuses this token"):
        connect(url)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    client = connect(url)
    job_id = client.submit_job(entrypoint="echo started && echo 'CARTRIDGES-RESULT {\"version\": \"ab\"}'")
    assert follow(client, job_id) == {"version": "ab"}
    assert client.get_job_status(job_id).value == "SUCCEEDED"
    assert "started" in capfd.readouterr().err


@pytest.mark.slow
def test_build_is_uploaded_and_its_refusal_comes_back(head, corpus, tmp_path, monkeypatch, capfd):
    url, token = head
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit, match=r"cartridges: job \S+ FAILED: .*exit code 2"):
        cli.main(["submit", "--address", url, "--", "empty.txt", "--name", "tides", "--registry",
                  str(tmp_path / "registry")])
    assert re.search(r"^cartridges: .*empty\.txt", capfd.readouterr().err, re.MULTILINE)
