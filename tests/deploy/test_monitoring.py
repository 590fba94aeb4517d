"""What is watched is what is measured: dashboard, alarms, their documents and the metrics agree."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.serve
import yaml
from promql_parser import AggregateExpr, Call, Expr, MatrixSelector, VectorSelector, parse, walk

from serve_apps.metrics import DEFINITIONS, Definition, Kind

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yaml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "fusionrec.json").read_text())
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]


def names(definition: Definition) -> set[str]:
    """What Prometheus calls the series of a metric."""
    if definition.kind is Kind.HISTOGRAM:
        return {f"{definition.exported}_{part}" for part in ("bucket", "sum", "count")}
    return {definition.exported}


BY_RAY = {"application", "deployment", "replica"}
"""Labels of every series that comes from a replica."""
EXPORTED = {name: definition for definition in DEFINITIONS for name in names(definition)}


def parts(expression: str) -> list[Expr]:
    """The nodes of an expression, which is refused where its syntax or a type in it is wrong."""
    found: list[Expr] = []
    root = parse(expression.replace("$__rate_interval", "5m"))  # Grafana fills that in
    walk(root, lambda node: found.append(node))
    return found


def mentioned(expression: str) -> set[str]:
    """The metrics that it asks for."""
    selectors = (node for node in parts(expression) if isinstance(node, VectorSelector))
    ranges = (node for node in parts(expression) if isinstance(node, MatrixSelector))
    return {str(each.name) for each in (*selectors, *(each.vector_selector for each in ranges))}


def labels(name: str) -> set[str]:
    """What the series of that name can be cut by."""
    found = set(BY_RAY)
    if name in EXPORTED:
        found |= {EXPORTED[name].label or "", "le" if name.endswith("_bucket") else ""} - {""}
    return found


def is_exported_by_serve(name: str) -> bool:
    """Whether Ray Serve has a metric of that name; it is not listed anywhere but in its source."""
    folder = Path(ray.serve.__file__).parent / "_private"
    quoted = f'"{name.removeprefix("ray_")}"'
    return any(quoted in path.read_text(encoding="utf-8") for path in folder.glob("*.py"))


def panels() -> Iterator[dict[str, Any]]:
    return (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> dict[str, str]:
    """Where → what is asked of Prometheus."""
    found = {
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    found |= {f"alarm {rule['alert']}": rule["expr"] for rule in RULES}
    found |= {
        f"annotation {each['name']}": each["expr"] for each in DASHBOARD["annotations"]["list"]
    }
    return found


@pytest.mark.parametrize("where", expressions())
def test_every_metric_that_is_asked_for_exists(where: str):
    asked = mentioned(expressions()[where])
    assert asked
    for name in asked - set(EXPORTED):
        assert is_exported_by_serve(name), name


@pytest.mark.parametrize("where", expressions())
def test_what_is_asked_for_makes_sense(where: str):
    """Rates are of what only grows, and series are chosen and cut by labels that they have."""
    nodes = parts(expressions()[where])
    for node in nodes:
        if isinstance(node, VectorSelector):
            assert {each.name for each in node.matchers.matchers} <= labels(str(node.name))
        elif isinstance(node, Call) and node.func.name in ("rate", "increase"):
            [of] = mentioned(node.prettify())
            assert EXPORTED[of].kind is not Kind.GAUGE
        elif isinstance(node, AggregateExpr) and node.modifier is not None:
            for name in mentioned(node.expr.prettify()):
                assert set(node.modifier.labels) <= labels(name)


@pytest.mark.parametrize(
    "expression",
    [
        "rate(ray_fusionrec_queue_depth)",
        "sum by (stage (ray_fusionrec_queue_depth)",
        "histogram_quantile(ray_fusionrec_queue_depth)",
        "maxx(ray_fusionrec_queue_depth)",
    ],
)
def test_a_wrong_expression_is_refused(expression: str):
    with pytest.raises(ValueError, match=r"expected type|unknown function|expected 2|unclosed"):
        parts(expression)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alarm_s_summary_names_labels_that_are_left(rule: dict[str, Any]):
    named = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    aggregated = [each for each in parts(rule["expr"]) if isinstance(each, AggregateExpr)]
    if aggregated:  # the first is the outermost on the left, whose labels the result has
        assert aggregated[0].modifier is not None
        assert named <= set(aggregated[0].modifier.labels)
    else:
        assert all(named <= labels(name) for name in mentioned(rule["expr"]))


def test_every_metric_that_the_documents_mention_exists():
    for document in sorted((ROOT / "docs").glob("*.md")):
        words = set(re.findall(r"\bray_(?:fusionrec|serve)_\w+", document.read_text("utf-8")))
        for name in words - set(EXPORTED) - {each.exported for each in DEFINITIONS}:
            assert is_exported_by_serve(name), f"{document.name}: {name}"


def test_every_metric_is_on_the_dashboard_cut_by_its_label():
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    for definition in DEFINITIONS:
        mine = [text for text in shown if names(definition) & mentioned(text)]
        assert mine, definition.name
        if definition.label is not None:
            assert any(f"by ({definition.label}" in text for text in mine), definition.name


def test_panels_say_what_they_show_and_do_not_overlap():
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dashboard_names_no_data_source_of_its_own():
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"fusionrec", "${datasource}"}


def test_every_alarm_has_a_severity_and_a_section_that_says_what_to_do():
    section = re.compile(r"^### (FusionRec\w+)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)
    sections = dict(section.findall(OPERATIONS))
    assert sorted(sections) == sorted(rule["alert"] for rule in RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket", "info")
        assert rule["annotations"]["summary"]
        assert "**Do:**" in sections[rule["alert"]], rule["alert"]


def test_every_metric_is_explained():
    rows = dict(re.findall(r"^\| `(ray_fusionrec_\w+)` \| ([^|]+) \|", OPERATIONS, re.MULTILINE))
    explained = {definition.exported: definition.meaning for definition in DEFINITIONS}
    assert {name: meaning.strip() for name, meaning in rows.items()} == explained


def test_every_alarm_is_raised_by_trouble_and_by_nothing_else():
    beside = Path(sys.executable).parent / "promtool"
    promtool = str(beside) if beside.exists() else shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not here: `make promtool` brings it")
    command = [promtool, "test", "rules", str(ALERTS.with_suffix(".test.yaml"))]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_test_of_the_alarms_has_every_alarm_quiet_and_raised():
    tests = yaml.safe_load(ALERTS.with_suffix(".test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for raised in (False, True):
        tried = {case["alertname"] for case in cases if bool(case["exp_alerts"]) is raised}
        assert tried == {rule["alert"] for rule in RULES}
