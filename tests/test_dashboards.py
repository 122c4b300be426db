"""Every metric and key that a dashboard draws is emitted by our tables or by the installed Ray."""

import json
import re
import subprocess
import sys
from pathlib import Path

import promql_parser
import pytest
import ray
import yaml

from dashboards import grafana, wandb_workspace
from workflows.runtime.tracking import METRICS
from workflows.serving.metrics import TABLE

ROOT = Path(__file__).resolve().parents[1]
DASHBOARDS = ROOT / "dashboards"
NAME = re.compile(r"\b(?:cartridges|ray)_[a-z0-9_]+\b")
HISTOGRAM = ("_bucket", "_sum", "_count")


def grafana_queries() -> list[str]:
    panels = json.loads((DASHBOARDS / "grafana.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def alert_queries() -> list[str]:
    groups = yaml.safe_load((DASHBOARDS / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


QUERIES = grafana_queries() + alert_queries()


@pytest.fixture(scope="module")
def ray_sources() -> str:
    """The files of Ray that define metrics, in one string."""
    root = Path(ray.__file__).parent
    files = [*root.glob("serve/_private/**/*.py"), root / "dashboard/modules/reporter/reporter_agent.py"]
    return "\n".join(file.read_text() for file in files)


def selectors(query: str) -> list[tuple[str, set[str]]]:
    """`(metric, labels it is filtered by)` of every selector in `query`."""
    found = re.findall(r"\b((?:cartridges|ray)_[a-z0-9_]+)(?:\{([^}]*)\})?", query)
    return [(name, set(re.findall(r"(\w+)\s*(?:=|!)", labels))) for name, labels in found]


def our_metric(name: str) -> str:
    """The name in `TABLE` of what Prometheus stores as `name`."""
    stem = next((name.removesuffix(end) for end in HISTOGRAM if name.endswith(end)), name)
    return stem if stem in TABLE and TABLE[stem].type == "histogram" else name


def test_grafana_json_is_what_its_source_prints():
    assert json.loads((DASHBOARDS / "grafana.json").read_text()) == grafana.dashboard()


def test_panels_have_their_own_ids_and_do_not_overlap():
    panels = grafana.dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(x, y) for panel in panels for pos in [panel["gridPos"]]
             for x in range(pos["x"], pos["x"] + pos["w"]) for y in range(pos["y"], pos["y"] + pos["h"])]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


@pytest.mark.parametrize("query", QUERIES)
def test_query_parses_and_names_emitted_metrics(query, ray_sources):
    promql_parser.parse(query.replace("$__rate_interval", "5m"))
    for name, labels in selectors(query):
        if name.startswith("cartridges_"):
            assert our_metric(name) in TABLE, name
            assert labels <= set(TABLE[our_metric(name)].labels), name
        else:
            assert ray_defines(name, ray_sources), name


def ray_defines(name: str, sources: str) -> bool:
    stem = re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("ray_"))
    # The proxies' names have the protocol in the middle: f"serve_num_{protocol.lower()}_requests".
    generic = stem.replace("_http_", "_{self._protocol_name}_")
    return f'"{stem}"' in sources or any(
        re.search(pattern, sources) for pattern in [re.escape(generic),
                                                    stem.replace("_http_", r"_\{[^}]*\}_")])


def test_grouping_labels_exist_on_our_metrics():
    for query in QUERIES:
        names = [name for name, _ in selectors(query) if name.startswith("cartridges_")]
        for group in re.findall(r"by \(([^)]*)\)", query):
            for name in names:
                labels = {*TABLE[our_metric(name)].labels, "le"}
                assert {label.strip() for label in group.split(",")} <= labels, query


def test_most_of_our_metrics_are_shown():
    shown = {our_metric(name) for query in grafana_queries() for name, _ in selectors(query)}
    assert shown >= set(TABLE), sorted(set(TABLE) - shown)


def test_prometheus_scrapes_the_service_and_ray():
    config = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert jobs["cartridges"]["metrics_path"] == "/metrics"
    (file,) = jobs["ray"]["file_sd_configs"][0]["files"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert Path(file).name == PROMETHEUS_SERVICE_DISCOVERY_FILE
    assert all((DASHBOARDS / name).is_file() for name in config["rule_files"])


def test_workspace_draws_known_keys_and_serialises_without_a_server():
    keys = [key for panels in [*wandb_workspace.LINES.values(), wandb_workspace.bars()]
            for panel in panels.values() for key in panel]
    assert set(keys) <= METRICS.keys()
    with pytest.raises(ValueError, match="train/speed"):
        wandb_workspace._known(["train/speed"])
    done = subprocess.run([sys.executable, "-m", "dashboards.wandb_workspace", "--print"], cwd=ROOT,
                          check=True, capture_output=True, text=True)
    written = json.loads(done.stdout)
    sections = written["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:3] == ["Self-study", "Training", "Report card"]
    assert all(key in done.stdout for key in keys)
