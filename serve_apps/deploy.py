"""Puts the application on a Ray cluster, and back to the last good configuration where that fails.

:func:`start` deploys on the Ray of this process, with changes to the file. The command lints a
file, deploys it to a cluster that runs, and waits. Serve itself never returns to the configuration
before; the command does, with what was in service when it began.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from pydantic import Field
from pydantic_settings import CliPositionalArg
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    ServeDeploySchema,
)

from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse, read_yaml
from fusionrec.errors import ConfigError, ServingError
from jobs.entry import run
from serve_apps.keys import ApiKeys, guard, read_entries
from serve_apps.lint import cluster_nodes, refuse
from serve_apps.linting.document import Document
from serve_apps.linting.schema import arguments
from serve_apps.recommend import CONFIG_FILE, AppArgs

LAST_GOOD = "last-good.yaml"
"""Name of the kept configuration, in the folder of bundles: what is in service is kept together."""


class DeployConfig(JobConfig):
    """Deploy a Serve configuration to a running cluster; where that fails, the last good one."""

    file: CliPositionalArg[Path]
    """The configuration, in YAML."""
    address: str | None = None
    """Address of the cluster, such as HOST:6379; by default RAY_ADDRESS, else the cluster that this
    machine is a node of."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds until a deployment that does not run has failed."""
    fit: bool = True
    """Refuse replicas that do not fit the nodes there are; turn it off where nodes are added when
    replicas ask for them."""


def main() -> None:
    """Lint, deploy, wait; exit status 1 where the configuration is not in service at the end."""
    config = parse(DeployConfig)
    document = Document.read(config.file)
    refuse(document)
    values = _with_keys(document.values)
    with _connect(config.address):
        refuse(document, cluster_nodes() if config.fit else [])
        try:
            address = roll_out(values, _last_good(values), config.timeout_s)
        except ServingError as error:
            sys.stderr.write(f"error: {error}\n")
            sys.exit(1)
    sys.stdout.write(f"{config.file} is in service on {address}\n")


def roll_out(values: dict[str, Any], last_good: Path, timeout_s: float) -> str:
    """Deploy ``values`` and wait; where they fail, deploy what was in service before.

    Args:
        values: a Serve configuration.
        last_good: file that keeps what was in service, for this and for later deployments.
        timeout_s: how long to wait for each of the two.

    Returns:
        The address of the endpoint.

    Raises:
        ServingError: it does not come up; says what is in service now.
    """
    before = in_service()
    if before is not None:
        _keep(before, last_good)
    try:
        address = deploy(ServeDeploySchema.model_validate(values), timeout_s)
    except ServingError as error:
        if not last_good.is_file():
            message = f"{error}; nothing ran before, so there is nothing to go back to"
            raise ServingError(message) from error
        good = ServeDeploySchema.model_validate(read_yaml(last_good))
        try:
            deploy(good, timeout_s)
        except ServingError as again:
            raise ServingError(
                f"{error}; the last good configuration, {last_good}, fails too: {again}"
            ) from error
        raise ServingError(
            f"{error}; the last good configuration, {last_good}, is in service again"
        ) from error
    _keep(values, last_good)
    return address


