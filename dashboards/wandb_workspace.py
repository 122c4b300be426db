"""The W&B workspace as code: the stages of a build from left to right, the report card below.

    python -m dashboards.wandb_workspace --print                 # as JSON, needs no account
    python -m dashboards.wandb_workspace --entity TEAM           # saves it to your project
"""

import argparse
import json
from typing import Any

import wandb_workspaces.reports.v2 as reports
import wandb_workspaces.workspaces as workspaces

from workflows.runtime.tracking import ARM_METRICS, ARMS, METRICS, PROJECT

LINES: dict[str, dict[str, tuple[str, ...]]] = {
    "Self-study": {
        "Conversations": ("synthesize/kept", "synthesize/dropped"),
        "Conversations per second": ("synthesize/conversations_per_s",),
        "Top-k mass": ("synthesize/topk_mass",),
        "Teacher entropy (nats)": ("synthesize/teacher_entropy",),
        "Duplicate share": ("synthesize/duplicate_share",),
    },
    "Training": {
        "Loss and its floor (nats per loss token)": ("train/loss", "train/teacher_entropy"),
        "KL to the teacher": ("train/kl",),
        "Held-out questions answered": ("train/held_out_contains",),
        "Learning rate": ("train/lr",),
        "Gradient norm": ("train/grad_norm",),
        "Conversation tokens per second": ("train/tokens_per_s",),
        "Share of the machine's matrix-product rate": ("train/matmul_share",),
        "Memory of the first worker (bytes)": ("train/memory_bytes",),
        "Top-k mass of the targets": ("train/topk_mass",),
    },
}
"""Section -> panel -> keys drawn over the step. Every key is in `workflows.runtime.tracking.METRICS`."""

SECONDS = ("synthesize/seconds", "train/seconds", "evaluate/seconds")


def bars() -> dict[str, tuple[str, ...]]:
    """Panel -> keys compared between runs: each metric over the arms, then bytes and seconds."""
    panels = {f"{metric} by arm": tuple(f"evaluate/{arm}/{metric}" for arm in ARMS)
              for metric in ARM_METRICS}
    panels["KV bytes by arm"] = tuple(f"evaluate/{arm}/kv_bytes" for arm in ARMS)
    panels["Seconds by stage"] = SECONDS
    return panels


def workspace(entity: str, project: str = PROJECT) -> workspaces.Workspace:
    """The workspace, not saved. Raises `ValueError` for a panel that draws an unknown key."""
    sections = [workspaces.Section(name=title, is_open=True, panels=[
        reports.LinePlot(title=panel, x="Step", y=_known(keys)) for panel, keys in panels.items()])
        for title, panels in LINES.items()]
    card = [reports.BarPlot(title=panel, metrics=_known(keys)) for panel, keys in bars().items()]
    card += [reports.ScalarChart(title="Compression ratio", metric=_known(["evaluate/compression_ratio"])[0]),
             reports.WeavePanelSummaryTable(table_name="evaluate/report_card"),
             reports.WeavePanelSummaryTable(table_name="evaluate/paired")]
    sections.append(workspaces.Section(name="Report card", is_open=True, panels=card))
    return workspaces.Workspace(
        entity=entity, project=project, name="Cartridges", sections=sections,
        runset_settings=workspaces.RunsetSettings(
            groupby=[workspaces.Metric("Group")], pinned_columns=["run:displayName", "run:jobType"]))


def as_json(view: workspaces.Workspace) -> dict[str, Any]:
    """What saving would send, read without a server."""
    return view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def _known(keys: tuple[str, ...] | list[str]) -> list[str]:
    unknown = [key for key in keys if key not in METRICS]
    if unknown:
        raise ValueError(f"not in workflows.runtime.tracking.METRICS: {', '.join(unknown)}")
    return list(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the workspace as JSON; saves nothing")
    parser.add_argument("--entity", default="", help="your W&B user or team")
    parser.add_argument("--project", default=PROJECT)
    arguments = parser.parse_args()
    if not arguments.print and not arguments.entity:
        parser.error("saving needs --entity (your W&B user or team); --print needs nothing")
    view = workspace(arguments.entity, arguments.project)
    if arguments.print:
        print(json.dumps(as_json(view), indent=1))
    else:
        print(view.save().url)


if __name__ == "__main__":
    main()
