"""Synthesis on Ray Data: killed and resumed it ends with the planned ids; failures and duplicates count."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cartridges.config import BuildSettings, CurriculumSettings, SynthesizeSettings
from cartridges.corpus import load_corpus
from cartridges.errors import UserError
from cartridges.prompts import example_messages
from cartridges.records import Chunk, Conversation, Dropped, Task
from cartridges.selfstudy.deduplicate import deduplicate
from cartridges.selfstudy.held_out import split, without
from cartridges.selfstudy.near_duplicates import near_duplicates
from cartridges.selfstudy.plan import plan
from cartridges.selfstudy.storage import load_conversations, schema, to_row
from cartridges.settings import load
from workflows.building.budget import Budget, Rates, conversations_for, estimate, fit, parse_budget, steps_within
from workflows.building.planning import settle, with_steps
from workflows.cli import main
from workflows.cli.exit_codes import exit_code
from workflows.runtime.manifests import Clock, write_manifest
from workflows.synthesis.failures import (
    Tolerance,
    TooManyFailed,
    count_failed,
    forget_failed,
    require_few,
    run_with_retry,
)
from workflows.synthesis.open_synthesizer import check_generation
from workflows.synthesis.placement import place, threads_here
from workflows.synthesis.ray_pipeline import CommittedProgress, engines_at_once, placement_here
from workflows.synthesis.synthesize import finish_dataset, require_some, synthesize

CORPUS = "\n\n".join(f"The {name} lighthouse was built in {1800 + i} by {name}son. It has {i + 20} steps."
                     for i, name in enumerate(("Arl", "Bem", "Cod", "Dun", "Eck", "Fen", "Gos", "Hul")))


@pytest.fixture
def corpus_file(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text(CORPUS)
    return file


def tiny_settings(model_dir, **synthesize) -> BuildSettings:
    """Families that a random model passes: known answers, no filter by likelihood."""
    wanted = {"num_conversations": 48, "batch_size": 4, "topk": 3, "chunk": {"max_tokens": 48},
              "families": {"cloze": 0.7, "recall": 0.3}, "max_teacher_nll": 1e9,
              "min_information_gain": None, "threads_per_actor": 1, **synthesize}
    return BuildSettings.model_validate({
        "model": {"name": str(model_dir), "dtype": "float32"}, "synthesize": wanted, "seed": 3})


def conversation(number: int, question: str = "Who?", answer: str = "Ann", k: int = 2) -> Conversation:
    mask = np.array([False, True, True, False])
    return Conversation(f"c{number:03d}", "chunk", "cloze",
                        ({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
                        np.arange(4, dtype=np.int32), mask, np.ones((2, k), np.int32),
                        np.log(np.full((2, k), 0.4, np.float32)))


def write_part(directory, name, results):
    directory.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([to_row(result) for result in results], schema=schema())
    pq.write_table(table, directory / name)


def shard_rows(directory):
    files = sorted((directory / "shards").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_finish_marks_duplicates_counts_reasons_and_orders_rows(tmp_path):
    write_part(tmp_path / "parts", "b.parquet", [conversation(3, "Who?"), conversation(1, "Who?")])
    write_part(tmp_path / "parts", "a.parquet", [
        conversation(2, "When?"), Dropped("c000", "cloze", "empty"),
        Dropped("c004", "recall", "error: KeyError: x")])
    summary = deduplicate(tmp_path / "parts", tmp_path / "shards", rows_per_shard=2)
    rows = shard_rows(tmp_path)
    assert [(row["conversation_id"], row["dropped"]) for row in rows] == [
        ("c000", "empty"), ("c001", ""), ("c002", ""), ("c003", "duplicate"), ("c004", "error: KeyError: x")]
    counted = summary.as_dict()
    assert counted["conversations"] == {"kept": 2, "dropped": {"duplicate": 1, "empty": 1, "error": 1}}
    assert counted["tokens"] == {"input": 8, "loss": 4}
    assert counted["topk_mass"] == pytest.approx(0.8, abs=1e-6)
    assert counted["teacher_entropy"] == pytest.approx(-0.8 * np.log(0.4) - 0.2 * np.log(0.2), abs=1e-6)


def test_finish_reads_each_part_once_however_many_the_shards(tmp_path, monkeypatch):
    for number in range(8):
        write_part(tmp_path / "parts", f"{number}.parquet", [conversation(n, f"{n}?") for n in range(number, 64, 8)])
    read = Counter()
    plain = pq.read_table
    monkeypatch.setattr("cartridges.selfstudy.deduplicate.pq.read_table", lambda file, **how: (
        read.update([how.get("columns") is None]), plain(file, **how))[1])
    monkeypatch.setattr("cartridges.selfstudy.deduplicate.HELD_BYTES", 4_000)  # some parts at a time
    deduplicate(tmp_path / "parts", tmp_path / "shards", rows_per_shard=8)
    assert 16 < read[True] <= 8 + 8 * 4  # the parts, and what was made of them; one by one it would be 64
    written = [file.name for file in sorted((tmp_path / "shards").iterdir())]
    assert written == [f"part-{n:05d}.parquet" for n in range(8)]
    assert [row["conversation_id"] for row in shard_rows(tmp_path)] == [f"c{n:03d}" for n in range(64)]


def test_conversations_are_loaded_as_they_were_written(tmp_path):
    without = replace(conversation(7), loss_mask=np.zeros(4, bool), topk_ids=np.zeros((0, 2), np.int32),
                      topk_logprobs=np.zeros((0, 2), np.float32))
    made = [conversation(3, k=2), conversation(1, k=5), without]
    write_part(tmp_path / "shards", "a.parquet", [made[0], Dropped("c002", "cloze", "empty"), made[1], without])
    pq.write_table(pa.table({"text": ["no conversation"]}), tmp_path / "chunks.parquet")
    for one, expected in zip(load_conversations(tmp_path), [made[1], made[0], without], strict=True):
        assert one.messages == expected.messages and one.conversation_id == expected.conversation_id
        for name in ("input_ids", "loss_mask", "topk_ids", "topk_logprobs"):
            found, wanted = getattr(one, name), getattr(expected, name)
            assert found.dtype == wanted.dtype and found.flags.writeable and np.array_equal(
                found, wanted if len(wanted) else wanted.reshape(found.shape))


def test_loading_takes_little_more_than_what_is_loaded(tmp_path):
    rng, scored = np.random.default_rng(0), 100
    mask = np.array([False, *[True] * scored])
    write_part(tmp_path, "a.parquet", [replace(
        conversation(number), input_ids=np.arange(scored + 1, dtype=np.int32), loss_mask=mask,
        topk_ids=rng.integers(0, 49_000, (scored, 20)).astype(np.int32),
        topk_logprobs=rng.random((scored, 20)).astype(np.float32)) for number in range(400)])
    tracemalloc.start()
    loaded = load_conversations(tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(loaded) == 400 and held > 400 * scored * 20 * 8
    assert peak < 1.5 * held


def test_few_kept_are_a_warning_and_none_a_mistake(tiny_model_dir, tmp_path, caplog):
    def finished(name, kept, nothing, other=0):
        results = [conversation(n, f"{n}?") for n in range(kept)]
        results += [Dropped(f"d{n:03d}", "recall", "nothing_to_ask") for n in range(nothing)]
        results += [Dropped(f"e{n:03d}", "recall", "empty") for n in range(other)]
        write_part(tmp_path / name / "work" / "parts", "a.parquet", results)
        planned = {"conversations": len(results), "chunks": 1, "fingerprint": "f"}
        caplog.clear()
        return finish_dataset(tmp_path / name, tiny_settings(tiny_model_dir), planned, {}, ()), caplog.text

    assert finished("fine", 8, 8)[1] == ""
    assert "1 of 20 conversations were kept (19 empty)" in finished("few", 1, 0, 19)[1]
    assert "8 of 17 conversations were kept (9 nothing_to_ask)" in finished("odd", 8, 9)[1]
    manifest, _ = finished("none", 0, 4)
    with pytest.raises(UserError, match=r"none of the 4 conversations was kept \(4 nothing_to_ask\)"):
        require_some(manifest, tmp_path / "none", ())
    require_some(manifest, tmp_path / "none", ["an earlier round"])


def test_near_duplicates_are_dropped_where_asked_for(tmp_path):
    asked = "When was the old lighthouse of Marl at the end of the long pier built?"
    write_part(tmp_path / "parts", "a.parquet", [
        conversation(1, asked, "in 1611"), conversation(2, asked.replace("built", "begun"), "in 1611"),
        conversation(3, "Who keeps the lighthouse of Marl?", "in 1611"), conversation(4, asked, "in 1611")])
    reasons = {}
    for name, how in (("off", {}), ("on", {"similarity": 0.6}), ("near", {"similarity": 0.6, "exact": False}),
                      ("strict", {"similarity": 0.99}), ("neither", {"exact": False})):
        deduplicate(tmp_path / "parts", tmp_path / name / "shards", **how)
        reasons[name] = [row["dropped"] for row in shard_rows(tmp_path / name)]
    assert reasons["off"] == reasons["strict"] == ["", "", "", "duplicate"]
    assert reasons["on"] == ["", "near_duplicate", "", "duplicate"]
    assert reasons["near"] == ["", "near_duplicate", "", "near_duplicate"]
    assert reasons["neither"] == [""] * 4


def test_near_duplicates_are_found_among_many():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(500)]
    texts = [(f"{i:04}", " ".join(rng.choice(words, 30))) for i in range(400)]
    twins = [(f"{i:04}x", text.replace(text.split()[15], "other", 1)) for i, (_, text) in enumerate(texts)]
    found = near_duplicates(sorted(texts + twins), 0.8)
    assert found <= {name for name, _ in twins} and len(found) > 0.98 * len(twins)


class Fragile:
    """Raises on what holds the task `bad`, the first `times` times."""

    def __init__(self, times=100):
        self.times = times

    def run(self, tasks):
        if any(task.conversation_id == "bad" for task in tasks) and self.times > 0:
            self.times -= 1
            raise ZeroDivisionError("by\nzero")
        return [conversation(0 if task.conversation_id == "bad" else int(task.conversation_id)) for task in tasks]


def test_a_row_that_raises_is_tried_alone_and_costs_nothing_else():
    tasks = [Task("1", "chunk", "cloze", 0), Task("bad", "chunk", "cloze", 0), Task("2", "chunk", "cloze", 0)]
    first, failed, last = run_with_retry(Fragile(), tasks)
    assert (first.conversation_id, last.conversation_id) == ("c001", "c002")
    assert failed == Dropped("bad", "cloze", "error: ZeroDivisionError: by zero", "chunk")
    assert [one.info["retries"] for one in (first, last)] == [1, 1]


@pytest.mark.parametrize("retries, fails", [(0, True), (1, True), (2, True), (3, False)])
def test_a_row_is_retried_as_often_as_stated(retries, fails):
    # The batch raises, then twice the row by itself.
    (result,) = run_with_retry(Fragile(times=3), [Task("bad", "chunk", "cloze", 0)], retries)
    assert isinstance(result, Dropped) == fails
    assert fails or result.info["retries"] == 3


def test_too_many_failures_end_the_run_and_are_done_again(tmp_path):
    write_part(tmp_path / "parts", "x_1-0.parquet", [Dropped("c1", "cloze", "error: E: x")])
    write_part(tmp_path / "checkpoint", "x_1.parquet", [])
    require_few(1, 20, 0.05, tmp_path)
    assert (tmp_path / "checkpoint" / "x_1.parquet").exists()
    with pytest.raises(RuntimeError, match="1 of 19 .* error: E: x"):
        require_few(1, 19, 0.05, tmp_path)
    assert not (tmp_path / "checkpoint" / "x_1.parquet").exists()


def test_a_hopeless_run_is_known_before_its_end():
    tolerance = Tolerance(allowed=0.1, planned=200, failed=15)
    tolerance.add(5, "error: E: x")
    with pytest.raises(TooManyFailed):
        tolerance.add(1, "error: E: y")
    few = Tolerance(allowed=0.05, planned=48)
    few.add(8, "error: E: x")  # may still be bad luck; at the end it is too many all the same
    with pytest.raises(TooManyFailed):
        few.add(1, "error: E: x")


@pytest.mark.parametrize("how, words", [
    ({"topk": 50_000}, "synthesize.topk=50000 is more than the 49152 tokens"),
    ({"chunk": {"max_tokens": 4000}}, "do not fit the window of 4096 tokens"),
    ({"max_answer_tokens": 4096}, "do not fit the window")])
def test_lengths_that_the_model_has_not_are_named_at_once(tiny_model_dir, how, words):
    with pytest.raises(UserError, match=words):
        check_generation(tiny_settings(tiny_model_dir, **how))


@pytest.mark.parametrize("how", ["{cloze: -1}", "{cloze: .nan}", "{cloze: .inf}", "{cloze: 0}"])
def test_shares_that_are_none_are_named(how):
    with pytest.raises(UserError, match="families"):
        load(BuildSettings, overrides=[f"synthesize.families={how}"])


def test_a_plan_of_general_conversations_alone_is_a_mistake():
    settings = SynthesizeSettings(num_conversations=32, general_share=0.999)
    with pytest.raises(UserError, match="general_share=0.999 of 32 conversations leaves none"):
        plan([Chunk("c", "d", 0, 4, "Some text.")], settings, 0)


def test_actors_go_where_there_is_room():
    def placed(nodes, gpus_each=1, **how):
        one = place(SynthesizeSettings(**how), nodes, gpus_each)
        return one.num_actors, one.most, one.beside, one.num_cpus, one.num_gpus

    laptop, node, gpus = {"CPU": 3.0}, {"CPU": 16.0}, {"CPU": 32.0, "GPU": 4.0}
    assert placed([laptop]) == (1, 1, 1, 2, None)
    assert placed([laptop], num_actors=2) == (2, 2, 2, 1, None)
    assert placed([node] * 3) == (3, 3, 1, 15, None)
    assert placed([node] * 3, threads_per_actor=4) == (3, 3, 1, 4, None)
    assert placed([node] * 3, num_actors=6) == (6, 6, 2, 7, None)
    assert placed([{"CPU": 8.0}, gpus, gpus]) == (8, 8, 4, 7, 1)
    assert placed([gpus, gpus], gpus_each=4) == (2, 2, 1, 31, 4)
    assert placed([gpus], max_actors=12) == (4, 12, 4, 7, 1)
    assert threads_here(3, 2) == 3 and threads_here(0, 10**6) == 1


def test_engines_that_share_cores_count_once(monkeypatch):
    """A budget's calibration measures one that has a node to itself, or its GPUs."""
    def engines(nodes, gpus_each=1, **how):
        return place(SynthesizeSettings(**how), nodes, gpus_each).engines

    laptop, node, gpus = {"CPU": 3.0}, {"CPU": 16.0}, {"CPU": 32.0, "GPU": 4.0}
    assert engines([laptop]) == engines([laptop], num_actors=2) == 1
    assert engines([node] * 3) == engines([node] * 3, num_actors=6) == 3 and engines([node] * 3, num_actors=1) == 1
    assert engines([gpus, gpus]) == 8 and engines([gpus, gpus], gpus_each=4) == engines([gpus], num_actors=2) == 2
    assert engines([gpus], num_actors=9) == 4, "there is no room for more"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert engines_at_once(BuildSettings()) == 3, "of this machine, where no Ray was started"


