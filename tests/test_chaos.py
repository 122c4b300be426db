"""What goes wrong in the middle of a run: an actor is killed, the disk is full, an engine raises, a run is hopeless."""

import os
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

from cartridges.corpus import load_corpus
from cartridges.records import Conversation, Task
from tests.test_synthesize import corpus_file, shard_rows, tiny_settings, wait_for  # noqa: F401
from workflows.cli.exit_codes import exit_code
from workflows.synthesis.ray_pipeline import SynthesisActor
from workflows.synthesis.synthesize import synthesize

pytestmark = pytest.mark.slow


def fake_actor(log, seconds=0.0, raises_on=()):
    """An actor whose engine takes `seconds` a batch, raises on the ids that end with one of `raises_on`, and leaves a
    file in `log` for each batch: its process and its ids. Local, so that it goes to Ray's workers by value."""
    log.mkdir(parents=True)

    def made(task: Task) -> Conversation:
        said = ({"role": "user", "content": f"What is {task.conversation_id}?"},
                {"role": "assistant", "content": "It."})
        mask, row = np.array([False, True, False]), np.ones((1, 2))
        return Conversation(task.conversation_id, task.chunk_id, task.seed_family, said, np.arange(3, dtype=np.int32),
                            mask, row.astype(np.int32), np.log(row / 3).astype(np.float32))

    class Engine:
        def run(self, tasks):
            ids = [task.conversation_id for task in tasks]
            place = log / f"{os.getpid()}-{time.time_ns()}"
            place.with_suffix(".tmp").write_text("\n".join(ids))
            place.with_suffix(".tmp").rename(place)
            time.sleep(seconds)
            if any(one.endswith(tuple(raises_on)) for one in ids):
                raise ZeroDivisionError("the engine broke")
            return [made(task) for task in tasks]

    class Fake:
        def __init__(self, settings, chunks_file, beside, tolerance):
            self.settings, self.tolerance, self.synthesizer = settings, tolerance, Engine()

        __call__ = SynthesisActor.__call__

    return Fake


def batches(log):
    """`(process, ids)` of each that was begun, in order."""
    files = sorted((file for file in log.iterdir() if not file.suffix), key=lambda file: int(file.name.split("-")[1]))
    return [(int(file.name.split("-")[0]), file.read_text().split()) for file in files]


def planned(output):
    return [row["conversation_id"] for row in pq.read_table(output / "work" / "tasks.parquet").to_pylist()]


@pytest.fixture
def wanted(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")

    def settings(**how):
        return tiny_settings(tiny_model_dir, num_conversations=96, **{"batch_size": 4, **how})
    return settings


def test_a_killed_actor_costs_its_batch_and_no_more(one_ray, wanted, corpus_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("workflows.synthesis.ray_pipeline.SynthesisActor", fake_actor(tmp_path / "log", seconds=0.1))
    killed, expected = [], []

    def progress(done, total, label):
        if done >= 8 and not killed:
            expected.extend(planned(tmp_path / "out"))
            killed.append(batches(tmp_path / "log")[-1][0])
            os.kill(killed[0], signal.SIGKILL)

    manifest = synthesize(load_corpus(str(corpus_file)), str(tmp_path / "out"), wanted(), progress)
    assert killed and len({process for process, _ in batches(tmp_path / "log")}) == 2
    ids = [row["conversation_id"] for row in shard_rows(tmp_path / "out")]
    assert ids == sorted(expected) and manifest["conversations"]["kept"] == len(ids) == 96
    times = Counter(one for _, batch in batches(tmp_path / "log") for one in batch)
    assert set(times) == set(ids) and max(times.values()) <= 2
    assert sum(count == 2 for count in times.values()) <= 4 * 2  # what was at work, and what waited in the actor


def test_rows_that_raise_are_left_out_and_a_hopeless_run_ends(one_ray, wanted, corpus_file, tmp_path,  # noqa: F811
                                                              monkeypatch):
    monkeypatch.setattr("workflows.synthesis.ray_pipeline.SynthesisActor", fake_actor(tmp_path / "log", raises_on="0"))
    settings = wanted(max_failed_share=0.5)
    manifest = synthesize(load_corpus(str(corpus_file)), str(tmp_path / "out"), settings, lambda *of: None)
    rows = shard_rows(tmp_path / "out")
    bad = {row["conversation_id"] for row in rows if row["conversation_id"].endswith("0")}
    assert 0 < len(bad) == manifest["conversations"]["dropped"]["error"] < 40
    assert {row["conversation_id"] for row in rows if row["dropped"]} == bad and len(rows) == 96
    assert {row["dropped"] for row in rows} == {"", "error: ZeroDivisionError: the engine broke"}

    monkeypatch.setattr("workflows.synthesis.ray_pipeline.SynthesisActor",
                        fake_actor(tmp_path / "all", seconds=0.05, raises_on="0123456789abcdef"))
    with pytest.raises(RuntimeError, match=r"of 96 conversations failed.*ZeroDivisionError: the engine broke"):
        synthesize(load_corpus(str(corpus_file)), str(tmp_path / "none"), wanted(retries=0), lambda *of: None)
    assert 3 <= len(batches(tmp_path / "all")) <= 12  # of 24
    monkeypatch.setattr("workflows.synthesis.ray_pipeline.SynthesisActor", fake_actor(tmp_path / "fine"))
    again = synthesize(load_corpus(str(corpus_file)), str(tmp_path / "none"), wanted(retries=0), lambda *of: None)
    assert again["conversations"] == {"kept": 96, "dropped": {}}


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(one_ray, wanted, corpus_file, tmp_path,  # noqa: F811
                                                              monkeypatch, capfd):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        monkeypatch.setattr("workflows.synthesis.ray_pipeline.SynthesisActor", fake_actor(tmp_path / "log"))

        def command():
            synthesize(load_corpus(str(corpus_file)), str(small / "out"), wanted(), lambda *of: None)

        def filled(done, total, label):
            (small / "ballast").write_bytes(b"x" * 2**20)

        def first():
            synthesize(load_corpus(str(corpus_file)), str(small / "out"), wanted(), filled)

        capfd.readouterr()
        assert exit_code(first, resumable=True) == 1
        said = capfd.readouterr().err
        assert "No space left" in said and said.count("\n") == 1, said
        assert not (small / "out" / "dataset.json").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert exit_code(command, resumable=True) == 0
        assert len({row["conversation_id"] for row in shard_rows(small / "out")}) == 96
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
