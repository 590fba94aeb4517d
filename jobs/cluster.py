"""Ray for an entry point: the cluster that the job was submitted to, or one on this machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray._private import ray_constants

if TYPE_CHECKING:
    from fusionrec.training.devices import Device


@contextmanager
def start(num_cpus: int | None = None) -> Iterator[None]:
    """Have Ray up for the block.

    Where Ray is up in this process already it is used, and left up. Under ``ray job submit``, or
    with ``RAY_ADDRESS`` set, the block connects to that cluster. Otherwise a Ray of its own starts
    on loopback, without a dashboard, and stops with the block; a cluster that somebody else runs on
    this machine is never joined by chance.

    What workers print stays in Ray's log folder, whose path goes to standard error.

    Args:
        num_cpus: logical CPUs of a Ray of its own, by default the machine's; no meaning elsewhere.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Says on every start that token authentication is on, as it is by default.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    context: Any
    if os.environ.get("RAY_ADDRESS"):
        context = ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        _bind_to_loopback()
        context = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        token = Path.home() / ".ray" / "auth_token"
        if token.is_file():
            token.chmod(0o600)  # Ray creates it readable by everybody
    sys.stderr.write(f"Ray logs to {Path(context.address_info['session_dir']) / 'logs'}\n")
    try:
        yield
    finally:
        ray.shutdown()


def is_given() -> bool:
    """Whether :func:`start` joins a cluster, and does not start one on this machine."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def worker_device(num_workers: int, *, use_gpu: bool | None) -> Device:
    """Of the worker that has the least of ``num_workers``; on this machine if no cluster is given.

    Raises:
        TrainingError: a GPU is asked for and this machine has none.
    """
    from fusionrec.training import devices  # which imports torch: not for every job

    if not is_given():
        return devices.of_this_machine(num_workers, use_gpu=use_gpu)
    with start():
        nodes: Any = ray.nodes()  # type: ignore[no-untyped-call]
    return devices.of_nodes(nodes, num_workers=num_workers, use_gpu=use_gpu)


def _bind_to_loopback() -> None:
    """Keep a Ray of one machine off the network.

    Ray 2.60 binds its processes to all interfaces on Linux, and metrics are served without the
    token. The switch that keeps it on loopback on macOS and Windows works on Linux too; Ray reads
    it on import, which has happened, and its child processes read it from the environment.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False


def quiet_data() -> None:
    """Ray Data without bars and reports on the console; its file in Ray's logs keeps everything."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)  # a warning says that the bars are off