@pytest.mark.parametrize(("cores", "offered"), [(2, 4), (4, 4), (8, 8)])
def test_a_cpu_is_left_for_reading_and_writing_on_one_machine(monkeypatch, cores, offered):
    """Else Ray Data's own tasks would wait for the actors for ever."""
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(offered)}}])
    for num_actors in (0, 1, 2):
        placed = placement_here(BuildSettings.model_validate({"synthesize": {"num_actors": num_actors}}))
        assert 0 < placed.num_actors * placed.num_cpus < offered


def test_a_full_disk_is_one_line_wherever_ray_found_it(capfd):
    from ray.exceptions import RayTaskError

    def command():
        inner = RayTaskError("write", "a\nlong\ntrace", OSError(28, "No space left on device")).as_instanceof_cause()
        raise ValueError("Ray Data's own") from inner

    assert exit_code(command, resumable=True) == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "same command again" in said
    with pytest.raises(RuntimeError):
        exit_code(lambda: (_ for _ in ()).throw(RuntimeError("a defect")), resumable=True)


def test_reporting_goes_on_when_the_disk_is_full(tmp_path):
    class Full:
        seconds = 0.0

        def save(self):
            raise OSError(28, "No space left on device")

    with CommittedProgress(tmp_path, 4, lambda *of: None, Full()) as reporting:
        reporting._report()


