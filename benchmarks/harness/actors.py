"""The processes of a running Serve, by what they do: for whoever wants to end one of them.

Read from Ray's table of actors, which the head node keeps: it answers while the controller of Serve
is gone, and without a dashboard. On one machine only: a process is known by its id.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray
from ray import serve
from ray._private.state import actors

CONTROLLER = "SERVE_CONTROLLER_ACTOR"
PROXY = "SERVE_PROXY_ACTOR"
REPLICA = "SERVE_REPLICA::"


@dataclass(frozen=True, slots=True)
class Processes:
    """Process ids of what is alive."""

    controller: tuple[int, ...]
    proxies: tuple[int, ...]
    """What accepts connections: HAProxy where it runs, else Serve's own proxy."""
    proxy_actors: tuple[int, ...]
    """Serve's proxy, or the manager of HAProxy."""
    replicas: dict[str, tuple[int, ...]]
    """By deployment."""

    def all(self) -> set[int]:
        """Every one of them."""
        return {
            *self.controller,
            *self.proxies,
            *self.proxy_actors,
            *(pid for pids in self.replicas.values() for pid in pids),
        }


def find(application: str = "recommend") -> Processes:
    """What is alive at this moment of ``application`` and of what Serve needs for it."""
    controller, proxy_actors, proxies = [], [], []
    replicas: dict[str, list[int]] = {}
    table = actors(actor_state_name="ALIVE")
    for actor in table.values():
        name, pid = actor["Name"], int(actor["Pid"])
        if not is_alive(pid):
            continue  # Ray does not know yet
        if name.startswith(f"{REPLICA}{application}#"):
            replicas.setdefault(name.split("#")[1], []).append(pid)
        elif PROXY in name:
            proxy_actors.append(pid)
            if "HAProxy" in actor["ActorClassName"]:
                proxies += _haproxies(pid)
            else:
                proxies.append(pid)
        elif name == CONTROLLER:
            controller.append(pid)
    return Processes(
        controller=tuple(controller),
        proxies=tuple(proxies),
        proxy_actors=tuple(proxy_actors),
        replicas={name: tuple(sorted(pids)) for name, pids in replicas.items()},
    )


def _haproxies(manager: int) -> list[int]:
    """What the process has started; parent or child may end while one looks."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(manager).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.name() == "haproxy" and is_alive(child.pid):
                    found.append(child.pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that was killed and not waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def at_full_strength(application: str = "recommend") -> bool:
    """Whether every replica that should run runs, and controller and proxy are there."""
    found = find(application)
    if not (found.controller and found.proxies):
        return False
    try:
        status = serve.status().applications[application]
    except (KeyError, ray.exceptions.RayError):
        return False
    return all(
        deployment.replica_states == {"RUNNING": len(found.replicas.get(name, ()))}
        and deployment.status == "HEALTHY"
        for name, deployment in status.deployments.items()
    )
