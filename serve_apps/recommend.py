"""The application of the endpoint: gateway → embedder → retriever → reranker.

``app`` is the builder that ``serve run`` and ``serve deploy`` call with the ``args`` of the YAML.
:func:`start` deploys the same YAML on this machine and waits until it answers.
"""

# No `from __future__ import annotations`: Serve looks at the type of the builder's argument.

import os
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    ServeDeploySchema,
)

from fusionrec.bundles.store import BundleStore
from fusionrec.config import Config
from fusionrec.errors import ServingError
from serve_apps.gateway import Gateway
from serve_apps.keys import ApiKeys, guard, read_entries
from serve_apps.stages import Embedder, Reranker, Retriever

CONFIG_FILE = Path(__file__).with_suffix(".yaml")


class AppArgs(Config):
    """The arguments of the application."""

    bundles: str = "artifacts/bundles"
    """The folder of bundles. Every node must see it at this path."""
    bundle: str | None = None
    """Id of the bundle to serve; by default the current one, looked up once, at deployment: all
    replicas, also those that come later, serve the same."""
    max_batch: int = Field(default=32, ge=1)
    """Largest number of requests that travel as one unit."""
    max_running_batches: int = Field(default=4, ge=1)
    """Batches under way from one gateway; further requests gather meanwhile."""
    max_waiting: int = Field(default=512, ge=1)
    """Requests that may wait in one gateway; more are answered 503."""
    stage_timeout_s: float = Field(default=10.0, gt=0)
    """A stage that takes longer has failed."""
    model_threads: int = Field(default=1, ge=1)
    """Threads of each model replica."""
    api_keys: tuple[str, ...] = ()
    """SHA-256 hashes of the keys that are admitted; by default those of FUSIONREC_API_KEYS."""


def app(args: AppArgs) -> Application:
    """Four deployments around the current bundle.

    Raises:
        BundleError: there is no bundle to serve, or it is damaged.
        ConfigError: a key is malformed.
    """
    bundles = Path(args.bundles).resolve()
    store = BundleStore(bundles)
    bundle = args.bundle or store.current().name
    store.verify(bundle)
    keys = args.api_keys or read_entries(os.environ)
    ApiKeys.parse(keys)
    held = (str(bundles), bundle, args.model_threads)
    gateway: Application = serve.deployment(name="Gateway")(serve.ingress()(Gateway)).bind(
        str(bundles),
        bundle,
        serve.deployment(name="Embedder")(Embedder).bind(*held),
        serve.deployment(name="Retriever")(Retriever).bind(*held),
        serve.deployment(name="Reranker")(Reranker).bind(*held),
        max_batch=args.max_batch,
        max_running_batches=args.max_running_batches,
        max_waiting=args.max_waiting,
        stage_timeout_s=args.stage_timeout_s,
        api_keys=keys,
    )
    return gateway


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
        "api_keys": list(entries),
    }
    AppArgs.model_validate(application["args"])
    return _deploy(ServeDeploySchema.model_validate(document), timeout_s)


def _deploy(schema: ServeDeploySchema, timeout_s: float) -> str:
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