def test_batches_with_failures_are_taken_back(tmp_path):
    write_part(tmp_path / "parts", "x_1-0.parquet", [Dropped("c1", "cloze", "error: E: x")])
    write_part(tmp_path / "parts", "x_2-0.parquet", [conversation(2)])
    for name in ("x_1", "x_2"):
        write_part(tmp_path / "checkpoint", f"{name}.parquet", [])
    assert count_failed(tmp_path) == 1
    assert forget_failed(tmp_path) == "error: E: x"
    assert count_failed(tmp_path) == 0, "what is done again has not failed yet"
    left = sorted(file.name for file in (tmp_path / "checkpoint").iterdir())
    assert left == ["x_1.pending.parquet", "x_2.parquet"]


def test_held_out_questions_are_not_trained_on():
    conversations = [conversation(i, f"Who is {i // 2}?") for i in range(40)]
    rest, questions = split(conversations, 3, seed=0)
    asked = {question.question for question in questions}
    assert 1 <= len(asked) <= 3
    assert not asked & {one.messages[0]["content"] for one in rest}
    assert split(conversations, 3, seed=0)[1] == questions
    assert split(conversations, 0, seed=0) == (conversations, [])
    general = [replace(one, chunk_id="") for one in conversations]
    assert split(general, 3, seed=0) == (general, [])  # what the corpus does not answer is no question about it
    # Of several rounds none is held out, and none is trained on in which a held-out question was asked.
    rounds = [replace(one, messages=(*one.messages, {"role": "user", "content": "And where?"},
                                     {"role": "assistant", "content": "Here."})) for one in conversations]
    assert split(rounds, 3, seed=0) == (rounds, [])
    assert len(without(rounds, list(asked))) == len(rounds) - 2 * len(asked)
    # The example turns that short ones begin with are nobody's question.
    shown = [replace(one, messages=(*example_messages(), *one.messages), shared_tokens=4) for one in conversations]
    assert without(shown, [example_messages()[0]["content"]]) == shown


