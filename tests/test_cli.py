"""The command line: exit codes, one line for a mistake, one JSON object on stdout."""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cartridges import artifact
from cartridges.errors import UserError
from cartridges.registry import Registry
from test_artifact import make_cartridge, save
from workflows.cli import build_parser, main
from workflows.cli.commands import registry as registry_commands
from workflows.cli.options import settings_from
from workflows.evaluation.report_card_table import print_report_card
from workflows.runtime.console import human_bytes, human_seconds, print_table, to_json
from workflows.runtime.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
CARD = {
    "corpus": {"fingerprint": "f", "tokens": 4000},
    "cartridge": {"name": "sample", "version": "0123456789abcdef", "num_tokens": 256,
                  "bytes": 11796480, "compression_ratio": 15.625},
    "arms": {
        "closed_book": {"metrics": {"contains": {"mean": 0.02, "low": 0.0, "high": 0.05, "n": 180}},
                        "kv_bytes": 0},
        "cartridge": {"metrics": {"contains": {"mean": 0.61, "low": 0.54, "high": 0.68, "n": 180},
                                  "f1": {"mean": 0.5, "low": None, "high": None, "n": 180}},
                      "kv_bytes": 11796480}},
    "paired": {"cartridge-closed_book": {"contains": {"mean": 0.59, "low": 0.5, "high": 0.66, "n": 180}}},
    "build": {"seconds": {"synthesize": 300.0, "train": 250.5}},
    "machine": {"cpus": 2},
}


