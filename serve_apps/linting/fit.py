"""Replicas that no cluster of these nodes could ever hold.

Only what is impossible is an error: whether the rest is placed well is Ray's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeDeploySchema

from serve_apps.linting.document import Finding, Place
from serve_apps.linting.rules import autoscaling, setting

Resources = Mapping[str, float]
"""``CPU``, ``GPU``, ``memory`` (bytes) and custom names → how much."""
_GRAIN = 1e-4
"""Ray counts resources in ten-thousandths."""
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Need:
    place: Place
    bundles: Sequence[Resources]
    """What a replica takes; each of them on one node."""
    fewest: int
    most: int


def check_fit(schema: ServeDeploySchema, nodes: Sequence[Resources]) -> Iterator[Finding]:
    """Which deployments cannot get their fewest replicas (errors) or their most (warnings).

    Resources that no node mentions are not judged: whoever gives nodes by hand leaves them out.
    """
    named = {name for node in nodes for name in node}
    needs = []
    for number, application in enumerate(schema.applications):
        for position, deployment in enumerate(application.deployments):
            needs.append(
                _need(("applications", number, "deployments", position), deployment, named)
            )
    possible = []
    for need in needs:
        room = min((_room(bundle, nodes) for bundle in need.bundles), default=math.inf)
        if room < 1:
            text = "; ".join(_text(bundle) for bundle in need.bundles)
            largest = _text({name: max(n.get(name, 0.0) for n in nodes) for name in named})
            message = f"needs {text} for a replica, and no node has that (most: {largest})"
            yield Finding(need.place, f"{message}: ask for less, or add larger nodes")
        elif room < need.fewest:
            message = f"starts with {need.fewest} replicas, and the nodes have room for {room:g}"
            yield Finding(need.place, f"{message}: lower min_replicas, or add nodes")
        else:
            possible.append(need)
            if room < need.most:
                message = f"may grow to {need.most} replicas, and the nodes have room for {room:g}"
                yield Finding(need.place, message, warning=True)
    if len(possible) == len(needs):
        yield from _together(needs, nodes, named)


def _together(
    needs: Sequence[_Need], nodes: Sequence[Resources], named: set[str]
) -> Iterator[Finding]:
    """The fewest replicas of all deployments against the whole cluster."""
    for name in sorted(named):
        held = sum(node.get(name, 0.0) for node in nodes)
        needed = sum(
            need.fewest * bundle.get(name, 0.0) for need in needs for bundle in need.bundles
        )
        if needed > held + _GRAIN:
            message = (
                f"need {_amount(name, needed)} for their fewest replicas together, and the cluster "
                f"has {_amount(name, held)}: lower min_replicas or what each asks for, or add nodes"
            )
            yield Finding(("applications",), message)


def _need(place: Place, deployment: DeploymentSchema, named: set[str]) -> _Need:
    bundles = setting(deployment, "placement_group_bundles")
    if not bundles:
        options = setting(deployment, "ray_actor_options") or RayActorOptionsSchema()
        bundles = [
            {
                "CPU": 1.0 if options.num_cpus is None else options.num_cpus,
                "GPU": options.num_gpus or 0.0,
                "memory": options.memory or 0.0,
                **options.resources,
            }
        ]
    kept = [
        {name: float(much) for name, much in bundle.items() if name in named and much > 0}
        for bundle in bundles
    ]
    scaling = autoscaling(deployment)
    if scaling is None:
        replicas = setting(deployment, "num_replicas") or 1
        return _Need(place, kept, int(replicas), int(replicas))
    return _Need(
        place, kept, scaling.initial_replicas or scaling.min_replicas, scaling.max_replicas
    )


def _room(bundle: Resources, nodes: Sequence[Resources]) -> float:
    """How often ``bundle`` fits on ``nodes`` that hold nothing else."""
    if not bundle:
        return math.inf
    return sum(
        min(math.floor((node.get(name, 0.0) + _GRAIN) / much) for name, much in bundle.items())
        for node in nodes
    )


def _text(resources: Resources) -> str:
    shown = [_amount(name, much) for name, much in sorted(resources.items())]
    return ", ".join(shown) or "nothing"


def _amount(name: str, much: float) -> str:
    if name == "memory":
        return f"{much / _GIB:.3g} GiB of memory"
    return f"{round(much, 4):g} {name}"