def test_the_clock_counts_killed_runs(tmp_path):
    write_manifest(tmp_path / "clock.json", {"seconds": 100.0})
    clock = Clock(tmp_path / "clock.json")
    assert 100 <= clock.seconds < 160
    clock.save()
    assert 100 <= Clock(tmp_path / "clock.json").seconds < 160


def test_budget_fits_what_it_plans():
    settings = BuildSettings()
    rates = Rates(conversation_seconds=0.1, pack_seconds=3.0, kept=0.5, tokens=60)
    planned = fit(settings, rates, 600)
    steps, seconds = estimate(planned, rates)
    assert steps == planned.train.steps > 10
    assert 570 < seconds <= 600
    with pytest.raises(UserError, match="too short"):
        fit(settings, rates, 40)


def test_a_budget_is_a_time_or_a_count():
    assert parse_budget("1.5h") == Budget(5400, "seconds")
    assert parse_budget("2000conversations") == parse_budget("2000 conversations") == Budget(2000, "conversations")
    assert parse_budget("500000tokens") == Budget(500_000, "tokens")
    for nonsense in ("10", "0m", "-1m", "0conversations", "1.5tokens", "10 minutes", "many", "", "1e3tokens", "nanm"):
        with pytest.raises(UserError, match="10m, 2000conversations or 500000tokens"):
            parse_budget(nonsense)
    rates = Rates(conversation_seconds=0.1, pack_seconds=3.0, kept=0.5, tokens=60)
    assert conversations_for(Budget(7, "conversations"), None) == 7
    assert conversations_for(Budget(3000, "tokens"), rates) == 100
    assert conversations_for(Budget(60, "seconds"), rates, spent=10) == 200
    with pytest.raises(UserError, match="2m would do"):
        conversations_for(Budget(40, "seconds"), rates, spent=10)