def run_cli(*args, cwd, code="from workflows.cli import main; sys.exit(main())"):
    return subprocess.run([sys.executable, "-c", f"import sys; sys.argv[0] = 'cartridges'; {code}", *args],
                          cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A registry with two versions of `sample`, the first of them with a report card."""
    monkeypatch.chdir(tmp_path)
    registry = Registry(tmp_path / "registry")
    for seed in (0, 1):
        save(tmp_path / "artifact", make_cartridge(seed), report_card=CARD if seed == 0 else None)
        registry.publish("sample", tmp_path / "artifact")
    return str(tmp_path / "registry")


def json_of(capfd, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def mistake(capfd, *argv):
    """The one line that a mistake puts on stderr."""
    try:
        code = main(list(argv))
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("cartridges: "), (code, err)
    return err


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    start = time.monotonic()
    shown = run_cli("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "synthesize" in shown.stdout
    assert time.monotonic() - start < 10  # a shared machine; 0.2 s when it is idle
    heavy = run_cli("list", "--json", cwd=tmp_path, code=(
        "from workflows.cli import main; main();"
        "sys.exit(bool({'torch', 'transformers', 'ray', 'vllm', 'wandb'} & set(sys.modules)))"))
    assert heavy.returncode == 0, heavy.stderr


def test_exit_codes_of_the_process(tmp_path):
    listed = run_cli("list", "--json", cwd=tmp_path)
    assert listed.returncode == 0 and json.loads(listed.stdout)["cartridges"] == []
    unknown = run_cli("show", "sample", cwd=tmp_path)
    assert unknown.returncode == 2 and unknown.stdout == "" and "Traceback" not in unknown.stderr
    assert unknown.stderr.count("\n") == 1
    defect = run_cli("list", cwd=tmp_path, code=(
        "from workflows import cli; from workflows.cli.commands import registry\n"
        "registry.run_list = lambda args: 1 / 0; sys.exit(cli.main())"))
    assert defect.returncode == 1 and "ZeroDivisionError" in defect.stderr


def test_every_command_knows_json():
    parsers = next(action for action in build_parser()._actions if action.dest == "command").choices
    assert set(parsers) >= {"build", "synthesize", "train", "evaluate", "serve", "chat", "submit",
                            "list", "show", "promote", "delete", "export", "import", "inspect"}
    groups = [action.choices for parser in parsers.values() for action in parser._actions
              if isinstance(action, argparse._SubParsersAction)]
    assert groups, "commands with actions of their own, such as `keys add`"
    plain = [parser for parser in parsers.values()
             if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)]
    for parser in [*plain, *(action for group in groups for action in group.values())]:
        assert "--json" in parser.format_help(), parser.prog


def test_registry_commands(root, tmp_path, capfd):
    listed = json_of(capfd, "list", "--registry", root)["cartridges"]
    assert len(listed) == 1 and listed[0]["aliases"] == ["latest"] and listed[0]["num_tokens"] == 6
    latest = listed[0]["version"]
    shown = json_of(capfd, "show", "sample", "--registry", root)
    assert shown["version"] == latest and shown["report_card"] is None
    first = next(other["version"] for other in shown["versions"] if other["version"] != latest)
    assert json_of(capfd, "show", f"sample@{first}", "--registry", root)["report_card"] == CARD
    assert json_of(capfd, "promote", "sample", first[:8], "--registry", root)["aliases"] == ["prod"]
    assert json_of(capfd, "show", "sample", "--registry", root)["version"] == first
    beta = json_of(capfd, "promote", f"sample@{latest}", "--alias", "beta", "--registry", root)
    assert beta["version"] == latest and beta["aliases"] == ["beta", "latest"]
    exported = json_of(capfd, "export", "sample", "--output", "out.tar", "--registry", root)
    assert exported["version"] == first and exported["bytes"] == (tmp_path / "out.tar").stat().st_size
    imported = json_of(capfd, "import", "out.tar", "--name", "copy", "--registry", "other")
    assert imported["name"] == "copy" and imported["version"] == first
    assert "prod" in mistake(capfd, "delete", f"sample@{first}", "--registry", root)
    assert json_of(capfd, "delete", f"sample@{first}", "--force", "--registry", root)["deleted"] == [first]
    assert json_of(capfd, "delete", "sample", "--registry", root)["deleted"] == [latest]


def test_human_views(root, capfd):
    assert main(["list", "--registry", root]) == 0
    assert "sample" in capfd.readouterr().out
    for entry in Registry(root).versions("sample"):
        assert main(["show", f"sample@{entry.version}", "--registry", root]) == 0
        shown = capfd.readouterr().out
        assert ("closed_book" in shown) != ("no report card" in shown)


def test_registry_from_the_environment(root, capfd, monkeypatch):
    monkeypatch.setenv("CARTRIDGES_REGISTRY", root)
    assert len(json_of(capfd, "list")["cartridges"]) == 1


@pytest.mark.parametrize("argv, says", [
    ([], "COMMAND"),
    (["frobnicate"], "invalid choice"),
    (["list", "--frobnicate"], "unrecognized arguments"),
    (["build", "corpus"], "--name"),
    (["build", "corpus", "--name", "No Good"], "not a cartridge name"),
    (["build", "corpus", "--name", "x", "--num-tokens", "many"], "--num-tokens"),
    (["build", "corpus", "--name", "x", "--num-tokens", "0"], "train.num_tokens"),
    (["build", "corpus", "--name", "x", "--set", "train.surprise=1"], "no setting train.surprise; there are"),
    (["build", "corpus", "--name", "x", "--set", "train.stepz=1"], "did you mean steps?"),
    (["build", "corpus", "--name", "x", "--set", "serve.dedicated={a: {min: 1}}"], "no setting serve.dedicated.a.min"),
    (["build", "corpus", "--name", "x", "--set", "train"], "not key=value"),
    (["build", "corpus", "--name", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
    (["evaluate", "x", "--questions", "q.jsonl", "--arms", "closed_book,psychic"], "psychic"),
    (["submit", "--", "corpus"], "--name"),
    (["submit", "--env", "X", "corpus", "--name", "x", "--registry", "s3://b/r"], "KEY=VALUE"),
    (["submit", "corpus", "--name", "x", "--set", "train.epochs=none"], "train.epochs"),
    (["import", "nowhere.tar"], "nowhere.tar is not a file"),
    (["promote", "sample"], "is empty"),
    (["list", "--registry", "nosuch://x"], "cannot open registry"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capfd, argv, says):
    monkeypatch.chdir(tmp_path)
    assert says in mistake(capfd, *argv)
    assert not list(tmp_path.iterdir())


def test_mistakes_in_several_lines_become_one(tmp_path, capfd, monkeypatch):
    def raising(args):
        raise UserError("first\n  second")

    monkeypatch.setattr(registry_commands, "run_list", raising)
    assert mistake(capfd, "list") == "cartridges: first second\n"


def test_dials_are_settings(tmp_path):
    (tmp_path / "settings.yaml").write_text("train: {num_tokens: 64, epochs: 2}\nseed: 5\n")
    argv = ["build", "corpus", "--name", "x", "--config", str(tmp_path / "settings.yaml"),
            "--num-tokens", "128", "--corpus-id", "services/*", "--budget", "10m", "--model", "some/model",
            "--loss", "next_token", "--set", "train.epochs=3", "--set", "synthesize.families={cloze: 0.5}"]
    settings = settings_from(build_parser().parse_args(argv))
    assert (settings.train.num_tokens, settings.train.epochs, settings.train.loss) == (128, 3, "next_token")
    assert (settings.seed, settings.budget, settings.model.name) == (5, "10m", "some/model")
    assert settings.corpus.corpus_id == "services/*" and settings.synthesize.families == {"cloze": 0.5}
    numeric = build_parser().parse_args(["build", "c", "--name", "x", "--corpus-id", "12", "--seed", "0"])
    assert settings_from(numeric).corpus.corpus_id == "12"


def test_json_stdout_is_clean(tmp_path):
    """What a stage, a library or a child process prints does not reach stdout under --json."""
    noisy = run_cli("list", "--json", cwd=tmp_path, code=(
        "import subprocess; from workflows import cli; from workflows.cli.commands import registry\n"
        "def noisy(args):\n"
        "    print('from python'); subprocess.run(['echo', 'from a child'])\n"
        "    return {'x': float('nan')}\n"
        "registry.run_list = noisy; sys.exit(cli.main())"))
    assert noisy.returncode == 0 and json.loads(noisy.stdout) == {"x": None}
    assert "from python" in noisy.stderr and "from a child" in noisy.stderr


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_interrupt_is_one_line_and_130(tmp_path, signal_name):
    stopped = run_cli("build", "corpus", "--name", "x", cwd=tmp_path, code=(
        "import os, signal, time; from workflows import cli; from workflows.cli.commands import build\n"
        # Children of a shell's background job inherit an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def killed(args):\n"
        f"    os.kill(os.getpid(), signal.{signal_name}); time.sleep(30)\n"
        "build.run = killed; sys.exit(cli.main())"))
    assert stopped.returncode == 130
    assert stopped.stderr == "cartridges: interrupted; the same command goes on where it stopped\n"


@pytest.mark.slow
def test_sigterm_beside_a_ray_of_ours_is_one_line(tmp_path):
    stopped = run_cli("build", "corpus", "--name", "x", cwd=tmp_path, code=(
        "import os, signal, time; from workflows import cli; from workflows.cli.commands import build\n"
        "from workflows.runtime.local_ray import local_ray\n"
        "def killed(args):\n"
        "    with local_ray():\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\n"
        "build.run = killed; sys.exit(cli.main())"))
    assert stopped.returncode == 130
    assert stopped.stderr == "cartridges: interrupted; the same command goes on where it stopped\n"


def test_full_disk_is_one_line(tmp_path):
    full = run_cli("build", "corpus", "--name", "x", cwd=tmp_path, code=(
        "import errno; from workflows import cli; from workflows.cli.commands import build\n"
        "def full(args):\n"
        "    raise OSError(errno.ENOSPC, 'No space left on device', 'runs/x')\n"
        "build.run = full; sys.exit(cli.main())"))
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "No space left" in full.stderr


def test_a_loss_that_is_not_finite_is_one_line(tmp_path):
    stopped = run_cli("build", "corpus", "--name", "x", cwd=tmp_path, code=(
        "from cartridges.errors import NonFiniteLoss\n"
        "from workflows import cli; from workflows.cli.commands import build\n"
        "def fast(args):\n"
        "    raise NonFiniteLoss('the gradient became nan at step 7')\n"
        "build.run = fast; sys.exit(cli.main())"))
    assert stopped.returncode == 1 and stopped.stderr == "cartridges: the gradient became nan at step 7\n"


def test_closed_pipe_is_quiet(root):
    command = f"{sys.executable} -m workflows.cli list --registry {root} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_report_card_table():
    stream = io.StringIO()
    print_report_card(CARD, stream)
    lines = stream.getvalue().splitlines()
    assert lines[0] == ("sample@0123456789abcdef, 256 tokens, 11.2 MiB, corpus of 4000 tokens, 15.6x smaller")
    assert "0.61 (0.54..0.68)" in stream.getvalue() and "+0.59 (+0.50..+0.66)" in stream.getvalue()
    assert lines[-1] == "build: synthesize 5m 00s, train 4m 10s; 9m 10s in all"
    print_report_card({"arms": {}, "cartridge": {}}, io.StringIO())


def test_wide_tables_wrap_into_blocks(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    stream = io.StringIO()
    print_table([["arm", "a" * 9, "b" * 9, "c"], ["full", "1", "2", "3"]], stream)
    lines = stream.getvalue().splitlines()
    assert lines == ["arm   aaaaaaaaa", "full          1", "", "arm   bbbbbbbbb  c", "full          2  3"]


def test_progress_lines_off_a_terminal():
    stream = io.StringIO()
    with Progress(4, "train", "steps", stream=stream) as progress:
        for _ in range(4):
            progress.update(note="loss 0.3")
        assert "4/4 steps" in progress.line() and "took" in progress.line()
    assert stream.getvalue().count("\n") == 1
    half = Progress(10, "train", "steps", stream=io.StringIO())
    half.callback(5, 10, "loss 0.3")
    assert "5/10 steps" in half.line() and " left" in half.line()


def test_what_comes_before_the_first_step_is_not_in_the_rate(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("workflows.runtime.progress.time.monotonic", lambda: now[0])
    progress = Progress(100, "train", "steps", stream=io.StringIO())
    for now[0], done in ((100.0, 10), (105.0, 20)):
        progress.set(done)
    assert "2/s, 40s left" in progress.line()
    now[0] = 145.0
    progress.set(100)
    assert "0.69/s, took 2m 25s" in progress.line()


def test_human_numbers():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [human_seconds(s) for s in (0.42, 59.7, 75, 3725)] == ["0.4s", "1m 00s", "1m 15s", "1h 02m"]
    assert json.loads(to_json({"a": [float("inf"), (1, 2)]})) == {"a": [None, [1, 2]]}


def test_manifest_of_a_published_version_is_the_artifact(root, capfd):
    shown = json_of(capfd, "show", "sample", "--registry", root)
    loaded = artifact.load(Registry(root).get("sample"))
    assert shown["digest"] == loaded.digest and shown["version"] == loaded.manifest.version
