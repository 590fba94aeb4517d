"""The application of the endpoint: gateway → embedder → retriever → reranker.

``app`` is the builder that ``serve run`` and ``serve deploy`` call with the ``args`` of the YAML.
``serve_apps.deploy`` puts it on a cluster.
"""

# No `from __future__ import annotations`: Serve looks at the type of the builder's argument.

import os
from pathlib import Path

from pydantic import Field
from ray import serve
from ray.serve import Application

from fusionrec.bundles.store import BundleStore
from fusionrec.config import Config
from serve_apps.gateway import Gateway
from serve_apps.keys import ApiKeys, read_entries
from serve_apps.security import Access
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
    access: Access = Access()


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
    keys = args.access.api_keys or read_entries(os.environ)
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
        access=args.access.model_copy(update={"api_keys": keys}),
    )
    return gateway
