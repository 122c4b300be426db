"""`cartridges bench`: the sides do the same work, the yardstick counts what is done, the ratios are right."""


import json
import sys
from contextlib import nullcontext

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cartridges.config import BuildSettings, ModelSettings, OptimizerSettings, TrainSettings
from cartridges.distill.matmul import Counts, computed, flops, needed, planned, step_products
from cartridges.distill.packing import collate, plan_packs
from cartridges.errors import UserError
from cartridges.models import load_base_model
from cartridges.selfstudy.storage import schema, to_row
from test_distill import conversation
from tests.test_synthesize import CORPUS
from workflows.bench.arms import Sizes, batch_size
from workflows.bench.conversations import choose_work
from workflows.bench.extrapolate import extrapolate
from workflows.bench.padded import pad
from workflows.bench.sides import make_side
from workflows.bench.tables import print_train
from workflows.bench.train import SIDES, bench_train, summarize
from workflows.cli import main

TRAIN = TrainSettings(num_tokens=40, row_tokens=64, pack_tokens=256)


@pytest.fixture
def settings(tiny_model_dir):
    return BuildSettings(model=ModelSettings(name=str(tiny_model_dir), dtype="float32"), train=TRAIN)


@pytest.fixture
def work(settings):
    """One step: short conversations, half of them after ten shared tokens."""
    return choose_work([conversation(i, shared=10 * (i % 2)) for i in range(6)], settings, steps=1)


