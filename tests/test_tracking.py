"""W&B runs need no network, stay under the work directory, and hold what was logged."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cartridges.errors import UserError
from cartridges.evaluation import report_card
from workflows.runtime import tracking
from workflows.runtime.manifests import Clock
from workflows.runtime.tracking import METRICS, Run, card_summary, logged_in, track
from workflows.training.step_log import STEPS, StepLogFollower

INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}
CARD = {
    "arms": {"cartridge": {"metrics": {"f1": INTERVAL, "contains": INTERVAL}, "kv_bytes": 1024},
             "closed_book": {"metrics": {"f1": INTERVAL}, "kv_bytes": 0}},
    "paired": {"cartridge-closed_book": {"f1": INTERVAL}},
    "cartridge": {"bytes": 1024, "compression_ratio": 12.5},
    "build": {"seconds": {"train": 9.0}},
}


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    """An environment in which nobody is logged in to W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def payloads(data: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: a LevelDB log (32 KiB blocks, 7-byte record headers)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a full record, or the last part of one
            yield whole
            whole = b""


def records(workdir: Path, kind: str) -> list:
    """The records of one kind in the only offline run under `workdir`, once it is written out."""
    deadline = time.monotonic() + 20
    while True:
        found = read_run(workdir)
        if "exit" in (record.WhichOneof("record_type") for record in found):
            return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]
        assert time.monotonic() < deadline, "the run was not finished"
        time.sleep(0.05)


def read_run(workdir: Path) -> list:
    from wandb.proto import wandb_internal_pb2

    (file,) = workdir.glob("wandb/offline-run-*/run-*.wandb")
    return [wandb_internal_pb2.Record.FromString(payload) for payload in payloads(file.read_bytes())]


def items(record) -> dict[str, str]:
    return {item.key or "/".join(item.nested_key): item.value_json for item in record}


def test_offline_run_holds_what_was_logged(no_account, tmp_path, capfd):
    released = tmp_path / "released"
    released.mkdir()
    (released / "manifest.json").write_text("{}")
    with track("train", "billing", {"lr": 0.02}, tmp_path) as run:
        run.log({"train/loss": 1.5}, step=7)
        run.report_card(CARD)
        run.artifact(released, "billing cartridge", "cartridge")
    history = {}
    for record in records(tmp_path, "history"):
        history.update(items(record.item))
    assert history["train/loss"] == "1.5"
    assert history["evaluate/report_card/_type"] == '"table-file"'
    summary = {}
    for record in records(tmp_path, "summary"):
        summary.update(items(record.update))
    assert summary["evaluate/cartridge/f1"] == "0.5"
    (started,) = records(tmp_path, "run")
    assert started.display_name == "billing/train" and started.run_group == "billing"
    assert "billing-cartridge" in [artifact.name for artifact in records(tmp_path, "artifact")]
    assert "wandb" not in capfd.readouterr().out, "stdout belongs to --json"


def test_failed_stage_is_marked_failed(no_account, tmp_path):
    with pytest.raises(RuntimeError), track("train", "billing", {}, tmp_path):
        raise RuntimeError("worker lost")
    (end,) = records(tmp_path, "exit")
    assert end.exit_code == 1


def test_environment_is_left_as_it_was(no_account, tmp_path):
    before = dict(os.environ)
    with track("train", "billing", {}, tmp_path):
        assert os.environ["WANDB_DIR"] == str(tmp_path)
    after = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert after == before


def test_disabled_writes_nothing_and_does_not_import_wandb(tmp_path):
    code = ("import sys; from pathlib import Path; from workflows.runtime.tracking import track\n"
            "with track('train', 'x', {}, Path(sys.argv[1])) as run:\n"
            "    run.log({'train/loss': 1.0}); run.report_card({}); run.artifact(Path('.'), 'a', 'b')\n"
            "assert 'wandb' not in sys.modules and 'torch' not in sys.modules")
    root = str(Path(tracking.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root,
                   env={**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": root})
    assert list(tmp_path.iterdir()) == []


def test_unknown_mode_and_unknown_key_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes"), track("train", "x", {}, tmp_path):
        pass
    with pytest.raises(ValueError, match="train/speed"):
        tracking.Run(None).log({"train/speed": 1.0})


def test_logged_in_reads_key_and_netrc(no_account, monkeypatch, tmp_path):
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine other.example login user password secret\n")
    assert not logged_in()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    assert logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password short\n")
    with pytest.raises(UserError, match="wandb login"):
        logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert logged_in()


def test_unreachable_server_falls_back_to_offline(no_account, monkeypatch, tmp_path, capfd):
    import wandb

    wandb.teardown()  # it reads the server's address once
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "ONLINE_TIMEOUT_SECONDS", 2)
    started = time.monotonic()
    with track("train", "billing", {}, tmp_path) as run:
        run.log({"train/loss": 1.0})
    assert time.monotonic() - started < 30
    assert "kept offline" in capfd.readouterr().err
    assert records(tmp_path, "history")
    wandb.teardown()


def test_every_number_of_a_report_card_has_its_key():
    assert card_summary(CARD).keys() <= METRICS.keys()
    assert card_summary(CARD)["train/seconds"] == 9.0
    assert tracking.ARM_METRICS == report_card.METRICS


def test_progress_of_a_run_that_goes_on_is_its_own(tmp_path):
    """Steps of the run before are told as loaded, not as done at once; after a checkpoint they may be fewer."""
    file, said = tmp_path / STEPS, []
    row = dict.fromkeys(("loss", "kl", "teacher_entropy", "topk_mass", "lr", "grad_norm", "loss_tokens", "tokens",
                         "seconds"), 1.0) | {"steps": 9}

    def write(count: int) -> None:
        new = tmp_path / "new"
        new.write_text("".join(json.dumps(row | {"step": step}) + "\n" for step in range(count)))
        new.replace(file)

    write(5)
    with StepLogFollower(file, Run(None), lambda *told: said.append(told), Clock(tmp_path / "clock.json"), 9):
        for count in (5, 3):
            write(count)
            before, deadline = len(said), time.monotonic() + 60
            while len(said) < before + 2:  # the first may have been read before
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert said[-1] == (0, 9, "loading the model, to go on from the last checkpoint")
        write(4)
    assert said[-1][0] == 4 and said[-1][2].startswith("loss 1.000")