def test_synthesis_alone_goes_by_a_budget(tiny_model_dir, corpus_file, tmp_path, monkeypatch, capfd):
    def planned(output, budget, *more):
        argv = ["synthesize", str(corpus_file), "--output", str(tmp_path / output),
                f"--set=model.name={tiny_model_dir}", "--budget", budget, *more]
        return main(argv), seen.pop("planned", None), capfd.readouterr().err

    seen = {}
    monkeypatch.setattr("workflows.building.machine_rates.calibrate", lambda *of, **how: Rates(0.5, 0.0, 0.5, 30.0))
    monkeypatch.setattr("workflows.synthesis.synthesize.synthesize", lambda corpus, output, settings:
                        seen.update(planned=settings.synthesize.num_conversations))
    assert planned("a", "25conversations") == (0, 25, "plan: 25 conversations for a budget of 25conversations\n")
    assert planned("a", "900tokens")[:2] == (0, 60)
    first = planned("a", "1m")[1]
    assert first in range(50, 61)
    monkeypatch.setattr("workflows.building.machine_rates.calibrate", lambda *of, **how: Rates(5.0, 0.0, 0.5, 30.0))
    assert planned("a", "1m")[1] == first  # decided once
    assert planned("b", "1m")[1] in (5, 6)
    code, count, said = planned("c", "9conversations", "--set=synthesize.num_conversations=9")
    assert (code, count) == (2, None) and "both say how many" in said
    code, count, said = planned("a", "five")
    assert (code, count, said.count("\n")) == (2, None, 1)
    assert main(["train", "d", "--corpus", "c", "--output", "o", "--set=budget=10m"]) == 2
    assert "train has no budget" in capfd.readouterr().err


