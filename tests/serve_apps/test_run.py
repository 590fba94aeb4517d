"""``make serve`` in a process of its own, with a Ray of its own."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_says_where_it_serves_and_stops_when_told(bundles: BundleStore):
    port = free_port()
    flags = ["--bundles", str(bundles.directory), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_apps.run", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == f"serving on http://127.0.0.1:{port}\n"
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/recommend", json={}, timeout=60)
        assert answer.json()["bundle"] == bundles.current_id()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    with socket.create_server(("127.0.0.1", port)):  # HAProxy has gone, too
        pass


def test_mistakes_are_one_sentence(bundles: BundleStore, tmp_path: Path):
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    for flags, sentence in (
        (["--bundles", str(tmp_path)], "has no current bundle; publish one"),
        (["--host", "0.0.0.0"], "no API key is set"),  # noqa: S104
        (["--bundles", str(bundles.directory), "--port", port], f"port = {port} cannot be used"),
    ):
        command = [sys.executable, "-m", "serve_apps.run", *flags]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert sentence in result.stderr
        assert result.stderr.count("\n") == 1
    taken.close()
