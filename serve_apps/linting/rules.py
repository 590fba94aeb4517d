"""Settings that Serve accepts and that nobody means: limits that contradict each other, open doors.

The rules know this endpoint: the unit of the gateway is a request, that of a stage a batch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ray.serve._private.constants import DEFAULT_MAX_ONGOING_REQUESTS
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeDeploySchema

from fusionrec.errors import ConfigError
from serve_apps.gateway import GatewayConfig
from serve_apps.keys import VARIABLE, ApiKeys, is_loopback, read_entries
from serve_apps.linting.document import Finding, Place
from serve_apps.linting.schema import arguments, validate
from serve_apps.recommend import AppArgs

GATEWAY = "Gateway"
EMBEDDER = "Embedder"
STAGES = (EMBEDDER, "Retriever", "Reranker")
Deployments = Mapping[str, tuple[Place, DeploymentSchema]]


def check_rules(
    schema: ServeDeploySchema,
    values: Mapping[str, Any],
    environment: Mapping[str, str],
) -> Iterator[Finding]:
    """What is wrong with a configuration whose keys and values Serve accepts."""
    keyed = bool(read_entries(environment))
    for number, application in enumerate(schema.applications):
        place: Place = ("applications", number)
        deployments = {
            deployment.name: ((*place, "deployments", position), deployment)
            for position, deployment in enumerate(application.deployments)
        }
        args = arguments(values["applications"][number])
        for where, deployment in deployments.values():
            yield from _queue(where, deployment)
            yield from _autoscaling(where, deployment)
        if isinstance(args, AppArgs):
            yield from _names(place, deployments, args)
            yield from _batches(deployments, args.gateway)
            yield from _times(schema.http_options, args.gateway)
            yield from _api_keys((*place, "args", "access", "api_keys"), args)
            keyed = keyed or bool(args.access.api_keys)
    yield from _bind(schema.http_options, keyed)
    yield from _tls(schema.http_options, environment)


def setting(deployment: DeploymentSchema, name: str) -> Any:
    """The value of an option; None where the configuration does not give it."""
    return getattr(deployment, name) if name in deployment.model_fields_set else None


def autoscaling(deployment: DeploymentSchema) -> AutoscalingConfig | None:
    """The bounds of a deployment that scales itself; None for one that does not."""
    found = setting(deployment, "autoscaling_config")
    if isinstance(found, dict):
        # A policy may lie in code that only the cluster has, and the bounds do not depend on it.
        bounds = {key: value for key, value in found.items() if key != "policy"}
        _, found = validate(AutoscalingConfig, bounds, ())  # what is wrong was said with its place
    if found is None and setting(deployment, "num_replicas") == "auto":
        found = AutoscalingConfig.default()  # type: ignore[no-untyped-call]
    return found if isinstance(found, AutoscalingConfig) else None


def _names(place: Place, deployments: Deployments, args: AppArgs) -> Iterator[Finding]:
    known = tuple(
        name for name in (GATEWAY, *STAGES) if name != EMBEDDER or not args.embed_in_retriever
    )
    for name, (where, _) in deployments.items():
        if name == EMBEDDER and name not in known:
            message = "is not there with args.embed_in_retriever: leave the one or the other out"
            yield Finding((*where, "name"), message)
        elif name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            yield Finding((*where, "name"), f"= {name!r} is no deployment of the endpoint: {hint}")
    for name in known:
        if name not in deployments:
            message = (
                f"do not configure {name}: it would get a whole CPU and a queue without a bound"
            )
            yield Finding((*place, "deployments"), message)


def _queue(place: Place, deployment: DeploymentSchema) -> Iterator[Finding]:
    bound = setting(deployment, "max_queued_requests")
    if bound is None or bound < 0:  # 0 is bounded, and refused by Serve itself
        message = (
            "is not bounded: under more load than it can bear every request would wait longer than "
            "its caller; give a positive number"
        )
        yield Finding((*place, "max_queued_requests"), message)


def _autoscaling(place: Place, deployment: DeploymentSchema) -> Iterator[Finding]:
    scaling = autoscaling(deployment)
    ongoing, _ = _ongoing(deployment)
    if scaling is not None and scaling.get_target_ongoing_requests() > ongoing:
        message = (
            f"= {scaling.get_target_ongoing_requests():g} is above max_ongoing_requests = "
            f"{ongoing}: replicas are added only once requests queue; lower it"
        )
        here = (*place, "autoscaling_config", "target_ongoing_requests")
        yield Finding(here, message, warning=True)


def _batches(deployments: Deployments, gateway: GatewayConfig) -> Iterator[Finding]:
    """What the gateway sends against what each replica takes at a time."""
    if GATEWAY in deployments:
        place, deployment = deployments[GATEWAY]
        ongoing, given = _ongoing(deployment)
        if ongoing < gateway.max_batch:
            message = (
                f"{given} below args.gateway.max_batch = {gateway.max_batch}, so that batches "
                "would never fill: raise it"
            )
            yield Finding((*place, "max_ongoing_requests"), message)
    scaling = autoscaling(deployments[GATEWAY][1]) if GATEWAY in deployments else None
    gateways = 1 if scaling is None else scaling.max_replicas
    each = 1 + gateway.batches_ahead
    for name in STAGES:
        if name not in deployments:
            continue
        place, deployment = deployments[name]
        ongoing, given = _ongoing(deployment)
        if ongoing < each * gateways:
            message = (
                f"{given} below 1 + args.gateway.batches_ahead = {each}"
                f"{f' of {gateways} gateways' if ongoing >= each else ''}, so that batches would "
                "queue in front of idle replicas: raise it"
            )
            here = (*place, "max_ongoing_requests")
            yield Finding(here, message, warning=ongoing >= each)


def _ongoing(deployment: DeploymentSchema) -> tuple[int, str]:
    """``max_ongoing_requests``, and how a sentence about it begins."""
    ongoing = setting(deployment, "max_ongoing_requests")
    if ongoing is None:
        default = DEFAULT_MAX_ONGOING_REQUESTS
        return default, f"is {default} by default, which is"
    return int(ongoing), f"= {ongoing} is"


def _times(http: HTTPOptionsSchema, gateway: GatewayConfig) -> Iterator[Finding]:
    place = ("http_options", "request_timeout_s")
    limit = http.request_timeout_s
    if limit is None:
        yield Finding(place, "is not set: a request may take forever; give seconds", warning=True)
    elif limit <= gateway.timeout_s:
        message = (
            f"= {limit:g} is not above args.gateway.timeout_s = {gateway.timeout_s:g}: Serve would "
            "end requests with 408 that the gateway could answer without a slow stage; raise it"
        )
        yield Finding(place, message)


def _api_keys(place: Place, args: AppArgs) -> Iterator[Finding]:
    try:
        ApiKeys.parse(args.access.api_keys)
    except ConfigError as error:
        yield Finding(place, f"are wrong: {error}")


def _bind(http: HTTPOptionsSchema, keyed: bool) -> Iterator[Finding]:
    if keyed or is_loopback(http.host):
        return
    given = "host" in http.model_fields_set
    message = (
        f"{f'= {http.host}' if given else f'is {http.host} by default, which'} can be reached from "
        f"other machines, and no API key is set: set {VARIABLE}, or bind to 127.0.0.1"
    )
    yield Finding(("http_options", "host"), message)


def _tls(http: HTTPOptionsSchema, environment: Mapping[str, str]) -> Iterator[Finding]:
    place = ("http_options", "ssl_keyfile")
    if http.ssl_keyfile and not http.ssl_certfile:  # Serve looks only the other way round
        message = "is given without ssl_certfile: Serve would speak plain HTTP; give both"
        yield Finding(place, message)
    if http.ssl_keyfile and environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        message = (
            "is given and RAY_SERVE_ENABLE_HA_PROXY=1, which speaks plain HTTP only: end TLS in "
            "front of it, or set the variable to 0"
        )
        yield Finding(place, message)
