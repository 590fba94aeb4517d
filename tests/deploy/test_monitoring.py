"""What is watched is what is measured: dashboard, alarms, their documents and the metrics agree."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.serve
import yaml

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


def mentioned(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


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
    ours = set().union(*map(names, DEFINITIONS))
    asked = mentioned(expressions()[where])
    assert asked
    for name in asked - ours:
        assert is_exported_by_serve(name), name


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
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, of Debian's package prometheus")
    command = [promtool, "test", "rules", str(ALERTS.with_suffix(".test.yaml"))]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_test_of_the_alarms_has_every_alarm_quiet_and_raised():
    tests = yaml.safe_load(ALERTS.with_suffix(".test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for raised in (False, True):
        tried = {case["alertname"] for case in cases if bool(case["exp_alerts"]) is raised}
        assert tried == {rule["alert"] for rule in RULES}
