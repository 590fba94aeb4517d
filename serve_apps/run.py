"""Serve the current bundle on this machine until interrupted."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import ray

from fusionrec.config import JobConfig, parse
from fusionrec.errors import FusionRecError
from serve_apps.recommend import CONFIG_FILE, start


class ServeConfig(JobConfig):
    """Serve the current bundle on this machine until interrupted."""

    bundles: Path = Path("artifacts/bundles")
    """The folder of bundles that jobs.publish fills."""
    host: str = "127.0.0.1"
    """Address to bind; other than loopback, it needs FUSIONREC_API_KEYS."""
    port: int = 8000
    """Port of the endpoint."""
    application: Path = CONFIG_FILE
    """Serve configuration to deploy."""


def main() -> None:
    """Parse, start, say where, wait."""
    config = parse(ServeConfig)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    address = start(config.bundles, config.port, host=config.host, config=config.application)
    sys.stdout.write(
        f"serving on {address}\n"
        f"  POST {address}/v1/recommend\n"
        f"  docs {address}/docs\n"
        f"  logs {ray.nodes()[0]['NodeManagerHostname']}\n"
    )
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.pause()


if __name__ == "__main__":
    try:
        main()
    except FusionRecError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