def test_a_build_goes_by_a_count_and_its_rounds_share_it(tiny_model_dir, corpus_file, tmp_path, monkeypatch):
    base = tiny_settings(tiny_model_dir, num_conversations=0)
    corpus = load_corpus(str(corpus_file))
    monkeypatch.setattr("workflows.building.machine_rates.remembered", lambda settings: Rates(0.5, 1.0, 0.5, 30.0))
    for rounds, budget, count in ((1, "60conversations", 60), (3, "60conversations", 20), (2, "900tokens", 30)):
        settings = base.model_copy(update={"budget": budget, "curriculum": CurriculumSettings(rounds=rounds)})
        settled = settle(corpus, settings, tmp_path)
        assert (settled.synthesize.num_conversations, settled.train.steps) == (count, 0)
        assert with_steps(corpus, settled, {}, tmp_path) == settled  # steps go by epochs
        assert settle(corpus, settled, tmp_path) == settled  # as a variation of it is planned


def test_steps_take_what_the_conversations_left_and_an_epoch_at_least():
    settings, rates = BuildSettings(), Rates(conversation_seconds=0.1, pack_seconds=2.0, kept=0.5, tokens=64)
    assert settings.train.pack_tokens == 512
    assert steps_within(settings, rates, 800, 660) == 300  # a minute starts the training
    assert steps_within(settings, rates, 800, 100) == steps_within(settings, rates, 800, -5) == 100


_SYNTHESIZE = """
import json, sys
from cartridges.config import BuildSettings
from cartridges.corpus import load_corpus
from workflows.synthesis.synthesize import synthesize
synthesize(load_corpus(sys.argv[1]), sys.argv[2], BuildSettings.model_validate(json.loads(sys.argv[3])))
"""