def in_service() -> dict[str, Any] | None:
    """The configuration of the applications that run on the cluster, as Serve knows it.

    None where there is none, or one of them does not run.
    """
    client = _client()
    if client is None:
        return None
    details = client.get_serve_details()
    applications = [
        application
        for application in details["applications"].values()
        if application.get("deployed_app_config")  # others came with serve.run, and stay
    ]
    if not applications or any(each["status"] != "RUNNING" for each in applications):
        return None
    return {
        "proxy_location": details["proxy_location"],
        "http_options": details["http_options"],
        "applications": [each["deployed_app_config"] for each in applications],
    }


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
        arguments: further fields of :class:`AppArgs`; ``api_keys`` belongs to its ``access``.

    Returns:
        The address, such as ``http://127.0.0.1:8000``.

    Raises:
        ConfigError: ``host`` is not a loopback address and there are no keys.
        BundleError: there is no bundle to serve, or it is damaged.
        ServingError: it does not come up; with the reason that Serve gives.
    """
    values = read_yaml(config)
    entries = tuple(arguments.pop("api_keys", None) or read_entries(os.environ))
    check(bundles, host, entries)
    (application,) = values["applications"]
    given = application.get("args", {})
    access = {**given.get("access", {}), **arguments.pop("access", {}), "api_keys": list(entries)}
    application["args"] = {
        **given,
        **arguments,
        "bundles": str(bundles.resolve()),
        "access": access,
    }
    AppArgs.model_validate(application["args"])
    return deploy(ServeDeploySchema.model_validate(bound(values, host, port)), timeout_s)


def bound(values: Mapping[str, Any], host: str, port: int) -> dict[str, Any]:
    """The configuration ``values`` at another address."""
    http = values.get("http_options") or {}
    return {**values, "http_options": {**http, "host": host, "port": port}}


def deploy(schema: ServeDeploySchema, timeout_s: float) -> str:
    """What ``serve run FILE`` does; its functions are not public, and Ray is pinned.

    Returns:
        The address of the endpoint.

    Raises:
        ServingError: it does not come up; with the reason that Serve gives.
    """
    from ray.serve._private.api import serve_start

    deadline = time.monotonic() + timeout_s
    try:
        client = serve_start(
            http_options=schema.http_options.model_dump(),
            proxy_location=schema.proxy_location,
            global_logging_config=schema.logging_config,
        )
        client.deploy_apps(schema)
        for application in schema.applications:
            _wait(application.name, deadline)
        client.wait_for_proxies_serving(wait_for_applications_running=True)
    except (TimeoutError, RayError) as error:
        # What a task raised, without the traceback that Ray's error around it prints.
        reason = " ".join(str(getattr(error, "cause", None) or error).split())
        raise ServingError(f"the endpoint did not come up: {reason}") from error
    http = client.http_config
    return f"{'https' if http.ssl_certfile else 'http'}://{http.host}:{http.port}"


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


def _client() -> Any:
    """Of the Serve that runs on the cluster; None where there is none."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _with_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the keys of this environment, where it names none itself.

    The cluster's nodes then need no variable, and every gateway admits the same keys.
    """
    entries = list(read_entries(os.environ))
    applications = []
    for application in values["applications"]:
        args = application.get("args", {})
        access = args.get("access", {})
        ours = isinstance(arguments(application), AppArgs)
        if entries and ours and not access.get("api_keys"):
            args = {**args, "access": {**access, "api_keys": entries}}
        applications.append({**application, "args": args})
    return {**values, "applications": applications}


def _last_good(values: Mapping[str, Any]) -> Path:
    (bundles, *_) = [
        args.get("bundles", AppArgs.model_fields["bundles"].default)
        for application in values["applications"]
        for args in [application.get("args", {})]
    ]
    return Path(bundles) / LAST_GOOD


def _keep(values: Mapping[str, Any], file: Path) -> None:
    """Write ``values`` beside, then rename; for the owner only, since they hold hashes of keys."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".tmp")
    beside.touch(mode=0o600)
    plain = json.loads(json.dumps(values, default=str))
    beside.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    beside.replace(file)


@contextmanager
def _connect(address: str | None) -> Iterator[None]:
    """Be connected to the cluster at ``address`` for the block.

    Raises:
        ConfigError: there is no cluster, or it is one that only jobs can be submitted to.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("http"):
        raise ConfigError(
            f"address = {address} takes jobs only: run `ray job submit --address {address} "
            "--working-dir . -- python -m serve_apps.deploy FILE`"
        )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at address = {address}: start one with `ray start --head`, or "
            "use `make serve`, which starts its own"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


if __name__ == "__main__":
    run(main)
