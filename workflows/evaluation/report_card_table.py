"""A report card as tables on a terminal: arms by metrics, paired differences, and remarks."""

from collections.abc import Iterable
from typing import Any, TextIO

from workflows.runtime.console import human_bytes, human_seconds, print_table

HIDDEN_METRICS = ("choice_accuracy_per_token",)
"""In the JSON, but not in the table."""


def print_report_card(card: dict[str, Any], stream: TextIO) -> None:
    """Arms x metrics with 95 % intervals, paired differences, build seconds and sizes."""
    print(_headline(card), file=stream)
    if card.get("arms"):
        print(file=stream)
        print_table(_arm_rows(card["arms"]), stream)
    if card.get("paired"):
        print("\npaired differences (95 % interval):", file=stream)
        print_table(_paired_rows(card["paired"]), stream)
    for line in _remarks(card):
        print(line, file=stream)
    seconds = card.get("build", {}).get("seconds", {})
    if seconds:
        stages = ", ".join(f"{stage} {human_seconds(taken)}" for stage, taken in seconds.items())
        print(f"\nbuild: {stages}; {human_seconds(sum(seconds.values()))} in all", file=stream)


def _remarks(card: dict[str, Any]) -> list[str]:
    """Where the questions come from, the controls, and what the reader should know."""
    lines = []
    questions = card.get("questions", {})
    if questions.get("source") == "held_out_self_study":
        lines.append("the questions are held-out self-study questions, not a person's")
    controls = card.get("controls", {})
    if controls:
        lines.append("controls: " + ", ".join(f"{name} {value:.4g}" for name, value in controls.items()))
    return ["", *lines, *card.get("notes", [])] if lines or card.get("notes") else []


def _headline(card: dict[str, Any]) -> str:
    cartridge, corpus = card.get("cartridge", {}), card.get("corpus", {})
    parts = [f"{cartridge.get('name', 'cartridge')}@{cartridge.get('version', 'unpublished')}"]
    if "num_tokens" in cartridge:
        parts.append(f"{cartridge['num_tokens']} tokens")
    if "bytes" in cartridge:
        parts.append(human_bytes(cartridge["bytes"]))
    if "tokens" in corpus:
        parts.append(f"corpus of {corpus['tokens']} tokens")
    if "compression_ratio" in cartridge:
        parts.append(f"{cartridge['compression_ratio']:.1f}x smaller")
    return ", ".join(parts)


def _arm_rows(arms: dict[str, Any]) -> list[list[str]]:
    metrics = _shown(metric for arm in arms.values() for metric in arm["metrics"])
    rows = [["arm", *metrics, "n", "KV"]]
    for name, arm in arms.items():
        counts = [interval["n"] for interval in arm["metrics"].values()]
        kv_bytes = arm.get("kv_bytes")
        rows.append([name, *(interval_cell(arm["metrics"].get(metric)) for metric in metrics),
                     str(max(counts, default=0)), "-" if kv_bytes is None else human_bytes(kv_bytes)])
    return rows


def _paired_rows(paired: dict[str, Any]) -> list[list[str]]:
    metrics = _shown(metric for pair in paired.values() for metric in pair)
    return [["difference", *metrics]] + [
        [name, *(interval_cell(pair.get(metric), signed=True) for metric in metrics)]
        for name, pair in paired.items()]


def _shown(metrics: Iterable[str]) -> list[str]:
    return [metric for metric in dict.fromkeys(metrics) if metric not in HIDDEN_METRICS]


def interval_cell(interval: dict[str, Any] | None, signed: bool = False) -> str:
    """`0.71 (0.64..0.78)`, or `-` where the metric does not apply to the arm."""
    if interval is None or interval["mean"] is None:
        return "-"
    sign = "+" if signed else ""
    low, high = interval.get("low"), interval.get("high")
    bounds = "" if low is None or high is None else f" ({low:{sign}.2f}..{high:{sign}.2f})"
    return f"{interval['mean']:{sign}.2f}{bounds}"


def mean_cell(card: dict[str, Any], arm: str, metric: str) -> str:
    """The mean of an arm's metric, or `-` where it does not apply."""
    interval = card["arms"].get(arm, {}).get("metrics", {}).get(metric)
    return "-" if interval is None or interval["mean"] is None else f"{interval['mean']:.2f}"