@contextmanager
def in_a_process(code, *arguments, stderr=None):
    """A driver of its own session, gone at the end."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], start_new_session=True,
                               env={**os.environ, "WANDB_MODE": "disabled"}, stderr=stderr)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def wait_for(condition, process, patience_s=900):
    """Until `condition()`; the machine may be busy."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_nodes_make_what_one_makes(tiny_model_dir, corpus_file, tmp_path, monkeypatch):
    """Without a number of actors there is one for each node or GPU; the ids and what is asked do not depend on it."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("WANDB_MODE", "disabled")
    # Off means that every server of this cluster binds to loopback only.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
    settings = tiny_settings(tiny_model_dir, num_conversations=32, batch_size=4)
    made = {}
    for gpus in (None, 0, 1):  # None: one node. Ray is told of GPUs that are not there: what it asks of its callers
        if gpus is not None:   # is then as with them, and torch, which sees none, computes on the CPU
            cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": gpus})
            cluster.add_node(num_cpus=2, num_gpus=gpus)
            ray.init(address=cluster.address, log_to_driver=False)
        try:
            if gpus is not None:
                placed = placement_here(settings)
                assert (placed.num_actors, placed.num_cpus, placed.num_gpus) == (2, 1, gpus or None)
                assert engines_at_once(settings) == 2
            synthesize(load_corpus(str(corpus_file)), str(tmp_path / str(gpus)), settings, lambda *of: None)
        finally:
            if gpus is not None:
                ray.shutdown()
                cluster.shutdown()
        made[gpus] = [(row["conversation_id"], row["messages"], row["dropped"]) for row in
                      shard_rows(tmp_path / str(gpus))]
    assert made[None] == made[0] == made[1] and len(made[None]) == 32


@pytest.mark.slow
def test_killed_driver_resumes_with_the_planned_ids(tiny_model_dir, corpus_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    settings = tiny_settings(tiny_model_dir, num_conversations=160, batch_size=2)
    output, elsewhere = tmp_path / "dataset", tmp_path / "elsewhere.txt"
    with in_a_process(_SYNTHESIZE, corpus_file, output, settings.model_dump_json()) as process:
        wait_for((output / "plan.json").exists, process)
        corpus_file.rename(elsewhere)  # what is planned needs it no more
        wait_for(lambda: len(list((output / "work" / "checkpoint").glob("*.parquet"))) > 3, process)
    assert not (output / "dataset.json").exists()
    with pytest.raises(UserError, match="does not exist"):
        synthesize(load_corpus(str(corpus_file)), str(output), settings)
    elsewhere.rename(corpus_file)
    planned = {row["conversation_id"] for row in pq.read_table(output / "work" / "tasks.parquet").to_pylist()}

    manifest = synthesize(load_corpus(str(corpus_file)), str(output), settings)

    rows = shard_rows(output)
    ids = [row["conversation_id"] for row in rows]
    assert len(ids) == len(set(ids)) == manifest["planned"] == 160
    assert set(ids) == planned
    kept = load_conversations(output / "shards")
    assert len(kept) == manifest["conversations"]["kept"] > 0
    assert not (output / "work").exists()
    _check_alignment(rows)
    _check_datasets_reads(output, len(rows))
    card = json.loads((output / "data_card.json").read_text())
    assert (card["fingerprint"], card["seed"]) == (manifest["fingerprint"], 3)
    assert sum(sum(counts.values()) for counts in card["families"].values()) == 160
    assert card["tokens"]["loss"] == card["topk_mass"]["n"] > 0 and len(card["model"]["weights_digest"]) == 64
    assert card["groundedness"]["known"]["numbers"]["share"] == 1
    again = synthesize(load_corpus(str(corpus_file)), str(output), settings)
    assert again == manifest
    with pytest.raises(UserError, match="other settings"):
        synthesize(load_corpus(str(corpus_file)), str(output), settings.model_copy(update={"seed": 4}))


def _check_alignment(rows):
    for row in rows:
        if not row["dropped"]:
            assert len(row["topk_ids"]) == len(row["input_ids"]) == len(row["loss_mask"])
            assert [bool(ids) for ids in row["topk_ids"]] == row["loss_mask"]
            assert not row["loss_mask"][-1]


def _check_datasets_reads(output, count):
    import datasets

    files = sorted(str(file) for file in (output / "shards").glob("*.parquet"))
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(output.parent / "hf"))["train"]
    assert loaded.num_rows == count
    assert json.loads(loaded[0]["info"]) is not None
