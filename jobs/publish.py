"""Publish a pipeline directory as a bundle and, if the gate lets it, put it in service."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fusionrec.bundles.gate import judge
from fusionrec.bundles.store import BundleStore, read_json
from fusionrec.config import JobConfig, parse
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.errors import BundleError
from fusionrec.fusion.rules import RULES, load_rules
from jobs.entry import run


class PublishConfig(JobConfig):
    """Publish a pipeline directory as a bundle; put it in service unless it is worse."""

    pipeline: Path
    """The directory that jobs.fit and the jobs after it wrote."""
    bundles: Path = Path("artifacts/bundles")
    """The folder of bundles; made if missing."""
    force: bool = False
    """Put the bundle in service even if the gate says no."""


def publish(config: PublishConfig) -> str:
    """Add, judge, promote and report; returns the bundle's id.

    Raises:
        BundleError: the pipeline is incomplete or cannot be published, or the gate said no; the
            current bundle stays in service.
        ConfigError: its rules are not about its catalogue; likewise.
    """
    _check(config.pipeline)
    store = BundleStore(config.bundles)
    manifest = store.add(config.pipeline)
    verdict = judge(store, manifest)
    if not verdict.passed and not config.force:
        raise BundleError(
            f"bundle {manifest.id} is not put in service: {verdict.reason}; "
            "publish with --force to put it in service all the same"
        )
    reason = verdict.reason if verdict.passed else f"forced although {verdict.reason}"
    store.promote(manifest.id, reason)
    size = f"{len(manifest.files)} files, {manifest.size:,} bytes"
    sys.stdout.write(f"bundle {manifest.id} is in service ({size}): {reason}\n")
    sys.stdout.write(f"{store.path(manifest.id)}\n")
    return manifest.id


def _check(pipeline: Path) -> None:
    """Refuse a pipeline that the endpoint could not serve.

    Raises:
        BundleError: names the first part that is missing and the job that makes it.
        ConfigError: its rules are not about its catalogue.
    """
    document = read_json(pipeline / "pipeline.json", required=True)
    parts = ["catalogue.parquet", "users.parquet", "item_counts.npy"]
    parts += [f"sources/{name}" for name in document.get("sources", ())]
    for part in (*parts, "fusion.json"):
        if not (pipeline / part).exists():
            job = "tuning.fusion" if part == "fusion.json" else "jobs.fit"
            raise BundleError(
                f"{pipeline} is incomplete, it has no {part}: run `python -m {job}` first"
            )
    if (pipeline / RULES).is_file():
        counts = np.load(pipeline / "item_counts.npy", allow_pickle=False)
        load_rules(pipeline, counts, Releases.load(pipeline / RELEASES))


def main() -> None:
    """Parse and publish."""
    publish(parse(PublishConfig))


if __name__ == "__main__":
    run(main)
