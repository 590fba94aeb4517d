"""Puts the application on a Ray cluster and waits until it answers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import yaml
from ray import serve
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    ServeDeploySchema,
)

from fusionrec.bundles.store import BundleStore
from fusionrec.errors import ServingError
from serve_apps.keys import ApiKeys, guard, read_entries
from serve_apps.recommend import CONFIG_FILE, AppArgs


def check(bundles: Path, host: str, api_keys: tuple[str, ...] | None = None) -> None:
    """Say what would keep the endpoint from starting, before anything is started.

    Raises:
        ConfigError: ``host`` is not a loopback address and there are no keys.
        BundleError: there is no bundle to serve.
    """
    guard(host, ApiKeys.parse(read_entries(os.environ) if api_keys is None else api_keys))
    BundleStore(bundles).current()


def start(
    bundles: Path,
    port: int = 8000,
    *,
    host: str = "127.0.0.1",
    config: Path = CONFIG_FILE,
    timeout_s: float = 300.0,
    **arguments: Any,
) -> str:
    """Deploy ``config`` on the running Ray cluster and wait until it answers.

    Args:
        bundles: the folder of bundles.
        port: of the HTTP proxy; a proxy that runs already keeps its own.
        host: address that the proxy binds.
        config: a Serve configuration with one application.
        timeout_s: how long to wait.
        arguments: further fields of :class:`AppArgs`.

    Returns:
        The address, such as ``http://127.0.0.1:8000``.

    Raises:
        ConfigError: ``host`` is not a loopback address and there are no keys.
        BundleError: there is no bundle to serve, or it is damaged.
        ServingError: it does not come up; with the reason that Serve gives.
    """
    entries = tuple(arguments.pop("api_keys", None) or read_entries(os.environ))
    check(bundles, host, entries)
    document = yaml.safe_load(config.read_text(encoding="utf-8"))
    (application,) = document["applications"]
    document["http_options"] = {**document.get("http_options", {}), "host": host, "port": port}
    application["args"] = {
        **application.get("args", {}),
        **arguments,
        "bundles": str(bundles.resolve()),
        "access": {**application.get("args", {}).get("access", {}), "api_keys": list(entries)},
    }
    AppArgs.model_validate(application["args"])
    return deploy(ServeDeploySchema.model_validate(document), timeout_s)


def deploy(schema: ServeDeploySchema, timeout_s: float) -> str:
    """What ``serve run FILE`` does; its functions are not public, and Ray is pinned."""
    from ray.serve._private.api import serve_start

    client = serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location,
        global_logging_config=schema.logging_config,
    )
    client.deploy_apps(schema)
    _wait(schema.applications[0].name, time.monotonic() + timeout_s)
    client.wait_for_proxies_serving(wait_for_applications_running=True)
    return f"http://{client.http_config.host}:{client.http_config.port}"


def _wait(name: str, deadline: float) -> None:
    """Until the application ``name`` runs.

    Raises:
        ServingError: it failed, or ``deadline`` has passed; with the reason that Serve gives.
    """
    reason = "no answer from Serve"
    while time.monotonic() < deadline:
        status = serve.status().applications.get(name)
        if status is not None:
            if status.status == ApplicationStatus.RUNNING:
                return
            reason = _reason(status)
            if status.status.value in _FAILED:
                raise ServingError(f"the endpoint did not come up: {reason}")
        time.sleep(0.1)
    raise ServingError(f"the endpoint did not come up in time: {reason}")


def _reason(status: ApplicationStatusOverview) -> str:
    """What went wrong, from the deployments that failed, or else from the application.

    The last line of a traceback is the error itself; Serve logs the rest.
    """
    failed = [d for d in status.deployments.values() if d.status.value in _FAILED and d.message]
    texts = [d.message for d in failed] or [status.message or status.status.value]
    return "; ".join(text.strip().splitlines()[-1] for text in texts)


_FAILED = {ApplicationStatus.DEPLOY_FAILED.value, ApplicationStatus.UNHEALTHY.value}
