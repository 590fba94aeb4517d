"""Serve the current bundle on this machine until interrupted."""

from __future__ import annotations

import logging
import signal
import sys
from dataclasses import replace
from pathlib import Path

from serve_apps.ingress import prepare_ingress, stop_haproxy

if __name__ == "__main__":
    prepare_ingress()  # before anything imports Serve, which reads the variables then

from ray import serve

from fusionrec.config import JobConfig, parse
from jobs import cluster
from jobs.entry import check_port, run
from serve_apps.deploy import bound, check, start
from serve_apps.lint import cluster_nodes, refuse
from serve_apps.linting.document import Document
from serve_apps.recommend import CONFIG_FILE


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
    try:
        _main(parse(ServeConfig))
    finally:
        stop_haproxy()


def _main(config: ServeConfig) -> None:
    # Before Ray starts, which takes seconds.
    check(config.bundles, config.host)
    check_port(config.host, config.port)
    document = Document.read(config.application)
    document = replace(document, values=bound(document.values, config.host, config.port))
    refuse(document)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with cluster.start():
        refuse(document, cluster_nodes())
        try:
            _serve(config)
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


def _serve(config: ServeConfig) -> None:
    """Returns never: SIGINT and SIGTERM raise KeyboardInterrupt."""
    address = start(config.bundles, config.port, host=config.host, config=config.application)
    sys.stdout.write(
        f"serving on {address}\n"
        f"  page {address}/\n"
        f"  POST {address}/v1/recommend\n"
        f"  GET  {address}/v1/bundle, /healthz, /readyz, /docs\n"
        "Ctrl-C stops it\n"
    )
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # in place of Ray's, which crashes
    while True:
        signal.pause()


if __name__ == "__main__":
    run(main)
