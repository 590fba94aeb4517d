"""Publish a pipeline directory as a bundle and, if the gate lets it, put it in service."""

from __future__ import annotations

import sys
from pathlib import Path

from fusionrec.bundles.gate import judge
from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from fusionrec.errors import BundleError
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
        BundleError: the pipeline cannot be published, or the gate said no; the current bundle
            stays in service.
    """
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


def main() -> None:
    """Parse and publish."""
    publish(parse(PublishConfig))


if __name__ == "__main__":
    run(main)
