"""Serve the current bundle on this machine until interrupted."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import ray
from ray import serve

from fusionrec.config import JobConfig, parse
from fusionrec.errors import ConfigError, FusionRecError
from serve_apps.recommend import CONFIG_FILE, check, start


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
    # Before Ray starts, which takes seconds.
    check(config.bundles, config.host)
    _check_port(config.host, config.port)
    cluster = os.environ.get("RAY_ADDRESS")
    context: Any
    if cluster:
        context = ray.init(address=cluster, log_to_driver=False)
    else:
        context = ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        address = start(config.bundles, config.port, host=config.host, config=config.application)
        sys.stdout.write(
            f"serving on {address}\n"
            f"  POST {address}/v1/recommend\n"
            f"  GET  {address}/v1/bundle, /healthz, /readyz, /docs\n"
            f"  logs in {context.address_info['session_dir']}/logs\n"
            "Ctrl-C stops it\n"
        )
        sys.stdout.flush()
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # in place of Ray's, which crashes
        while True:
            signal.pause()
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _check_port(host: str, port: int) -> None:
    """Raises ConfigError where the port cannot be bound."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"setting port = {port} cannot be used on {host} ({error}): stop what listens there, "
            "or choose another with --port"
        ) from error


if __name__ == "__main__":
    try:
        main()
    except FusionRecError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
