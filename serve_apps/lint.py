"""Says what is wrong with a Serve configuration before it is deployed.

Serve accepts misspelt keys in silence, leaves queues without a bound unless told otherwise, and
waits forever for replicas that fit nowhere. :func:`lint` finds these and the like; the rules lie in
``serve_apps/linting``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from pydantic import Field
from pydantic_settings import CliPositionalArg

from fusionrec.config import JobConfig, parse
from jobs.entry import run
from serve_apps.linting.document import Document, Finding
from serve_apps.linting.fit import Resources, check_fit
from serve_apps.linting.rules import check_rules
from serve_apps.linting.schema import check_schema


class LintConfig(JobConfig):
    """Say what is wrong with a Serve configuration before it is deployed."""

    file: CliPositionalArg[Path]
    """The configuration, in YAML."""
    nodes: int = Field(default=1, ge=1)
    """Nodes of the cluster that is meant, all alike; read where `cpus` is given."""
    cpus: float | None = Field(default=None, ge=0)
    """Logical CPUs of each node; by default it is not asked whether the replicas fit."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of each node."""
    memory_gib: float | None = Field(default=None, ge=0)
    """Memory of each node that Ray may give away, in GiB; by default it is not asked about."""


def lint(
    document: Document,
    environment: Mapping[str, str],
    nodes: Sequence[Resources] | None = None,
) -> list[Finding]:
    """Everything that is wrong with ``document``, in the order of its file.

    Args:
        document: a Serve configuration.
        environment: where the keys of the endpoint may be set.
        nodes: what each node of the cluster holds; None does not ask whether the replicas fit.
    """
    findings, schema = check_schema(document.values)
    findings += document.twice
    if schema is not None:
        findings += check_rules(schema, document.values, environment)
        if nodes is not None:
            findings += check_fit(schema, nodes)
    # A place that is not in the file stands behind the one that lacks it.
    return sorted(findings, key=lambda finding: (document.line(finding.place), len(finding.place)))


def report(document: Document, findings: Sequence[Finding]) -> bool:
    """Print ``findings`` on standard error; whether none of them is an error."""
    for finding in findings:
        sys.stderr.write(document.show(finding) + "\n")
    return all(finding.warning for finding in findings)


def refuse(document: Document, nodes: Sequence[Resources] | None = None) -> None:
    """End the process with status 1 where something is wrong with ``document``, and say what.

    Call it twice: before there is a cluster, and then with the ``nodes`` of it (none of them do not
    ask whether the replicas fit). Warnings come with the second.
    """
    findings = lint(document, os.environ, nodes or None)
    if nodes is None and all(finding.warning for finding in findings):
        return
    if not report(document, findings):
        sys.exit(1)


def cluster_nodes() -> list[dict[str, float]]:
    """What the nodes of the Ray cluster that this process is connected to hold."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return [node["Resources"] for node in nodes if node["Alive"]]


def main() -> None:
    """Read, look, say; exit status 1 where something is wrong."""
    config = parse(LintConfig)
    document = Document.read(config.file)
    nodes: list[dict[str, float]] | None = None
    if config.cpus is not None:
        each = {"CPU": config.cpus, "GPU": config.gpus}
        if config.memory_gib is not None:
            each["memory"] = config.memory_gib * (1 << 30)
        nodes = [each] * config.nodes
    if not report(document, lint(document, os.environ, nodes)):
        sys.exit(1)
    sys.stdout.write(f"{config.file}: nothing is wrong\n")


if __name__ == "__main__":
    run(main)
