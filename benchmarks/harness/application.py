"""The endpoint's Serve configuration with fixed numbers of replicas, for measuring."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import yaml

from serve_apps.recommend import CONFIG_FILE

STAGES = ("Embedder", "Retriever", "Reranker")
SPARE = 0.9
"""Share of the CPUs that the replicas claim, so that one more of each can start beside them."""


def write_application(
    path: Path,
    replicas: dict[str, int],
    gateway: dict[str, Any] | None = None,
    request_timeout_s: float | None = None,
    **arguments: Any,
) -> Path:
    """Write recommend.yaml to ``path`` with ``replicas`` of each deployment and no autoscaling.

    CPUs are claims for Ray's bookkeeping, not limits: they shrink until all replicas fit.

    Args:
        path: of the file.
        replicas: deployment → replicas; the others have one.
        gateway: settings of the gateway, beside those of the file.
        request_timeout_s: after which Serve itself gives a request up; by default as in the file.
        arguments: of the application, likewise.
    """
    document = yaml.safe_load(CONFIG_FILE.read_text(encoding="utf-8"))
    [application] = document["applications"]
    given = application["args"]
    application["args"] = {**given, **arguments, "gateway": {**given["gateway"], **(gateway or {})}}
    if request_timeout_s is not None:
        document["http_options"]["request_timeout_s"] = request_timeout_s
    if not application["args"]["embed_in_retriever"]:
        embed_apart(application)
    claimed = 0.0
    for deployment in application["deployments"]:
        deployment.pop("autoscaling_config", None)
        deployment["num_replicas"] = replicas.get(deployment["name"], 1)
        claimed += deployment["num_replicas"] * deployment["ray_actor_options"]["num_cpus"]
    shrink = min(1.0, (os.cpu_count() or 1) * SPARE / claimed)
    for deployment in application["deployments"]:
        options = deployment["ray_actor_options"]
        options["num_cpus"] = round(options["num_cpus"] * shrink, 3)
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def embed_apart(application: dict[str, Any]) -> None:
    """Give the application of recommend.yaml an embedder of its own, in place.

    It gets half of the retriever's CPUs, and the same settings otherwise. While one batch is in one
    of the two stages, another may be in the other.
    """
    application["args"]["embed_in_retriever"] = False
    application["args"]["gateway"]["batches_ahead"] = 1
    deployments = application["deployments"]
    [at] = (i for i, each in enumerate(deployments) if each["name"] == STAGES[1])
    deployments[at]["ray_actor_options"]["num_cpus"] /= 2
    deployments.insert(at, {**copy.deepcopy(deployments[at]), "name": STAGES[0]})
