"""`cartridges inspect DATASET`: the data card for a person. `workflows.synthesis.dataset_page` adds samples."""

from pathlib import Path
from typing import Any, TextIO

from cartridges.errors import UserError
from workflows.runtime.console import print_table
from workflows.runtime.manifests import read_manifest
from workflows.synthesis.dataset import CARD

DISTRIBUTIONS = {
    "teacher_entropy": "entropy, nats an answer token", "topk_mass": "probability inside the top-k",
    "teacher_nll": "NLL of an answer, nats a token", "information_gain": "information gain, nats a token",
    "answer_tokens": "answer tokens",
}


def read_card(dataset: Path) -> dict[str, Any]:
    """The data card of `dataset`. Raises `UserError` where that is no finished data set."""
    card = read_manifest(dataset / CARD)
    if card is None:
        raise UserError(f"{dataset} has no {CARD}: it is no data set, or not a finished one; "
                        "`cartridges synthesize` writes it when it ends")
    return card


def print_card(card: dict[str, Any], stream: TextIO) -> None:
    """The card as tables: families by outcome, distributions, and the shares a reader should know."""
    kept, dropped = card["conversations"]["kept"], card["conversations"]["dropped"]
    print(f"{card['corpus']['id']}: {kept} of {card['planned']} conversations kept, "
          f"{card['tokens']['input']} tokens, {card['tokens']['loss']} of them the answers'", file=stream)
    print(f"teacher {card['model']['name']}, weights {card['model']['weights_digest'][:16]}; corpus "
          f"{card['corpus']['fingerprint'][:16]}; seed {card['seed']}\n", file=stream)
    print_table(family_rows(card["families"], dropped), stream)
    print(file=stream)
    print_table([["", "mean", *card["topk_mass"]["quantiles"]],
                 *(_distribution_row(label, card[name]) for name, label in DISTRIBUTIONS.items()
                   if card[name]["n"])], stream)
    print(file=stream)
    for line in remarks(card):
        print(line, file=stream)


def family_rows(families: dict[str, dict[str, int]], dropped: dict[str, int]) -> list[list[str]]:
    """One row a family: planned, kept, and the dropped by reason, the commonest reason first."""
    reasons = sorted(dropped, key=lambda reason: (-dropped[reason], reason))
    total = {name: sum(counts.get(name, 0) for counts in families.values()) for name in ["kept", *reasons]}
    rows = [["family", "planned", "kept", *reasons]]
    for family, counts in [*families.items(), ("all", total)]:
        shown = [str(counts.get(name, 0) or "-") for name in ["kept", *reasons]]
        rows.append([family, str(sum(counts.values())), *shown])
    return rows


def remarks(card: dict[str, Any]) -> list[str]:
    """Duplicates, coverage, groundedness and failures, a line each."""
    chunks, duplicates = card["chunks"], card["duplicates"]
    lines = [
        f"duplicates: {duplicates['share']:.1%} of what passed the other filters",
        f"chunks: {chunks['covered']} of {chunks['planned']} have conversations, "
        f"{chunks['fewest_conversations']} to {chunks['most_conversations']} each",
    ]
    for kind, told in card["groundedness"].items():
        shares = [f"{told[name]['share']:.1%} of {told[name]['count']} {name}"
                  for name in ("numbers", "names") if told[name]["count"]]
        if shares:
            lines.append(f"grounded in chunk or question, {kind} answers: {', '.join(shares)}")
    return lines + [f"failed {row['conversation_id']} ({row['seed_family']}): {row['error']}"
                    for row in card["failures"]]


def _distribution_row(label: str, told: dict[str, Any]) -> list[str]:
    values = [told["mean"], *told["quantiles"].values()]
    return [label, *(f"{value:.3g}" for value in values)]
