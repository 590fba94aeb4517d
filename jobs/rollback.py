"""Put the bundle back in service that was there before the current one."""

from __future__ import annotations

import sys
from pathlib import Path

from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from jobs.entry import run


class RollbackConfig(JobConfig):
    """Go back to the bundle that was in service before; the current one stays on disk."""

    bundles: Path = Path("artifacts/bundles")
    """The folder of bundles."""


def main() -> None:
    """Parse, roll back, report."""
    store = BundleStore(parse(RollbackConfig).bundles)
    left = store.current().name
    sys.stdout.write(f"bundle {store.rollback()} is in service again, in place of {left}\n")


if __name__ == "__main__":
    run(main)
