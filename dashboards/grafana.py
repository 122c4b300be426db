"""The Grafana dashboard as code: `python -m dashboards.grafana > dashboards/grafana.json`.

A row of the dashboard is a group of panels, a panel is one or more PromQL queries. `$model` is the
cartridge (registry name), `$datasource` the Prometheus that scrapes as `prometheus.yml` says.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

COLUMNS, PANELS_A_LINE, HEIGHT = 24, 3, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """`queries` maps a legend to PromQL; `unit` is Grafana's unit id."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""


def _rate(metric: str, by: str = "model", labels: str = 'model=~"$model"') -> str:
    grouping = f" by ({by}) " if by else ""
    selection = f"{{{labels}}}" if labels else ""
    return f"sum{grouping}(rate({metric}{selection}[$__rate_interval]))"


def _quantiles(metric: str) -> dict[str, str]:
    return {f"{{{{model}}}} p{percent}":
            f"histogram_quantile(0.{percent}, sum by (model, le) "
            f'(rate({metric}_bucket{{model=~"$model"}}[$__rate_interval])))' for percent in (50, 95)}


CARTRIDGES = (
    Panel("Requests", "reqps", {"{{model}} {{status}}": _rate("cartridges_requests_total", "model, status")},
          "Finished requests a second, by HTTP status."),
    Panel("Time to first token", "s", _quantiles("cartridges_ttft_seconds")),
    Panel("Time per output token", "s", _quantiles("cartridges_tpot_seconds")),
    Panel("Request duration", "s", _quantiles("cartridges_request_seconds")),
    Panel("In flight and queued", "short", {
        "{{model}} in flight": 'sum by (model) (cartridges_in_flight{model=~"$model"})',
        "{{model}} queued": 'sum by (model) (cartridges_queued{model=~"$model"})',
        "in the engines": "sum(cartridges_engine_active)"}),
    Panel("Refused and left", "reqps", {
        "{{reason}}": _rate("cartridges_rejected_total", "reason", ""),
        "client left": _rate("cartridges_disconnects_total", ""),
        "audit line lost": _rate("cartridges_audit_lost_total", "", "")},
        "Requests refused before the engine, those whose client left before the end, and those missing in the audit "
        "log."),
    Panel("Answered from the text", "reqps", {"{{model}}": _rate("cartridges_fallbacks_total")},
          "Requests with `fallback` whose cartridge was unsure."),
    Panel("Tokens", "short", {
        "generated": _rate("cartridges_generation_tokens_total", ""),
        "prompt": _rate("cartridges_prompt_tokens_total", ""),
        "from cartridges": _rate("cartridges_cached_tokens_total", "")}, "Tokens a second."),
    Panel("Share of prompt tokens from cartridges", "percentunit", {"{{model}}":
          f"{_rate('cartridges_cached_tokens_total')} / {_rate('cartridges_prompt_tokens_total')}"}),
    Panel("Resident hit rate", "percentunit", {"{{model}}":
          f"{_rate('cartridges_cache_hits_total')} / "
          f"({_rate('cartridges_cache_hits_total')} + {_rate('cartridges_cache_misses_total')})"},
          "Share of requests whose cartridge was already loaded."),
    Panel("Loads and evictions", "cps", {
        "load {{result}}": _rate("cartridges_loads_total", "result"),
        "evicted ({{reason}})": _rate("cartridges_evictions_total", "reason")}),
    Panel("Load time", "s", _quantiles("cartridges_load_seconds")),
    Panel("Resident bytes", "bytes", {
        "{{model}}": 'sum by (model) (cartridges_resident_bytes{model=~"$model"})',
        "limit": "sum(cartridges_resident_limit_bytes)"}),
)

_DEPLOYMENT = "application, deployment"

RAY_SERVE = (
    Panel("Requests by deployment", "reqps", {"{{application}}/{{deployment}}":
          _rate("ray_serve_deployment_request_counter_total", _DEPLOYMENT, "")}),
    Panel("Errors by deployment", "reqps", {"{{application}}/{{deployment}}":
          _rate("ray_serve_deployment_error_counter_total", _DEPLOYMENT, "")}),
    Panel("Processing latency, p95", "ms", {"{{application}}/{{deployment}}":
          f"histogram_quantile(0.95, sum by ({_DEPLOYMENT}, le) "
          "(rate(ray_serve_deployment_processing_latency_ms_bucket[$__rate_interval])))"}),
    Panel("Healthy and wanted replicas", "short", {
        "{{application}}/{{deployment}} healthy":
            f"sum by ({_DEPLOYMENT}) (ray_serve_deployment_replica_healthy)",
        "{{application}}/{{deployment}} wanted":
            f"max by ({_DEPLOYMENT}) (ray_serve_autoscaling_target_replicas)"},
        "Wanted is shown for deployments that autoscale."),
    Panel("Ongoing and queued", "short", {
        "{{application}}/{{deployment}} ongoing":
            f"sum by ({_DEPLOYMENT}) (ray_serve_replica_processing_queries)",
        "{{application}}/{{deployment}} queued":
            f"sum by ({_DEPLOYMENT}) (ray_serve_deployment_queued_queries)"}),
    Panel("HTTP errors by status", "reqps", {"{{error_code}}":
          _rate("ray_serve_num_http_error_requests_total", "error_code", "")}),
)

MACHINES = (
    Panel("CPU", "percent", {"{{instance}}": "avg by (instance) (ray_node_cpu_utilization)"}),
    Panel("Memory", "percentunit", {"{{instance}}":
          "sum by (instance) (ray_node_mem_used) / sum by (instance) (ray_node_mem_total)"}),
    Panel("GPU", "percent", {"{{instance}} {{GpuIndex}}":
          "avg by (instance, GpuIndex) (ray_node_gpus_utilization)"}, "Empty on machines without a GPU."),
)

ROWS = {"Cartridges": CARTRIDGES, "Ray Serve": RAY_SERVE, "Machines": MACHINES}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's import dialog and provisioning take it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False,
                       "panels": [], "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y}})
        y += 1
        for i, panel in enumerate(row):
            panels.append(_panel(panel, len(panels) + 1, i % PANELS_A_LINE, y + i // PANELS_A_LINE * HEIGHT))
        y += -(-len(row) // PANELS_A_LINE) * HEIGHT
    return {
        "uid": "cartridges", "title": "Cartridges", "tags": ["cartridges", "ray"], "schemaVersion": 39,
        "editable": True, "refresh": "10s", "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser", "templating": {"list": _variables()}, "panels": panels,
    }


def _panel(panel: Panel, number: int, column: int, y: int) -> dict[str, Any]:
    width = COLUMNS // PANELS_A_LINE
    return {
        "id": number, "type": "timeseries", "title": panel.title, "description": panel.description,
        "datasource": DATASOURCE, "gridPos": {"h": HEIGHT, "w": width, "x": column * width, "y": y},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"},
                    "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [{"refId": chr(ord("A") + i), "datasource": DATASOURCE, "expr": query,
                     "legendFormat": legend} for i, (legend, query) in enumerate(panel.queries.items())],
    }


def _variables() -> list[dict[str, Any]]:
    query = "label_values(cartridges_requests_total, model)"
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {"name": "model", "label": "Cartridge", "type": "query", "datasource": DATASOURCE,
         "definition": query, "query": {"query": query, "refId": "models"}, "refresh": 2, "sort": 1,
         "multi": True, "includeAll": True, "allValue": ".*",
         "current": {"text": ["All"], "value": ["$__all"]}},
    ]


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    print()