@pytest.mark.parametrize("name", ["peft", "padded"])
def test_every_side_has_the_gradient_of_ours(settings, work, name):
    if name == "peft":
        pytest.importorskip("peft")
    side = make_side(name, load_base_model(settings.model, "cpu"), work, settings)
    batch = pad(work.chosen, 64, TRAIN.label_share)
    loss = side.loss(batch)
    loss.backward()
    ours = make_side("ours", load_base_model(settings.model, "cpu"), work, settings)
    cartridge = ours.trainer.stepper.students[0].cartridge
    packs = [collate(work.conversations, plan, TRAIN.pack_tokens, TRAIN.label_share) for plan in work.plans[0]]
    sums = [ours.trainer.stepper.forward_backward({0: pack}, {0: len(batch["topk_ids"])})[0] for pack in packs]
    ours_loss = sum(float(s.loss.detach()) for s in sums) / len(batch["topk_ids"])
    assert ours_loss == pytest.approx(float(loss.detach()), rel=1e-4)
    theirs = _gradients(side)
    for one, other in zip((cartridge.trainable_keys.grad, cartridge.trainable_values.grad), theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def _gradients(side):
    """As `[layers, heads, p, head_dim]` for keys and values."""
    if hasattr(side, "cartridge"):
        return side.cartridge.trainable_keys.grad, side.cartridge.trainable_values.grad
    flat = side.model.prompt_encoder["default"].trainable_embedding.grad
    both = flat.view(len(flat), 2, 2, 2, 16).permute(1, 2, 3, 0, 4)  # layer, key or value, head, slot, dim
    return both[:, 0], both[:, 1]


def test_a_round_of_each_side_trains(settings, work):
    pytest.importorskip("peft")
    for name in SIDES:
        side = make_side(name, load_base_model(settings.model, "cpu"), work, settings)
        assert side.round() > 0 and side.round() > 0
        if name in ("ours", "upper"):
            assert side.trainer.stepper.students[0].cartridge.num_frozen_layers == (1 if name == "upper" else 0)


def test_the_padded_loop_learns_what_ours_learns(settings):
    """Nine steps of eight conversations each, over three epochs, end in the same slots."""
    optimizer = OptimizerSettings(name="adam", lr=0.02, key_lr_scale=1.0, warmup_share=0.0, final_lr_share=1.0)
    settings = settings.model_copy(update={"train": TRAIN.model_copy(update={"steps": 9, "optimizer": optimizer})})
    work = choose_work([conversation(i, own=30) for i in range(24)], settings, steps=9)
    assert len(work.chosen) == 9 * work.batch_size == 72
    ended = {}
    for name in ("ours", "padded"):
        side = make_side(name, load_base_model(settings.model, "cpu"), work, settings)
        cartridge = side.cartridge if name == "padded" else side.trainer.stepper.students[0].cartridge
        start = cartridge.trainable_keys.detach().clone()
        side.round()
        ended[name] = cartridge.trainable_keys.detach(), cartridge.trainable_values.detach()
        assert (ended[name][0] - start).abs().mean() > 0.02
    torch.testing.assert_close(ended["ours"], ended["padded"], atol=2e-3, rtol=1e-2)


def test_the_yardstick_runs_what_the_formula_counts(settings, work):
    base = load_base_model(settings.model, "cpu")
    pack = collate(work.conversations, work.plans[0][0], TRAIN.pack_tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for left, right in step_products(base, pack, TRAIN.num_tokens):
            torch.matmul(left, right)
    assert counter.get_total_flops() == flops(base.model, computed(pack, TRAIN.num_tokens))


@pytest.mark.parametrize("shared", [0, 10])
def test_needed_products_are_those_of_the_real_tokens(tiny_model, shared):
    """Of one conversation that fills its row, only the masked half of its own attention is not needed."""
    pack = collate([conversation(0, shared=shared, own=64)],
                   choose_work([conversation(0, shared=shared, own=64)], BuildSettings(
                       train=TRAIN.model_copy(update={"pack_tokens": 64})), 1).plans[0][0], 64)
    wanted, whole = needed(pack, 8), computed(pack, 8)
    assert wanted.tokens == whole.tokens == 64 + shared
    assert whole.pairs - wanted.pairs == 64 * 63 // 2 + shared * (shared - 1) // 2
    assert wanted.losses == 4 and flops(tiny_model, wanted) < flops(tiny_model, whole)


@pytest.mark.parametrize("shared", [0, 11])
def test_what_a_pack_needs_is_known_from_its_plan(shared):
    made = [conversation(i, shared, own=own) for i, own in enumerate([7, 30, 64, 65, 200, 300, 12])]
    plans = plan_packs(made, 64, 256, seed=0)
    assert [planned(made, plan, 8) for plan in plans] == [needed(collate(made, plan, 256), 8) for plan in plans]
    assert sum(planned(made, plan, 8).losses for plan in plans) == 4 * 6, "of the cut one the answer is cut off"


def test_layers_that_are_not_trained_are_not_counted(tiny_model):
    counts = Counts(tokens=64, pairs=5000, losses=4)
    upper, whole = flops(tiny_model, counts, first_layer=1), flops(tiny_model, counts)
    head = 4 * counts.losses * tiny_model.get_output_embeddings().weight.numel()
    assert (upper - head) * 2 < whole - head, "without the first layer's queries, keys and values going back"


def test_a_side_that_ran_out_of_memory_has_no_figures(settings, capsys):
    rows = [{"round": n, "side": "ours", "seconds": 2.0, "tokens_per_s": 50.0, "matmul_seconds": 1.0} for n in (1, 2)]
    rows += [{"round": n, "side": "padded", "seconds": 6.0, "tokens_per_s": 16.7} for n in (1, 2)]
    ours = {"work": {"tokens": 100, "flops_computed": 10, "flops_needed": 8, "packed_tokens": 8, "packed_slots": 10},
            "machine": {"model": "m", "dtype": "bfloat16", "device": "cuda", "cpus": 2}}
    held = {"before_bytes": 0, "peak_bytes": 10, "growth_bytes": 10}
    result = summarize(ours, rows, {"ours": held, "padded": held, "peft": None, "upper": None}, settings)
    assert result["speedup_vs_padded"] == 3 and result["speedup_vs_peft"] is result["tokens_per_s"]["peft"] is None
    assert result["matmul_share"] == pytest.approx(0.4)
    print_train(result, sys.stdout)
    printed = capsys.readouterr().out
    assert "3.00x a plain padded loop" in printed and "peft ran out of the GPU's memory" in printed


class Answering:
    """In place of a side's process."""

    peak_bytes = 10

    def __init__(self, _, job):
        self.side = job["side"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def answer(self):
        return {"work": {"tokens": 100, "flops_computed": 10, "flops_needed": 8}, "machine": {}, "memory": 5}

    def ask(self, request):
        if request == "bare":
            return {"seconds": 1.0}
        return {"seconds": None, "memory": None} if self.side in OUT_OF_MEMORY else {"seconds": 2.0, "memory": 9}

    def forget_peak(self):
        pass


OUT_OF_MEMORY: set[str] = set()


def test_a_side_that_runs_out_of_memory_leaves_the_others(settings, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "part.parquet").touch()
    monkeypatch.setattr("workflows.bench.train.ChildProcess", Answering)
    monkeypatch.setitem(globals(), "OUT_OF_MEMORY", {"peft"})
    result = bench_train(settings, 2, 1, 10, str(tmp_path))
    assert [row["side"] for row in result["rows"]].count("padded") == 2 and result["speedup_vs_padded"] == 1
    assert result["memory"]["peft"] is None and "peft" not in {row["side"] for row in result["rows"]}
    monkeypatch.setitem(globals(), "OUT_OF_MEMORY", {"ours"})
    with pytest.raises(UserError, match="lower --pack-tokens"):
        bench_train(settings, 2, 1, 10, str(tmp_path))


@pytest.mark.slow
def test_train_on_the_command_line(settings, tmp_path, capfd):
    pytest.importorskip("peft")
    rows = [to_row(conversation(i, own=30)) for i in range(12)]
    pq.write_table(pa.Table.from_pylist(rows, schema()), tmp_path / "part.parquet")
    assert main(["bench", "train", "--data", str(tmp_path), "--model", settings.model.name, "--num-tokens", "40",
                 "--pack-tokens", "128", "--set", "model.dtype=float32", "--rounds", "2", "--steps", "2",
                 "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["runs"] == 2 and [row["side"] for row in result["rows"]].count("peft") == 2
    # Two rounds: the median is the mean of two ratios, each of the rows of one round.
    by_round = [{row["side"]: row["seconds"] for row in result["rows"] if row["round"] == n} for n in (1, 2)]
    assert result["speedup_vs_peft"] == pytest.approx(sum(r["peft"] / r["ours"] for r in by_round) / 2)
    assert 0 < result["matmul_share"] < result["matmul_share_with_padding"]
    assert result["work"]["tokens"] == 30 * result["work"]["conversations"]
    assert result["memory"]["peft"]["peak_bytes"] >= result["memory"]["peft"]["before_bytes"] > 10**8


def test_serve_on_the_command_line(settings, capfd):
    assert main(["bench", "serve", "--model", settings.model.name, "--engine", "transformers", "--contexts",
                 "256,512", "--kv-budget", "1", "--output-tokens", "16", "--runs", "1", "--max-batch", "8",
                 "--one-corpus", "--set", "model.dtype=float32", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["engine"] == "transformers" and result["runs"] == 1
    bytes_per_token = 2 * 2 * 2 * 16 * 4
    for ratio, context in zip(result["ratios"], (256, 512), strict=True):
        assert (ratio["context_tokens"], ratio["num_tokens"]) == (context, -(-(context // 10) // 32) * 32)
        rows = {row["arm"]: row for row in result["rows"]
                if row["context_tokens"] == context and row["corpora"] == "one each"}
        for arm, tokens in (("full_context", context), ("cartridge", ratio["num_tokens"])):
            blocks = -(-(tokens + rows[arm]["own_tokens"]) // 32)
            assert rows[arm]["kv_bytes_per_request"] == blocks * 32 * bytes_per_token
            assert rows[arm]["batch"] == min(8, 2**20 // rows[arm]["kv_bytes_per_request"])
        kv = [rows[arm]["kv_bytes_per_request"] for arm in ("full_context", "cartridge")]
        assert ratio["kv_bytes"] == pytest.approx(kv[0] / kv[1])
        assert ratio["ttft"] == pytest.approx(rows["full_context"]["ttft_s"] / rows["cartridge"]["ttft_s"])
    assert all(ratio["batch"] == {"full_context": 8, "cartridge": 8} for ratio in result["ratios_one_corpus"])
    assert result["extrapolation"]["ratios"][0]["context_tokens"] == 131072
    assert result["extrapolation"]["assumptions"] and "untrained" in result["notes"][0]


@pytest.mark.slow
def test_load_counts_what_is_loaded_and_put_out(settings, capfd):
    """Twelve corpora on a replica that holds three."""
    assert main(["bench", "load", "--model", settings.model.name, "--engine", "transformers", "--corpora", "12",
                 "--resident", "3", "--requests", "30", "--clients", "2", "--num-tokens", "16", "--output-tokens", "4",
                 "--runs", "1", "--set", "model.dtype=float32", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    rows = {row["arm"]: row for row in result["rows"]}
    assert len(result["rows"]) == 2 and result["errors"] == 0
    assert rows["resident"]["loads"] == rows["resident"]["misses"] == 0 and rows["resident"]["hits"] == 30
    skewed = rows["skewed"]
    assert skewed["hits"] + skewed["misses"] == 30 and skewed["corpora"] > 3
    assert skewed["corpora"] - 3 <= skewed["loads"] == skewed["evictions"] <= skewed["misses"]
    assert result["hit_share"] == skewed["hits"] / 30
    assert result["ratios"]["throughput"] == pytest.approx(
        skewed["requests_per_s"] / rows["resident"]["requests_per_s"])
    assert [one["loads"] for one in result["cold"]].count(1) >= 3
    assert result["ratios"]["cold_ttft"] > 0


@pytest.mark.slow
def test_synthesis_is_a_ratio_over_a_loop_of_the_same_tasks(settings, tmp_path, capfd):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(CORPUS)
    assert main(["bench", "synthesize", "--model", settings.model.name, "--corpus", str(corpus), "--actors", "1",
                 "--conversations", "64", "--rounds", "1", "--set", "model.dtype=float32",
                 "--set", "synthesize.batch_size=8", "--set", "synthesize.max_teacher_nll=100",
                 "--set", "synthesize.families={cloze: 1, recall: 1}", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    loop, pipeline = sorted(result["rows"], key=lambda row: row["actors"])
    assert loop["kept"] >= pipeline["kept"] > 0  # which drops what is there twice
    assert pipeline["conversations_per_s"] > 0 and loop["conversations_per_s"] > 0
    assert result["ratios"]["transformers"]["1 actor"] == pytest.approx(
        pipeline["conversations_per_s"] / loop["conversations_per_s"])
    assert 0.5 < result["prefix_hit_share"]["transformers"] < 1


@pytest.mark.parametrize(("options", "says"), [
    (["synthesize", "--engines", "fast"], "neither transformers nor vllm"),
    (["synthesize", "--conversations", "600"], "less than three batches for each of 2 actors; give 768"),
    (["load", "--corpora", "3", "--resident", "4"], "nothing would have to be loaded"),
    (["load", "--resident", "4", "--clients", "8"], "may be in use"),
    (["load", "--skew", "-1"], "asks all corpora alike"),
    (["serve", "--kv-budget", "1", "--contexts", "4000", "--set", "model.dtype=float32"], "does not hold one request"),
    (["serve", "--contexts", "1k"], "not a list of whole numbers"),
    (["serve", "--num-tokens", "2048", "--contexts", "1024"], "no shorter"),
    (["serve", "--runs", "0"], "whole number"),
    (["train", "--data", "nowhere"], "not a directory"),
    (["train", "--data", "."], "holds no conversations"),
])
def test_mistakes_are_one_line(tiny_model_dir, tmp_path, monkeypatch, capfd, options, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) if "--runs" in options else nullcontext():
        assert main(["bench", *options, "--model", str(tiny_model_dir)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("cartridges: ") and says in error


def test_without_peft_it_says_how_to_install_it(tiny_model_dir, capfd, monkeypatch):
    monkeypatch.setattr("workflows.bench.train.find_spec", lambda name: None)
    assert main(["bench", "train", "--model", str(tiny_model_dir)]) == 2
    assert ".venv/bin/pip install -e '.[bench]'" in capfd.readouterr().err


def test_batches_fill_the_budget_and_no_more():
    sizes = Sizes(1024, 128, 64, 100)
    assert batch_size("full_context", sizes, "one each", 3 * 1088 * 100, 64) == 3
    assert batch_size("cartridge", sizes, "one each", 3 * 1088 * 100, 64) == 3 * 1088 // 192
    assert batch_size("full_context", sizes, "one", (1088 + 4 * 64) * 100, 64) == 5
    assert batch_size("cartridge", sizes, "one each", 10**9, 64) == 64
    with pytest.raises(UserError, match="raise --kv-budget"):
        batch_size("full_context", sizes, "one each", 1087 * 100, 64)


def test_extrapolation_finds_the_line_it_was_given():
    def row(arm, batch, prefix):
        step = 0.02 + 0.001 * batch + 1e-7 * batch * (prefix + 32)
        return {"arm": arm, "batch": batch, "prefix_tokens": prefix, "own_tokens": 64, "step_s": step,
                "ttft_s": 0.05 + 1e-5 * prefix}

    rows = [row("full_context", 8, 1024), row("full_context", 2, 4096), row("cartridge", 32, 128),
            row("cartridge", 16, 512)]
    budget = (131072 + 64) * 100
    found = extrapolate(rows, 64, 100, budget, 32)
    assert found["residual"] < 1e-6
    ratio = found["ratios"][0]
    assert ratio["num_tokens"] == 2048 and ratio["batch"] == {"full_context": 1, "cartridge": 32}
    steps = {arm: row(arm, ratio["batch"][arm], tokens)["step_s"]
             for arm, tokens in (("full_context", 131072), ("cartridge", 2048))}
    assert ratio["decode"] == pytest.approx(32 * steps["full_context"] / steps["cartridge"], rel=1e-3)
    assert ratio["ttft"] == pytest.approx((0.05 + 1.31072) / (0.05 + 0.02048), rel=1e-3)


def test_conversations_longer_than_a_pack_are_left_out():
    conversations = [conversation(0, own=20), conversation(1, own=300), conversation(2, own=40)]
    settings = BuildSettings(train=TRAIN)
    assert {one.conversation_id for one in choose_work(conversations, settings, 1).chosen} == {"c0", "c2"}
    with pytest.raises(UserError, match="raise --pack-tokens"):
        choose_work(conversations[1:2], settings, 1)


def test_route_on_the_command_line(tiny_model_dir, tmp_path, capfd):
    """Every question names something that stands in its own corpus only, but for the last."""
    def row(corpus_id, text, *questions):
        asked = [{"id": question, "question": question, "answers": ["x"]} for question in questions]
        return {"corpus_id": corpus_id, "text": text, "questions": asked}

    file = tmp_path / "corpora.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [
        row("harbour", "The harbour takes barges.", "What does the harbour take?", "Which barges?"),
        row("rows/1", "The orchard has pears.", "Who planted pears?"),
        row("rows/2", "And plums.", "Which plums?", "Which barges are nearest?")]))
    found = run_json(capfd, "bench", "route", f"{file}::harbour", f"{file}::rows/*", "--model", str(tiny_model_dir))
    assert (found["corpora"], found["questions"], found["accuracy"]) == (2, 5, pytest.approx(4 / 5))
    assert found["by_corpus"] == {"harbour": 1.0, "rows/*": pytest.approx(2 / 3)}
    assert run_json(capfd, "bench", "route", str(file), "--model", str(tiny_model_dir))["corpora"] == 3
    assert main(["bench", "route", f"{file}::harbour", "--model", str(tiny_model_dir)]) == 2
    assert "at least two corpora" in capfd.readouterr().err
    assert main(["bench", "route", str(file), f"{file}::harbour", "--model", str(tiny_model_dir)]) == 2
    assert "given twice" in capfd.readouterr().err


def run_json(capfd, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capfd.readouterr().out)
