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
from ray.serve.config import RequestRouterConfig

from fusionrec.bundles.store import BundleStore
from fusionrec.config import Config
from serve_apps.gateway import Gateway, GatewayConfig
from serve_apps.keys import ApiKeys, read_entries
from serve_apps.routing import LeastLoadedRouter
from serve_apps.security import Access
from serve_apps.stages import Embedder, EmbeddingRetriever, Reranker, Retriever

CONFIG_FILE = Path(__file__).with_suffix(".yaml")
ROUTING = RequestRouterConfig(request_router_class=LeastLoadedRouter)  # type: ignore[arg-type]


class AppArgs(Config):
    """The arguments of the application."""

    bundles: str = "artifacts/bundles"
    """The folder of bundles. Every node must see it at this path."""
    bundle: str | None = None
    """Id of the bundle to serve for good; by default the one that is current, now and whenever
    another is promoted or rolled back to: it is swapped in while the endpoint answers."""
    model_threads: int = Field(default=1, ge=1)
    """Threads of each model replica."""
    lone_model_threads: int | None = Field(default=None, ge=1)
    """Threads for a batch that is the only one under way, where the replicas share their cores; by
    default ``model_threads``."""
    embed_in_retriever: bool = False
    """Whether the retriever's replicas embed, too, and there is no Embedder. One call less for
    every batch, and less memory, on one machine; where the two should be scaled apart, or the
    embedder has a GPU, they are two deployments."""
    gateway: GatewayConfig = GatewayConfig()
    access: Access = Access()


def app(args: AppArgs) -> Application:
    """Four deployments around the current bundle, or three where the retriever embeds.

    Raises:
        BundleError: there is no bundle to serve, or it is damaged.
        ConfigError: a key is malformed.
    """
    bundles = Path(args.bundles).resolve()
    store = BundleStore(bundles)
    store.verify(args.bundle or store.current().name)
    keys = args.access.api_keys or read_entries(os.environ)
    ApiKeys.parse(keys)
    held = (str(bundles), args.bundle, args.model_threads, args.lone_model_threads)

    def stage(kind: type, name: str) -> Application:
        bound: Application = serve.deployment(name=name, request_router_config=ROUTING)(kind).bind(
            *held
        )
        return bound

    both = args.embed_in_retriever
    gateway: Application = serve.deployment(name="Gateway")(serve.ingress()(Gateway)).bind(
        str(bundles),
        args.bundle,
        None if both else stage(Embedder, "Embedder"),
        stage(EmbeddingRetriever if both else Retriever, "Retriever"),
        stage(Reranker, "Reranker"),
        args.gateway,
        args.access.model_copy(update={"api_keys": keys}),
    )
    return gateway
