"""What a person reads of a bench's result."""

import statistics
from typing import Any, TextIO

from workflows.runtime.console import human_bytes, print_table


def print_train(result: dict[str, Any], stream: TextIO) -> None:
    """The sides beside each other, the ratios, the share of the matrix-product rate."""
    rows = [["side", "conversation tokens/s", "memory before", "growth"]]
    for side, rate in result["tokens_per_s"].items():
        memory = result["memory"][side]
        rows.append([side, "out of memory", "-", "-"] if rate is None else [
            side, f"{rate:.0f}", human_bytes(memory["before_bytes"]), human_bytes(memory["growth_bytes"])])
    print(_headline(result, f"p {result['num_tokens']}, packs of {result['pack_tokens']}"), file=stream)
    print(file=stream)
    print_table(rows, stream)
    work = result["work"]
    peft, padded, upper = (_times(result[f"speedup_{of}"]) for of in ("vs_peft", "vs_padded", "of_upper_vs_peft"))
    print(f"\n{peft} PEFT's cartridge tuner, {padded} a plain padded loop; with the upper layers alone {upper} PEFT's",
          file=stream)
    print(f"matrix products: {result['matmul_share']:.0%} of {result['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s, "
          f"{result['matmul_share_with_padding']:.0%} with padding counted "
          f"({work['packed_tokens'] / work['packed_slots']:.0%} of the slots are tokens)", file=stream)
    _print_notes(result["notes"], stream)


def print_load(result: dict[str, Any], stream: TextIO) -> None:
    """Asked unevenly beside asked with nothing to load, and what that took."""
    load, ratios = result["load"], result["ratios"]
    print(_headline(result, f"engine {result['engine']}, {load['corpora']} corpora of p {load['num_tokens']}, "
                            f"{load['resident']} at once, {load['clients']} clients"), file=stream)
    print(file=stream)
    rows = [["arm", "requests/s", "TTFT s", "corpora asked", "loads", "put out"]]
    for arm in ("skewed", "resident"):
        of = [row for row in result["rows"] if row["arm"] == arm]
        rows.append([arm, *(f"{statistics.median(row[key] for row in of):{places}}" for key, places in (
            ("requests_per_s", ".2f"), ("ttft_s", ".2f"), ("corpora", ".0f"), ("loads", ".0f"), ("evictions", ".0f")))])
    print_table(rows, stream)
    print(f"\nskewed over resident: {_times(ratios['throughput'])} the requests a second, {_times(ratios['ttft'])} the "
          f"time to first token; {result['hit_share']:.0%} found their cartridge loaded, {result['errors']} errors",
          file=stream)
    print(f"a first request on a corpus over its second: {_times(ratios['cold_ttft'])} the time to first token",
          file=stream)
    _print_notes(result["notes"], stream)


def print_synthesize(result: dict[str, Any], stream: TextIO) -> None:
    """Conversations a second of each engine's loop and pipelines."""
    what = f"{result['conversations']} conversations in batches of {result['batch_size']}"
    print(_headline(result, what), file=stream)
    print(file=stream)
    rows = [["engine", "side", "conversations/s", "over its loop", "prefix tokens found"]]
    for engine, rates in result["conversations_per_s"].items():
        for side, rate in rates.items():
            share = result["prefix_hit_share"][engine] if side == "loop" else None
            rows.append([engine, side, f"{rate:.2f}", _times(result["ratios"][engine][side]),
                         "-" if share is None else f"{share:.0%}"])
    print_table(rows, stream)
    _print_notes(result["notes"], stream)


def print_route(result: dict[str, Any], stream: TextIO) -> None:
    """The share of questions that found their corpus, by corpus."""
    print(f"{result['accuracy']:.0%} of the questions found their corpus among {result['corpora']} "
          f"(by chance {result['chance']:.0%}); {result['passages']} passages indexed in {result['index_s']:.1f} s, "
          f"{result['question_ms']:.2f} ms a question\n", file=stream)
    print_table([["corpus", "found"], *([name, f"{share:.0%}"] for name, share in result["by_corpus"].items())], stream)


def print_serve(result: dict[str, Any], stream: TextIO) -> None:
    """Ratios by context, measured and extrapolated."""
    budget = human_bytes(result["kv_budget_bytes"])
    print(_headline(result, f"engine {result['engine']}, KV budget {budget}"), file=stream)
    for title, ratios in (("a corpus for each request", result["ratios"]),
                          ("all requests on one corpus", result.get("ratios_one_corpus", []))):
        if ratios:
            print(f"\n{title}: cartridge against full context", file=stream)
            print_table([HEAD, *map(_cells, ratios)], stream)
    far = result["extrapolation"]
    print(f"\nextrapolated (the fit is off by at most {far['residual']:.0%} where it was measured):", file=stream)
    print_table([HEAD[:-2], *(_cells(ratio)[:-2] for ratio in far["ratios"])], stream)
    _print_notes([*far["assumptions"], *result["notes"]], stream)


HEAD = ["context", "p", "batches", "decode", "TTFT", "KV", "tokens/s", "cold TTFT"]


def _cells(ratio: dict[str, Any]) -> list[str]:
    batch, rates = ratio["batch"], ratio.get("decode_tokens_per_s", {})
    return [str(ratio["context_tokens"]), str(ratio["num_tokens"]),
            f"{batch['cartridge']} / {batch['full_context']}",
            *(_times(ratio[key]) for key in ("decode", "ttft", "kv_bytes")),
            " / ".join("-" if rates.get(arm) is None else f"{rates[arm]:.0f}" for arm in ("cartridge", "full_context")),
            _times(ratio.get("cold_ttft"))]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _headline(result: dict[str, Any], what: str) -> str:
    machine = result["machine"]
    return (f"{machine['model']} in {machine['dtype']} on {machine['device']}, {machine['cpus']} CPUs, {what}, "
            f"median of {result['runs']} runs")


def _print_notes(notes: list[str], stream: TextIO) -> None:
    print(file=stream)
    for note in notes:
        print(f"- {note}", file=stream)
