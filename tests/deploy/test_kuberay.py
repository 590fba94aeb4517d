"""The Kubernetes manifests, against the schemas of those who read them.

That of KubeRay is ours, in kuberay.schema.yaml: its definitions come in no package. It was compared
with the API reference of KubeRay 1.6.2; the manifests' fields are those of 1.7.0, too.

``python -m tests.deploy.test_kuberay`` copies the Serve configuration into the RayService.
"""

import copy
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.serve._private import constants
from ray.serve.schema import ServeDeploySchema

from serve_apps.keys import read_entries

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
SERVE_CONFIG = ROOT / "serve_apps" / "recommend.cluster.yaml"
KUBERNETES = "1.33"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay.schema.yaml").read_text())
BLOCK = re.compile(r"(?<=^  serveConfigV2: \|\n)(?:(?:    .*)?\n)+", flags=re.MULTILINE)


def documents() -> Iterator[Any]:
    for path in sorted(FOLDER.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            name = document["metadata"].get("name", path.stem)
            yield pytest.param(document, id=f"{document['kind']}-{name}")


def of_kind(*kinds: str) -> list[Any]:
    return [each for each in documents() if each.values[0]["kind"] in kinds]


RAY = of_kind("RayService", "RayCluster", "RayJob")
POLICIES = [each.values[0] for each in of_kind("NetworkPolicy")]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster that a Ray resource describes."""
    if document["kind"] == "RayCluster":
        return document["spec"]
    return document["spec"][
        "rayClusterSpec" if document["kind"] == "RayJob" else "rayClusterConfig"
    ]


def templates(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group → pod template."""
    cluster = cluster_of(document)
    found = {"head": cluster["headGroupSpec"]["template"]}
    found |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    if document["kind"] == "RayJob":
        found["submitter"] = document["spec"]["submitterPodTemplate"]
    return found


def container(document: dict[str, Any], group: str) -> dict[str, Any]:
    found: dict[str, Any] = templates(document)[group]["spec"]["containers"][0]
    return found


def check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check_pod(template: dict[str, Any]) -> None:
    metadata = {"name": "template"}
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}
    check_kubernetes(pod)


@pytest.mark.parametrize("document", [each for each in documents() if each not in RAY])
def test_what_is_kubernetes_own_fits_its_schema(document: dict[str, Any]):
    check_kubernetes(document)


@pytest.mark.parametrize("document", RAY)
def test_ray_resources_fit_kuberays_schema_and_their_pods_that_of_kubernetes(
    document: dict[str, Any],
):
    jsonschema.validate(document, SCHEMA)
    for template in templates(document).values():
        check_pod(template)
    options = cluster_of(document)["autoscalerOptions"]
    check_pod({"spec": {"containers": [{"name": "a", "resources": options["resources"]}]}})
    redis = cluster_of(document).get("gcsFaultToleranceOptions")
    if redis is not None:
        env = {"name": "REDIS_PASSWORD", **redis["redisPassword"]}
        check_pod({"spec": {"containers": [{"name": "a", "env": [env]}]}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("authOption",), {"mode": "token"}),
        (("authOptions", "mode"), "on"),
        (("gcsFaultToleranceOptions", "redisAdress"), "redis:6379"),
        (("headGroupSpec", "rayStartParams"), {"num-cpus": 0}),
        (("workerGroupSpecs", 0, "minReplica"), 1),
        (("rayVersion",), None),
    ],
    ids=str,
)
def test_the_schema_finds_mistakes(path: tuple[Any, ...], value: Any):
    document = copy.deepcopy(of_kind("RayService")[0].values[0])
    place = cluster_of(document)
    for part in path[:-1]:
        place = place[part]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayService", ("suspend",), True),  # came with 1.7
        ("RayService", ("rayClusterConfig",), None),
        ("RayService", ("upgradeStrategy", "type"), "Recreate"),
        ("RayJob", ("rayClusterSpec",), None),
        ("RayJob", ("shutdownAfterJobFinishes",), False),
        ("RayJob", ("preRunningDeadlineSeconds",), 0),
        ("RayJob", ("deletionStrategy",), {"deletionRules": []}),
    ],
    ids=str,
)
def test_the_schema_finds_mistakes_of_jobs_and_services(
    kind: str, path: tuple[str, ...], value: Any
):
    document = copy.deepcopy(of_kind(kind)[0].values[0])
    place = document["spec"]
    for part in path[:-1]:
        place = place[part]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA)


NAME_LENGTHS = {"RayCluster": 53, "RayService": 47, "RayJob": 47}
"""The operator appends to the last two names when it makes their clusters. The API appends five
characters to a generateName."""
TAKEN_BY_THE_OPERATOR = {
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "REDIS_USERNAME",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_enable_autoscaler_v2",
}
"""Variables that stand for a field of the manifest."""


@pytest.mark.parametrize("document", RAY)
def test_the_operator_takes_what_no_schema_tells(document: dict[str, Any]):
    """The checks of KubeRay's own that go over several fields."""
    metadata, cluster = document["metadata"], cluster_of(document)
    name = metadata.get("name") or f"{metadata['generateName']}12345"
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= NAME_LENGTHS[document["kind"]]
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # has tokens
    assert document["kind"] == "RayCluster" or "upgradeStrategy" not in cluster
    assert cluster["autoscalerOptions"]["version"] == "v2"
    pods = templates(document)
    for group in ("head", *(group["groupName"] for group in cluster["workerGroupSpecs"])):
        # The second autoscaler replaces pods, not containers.
        assert pods[group]["spec"].get("restartPolicy", "Never") == "Never"
    env = {each["name"] for each in container(document, "head").get("env", ())}
    assert not env & TAKEN_BY_THE_OPERATOR
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert not {"labels", "redis-password", "redis-username"} & set(group["rayStartParams"])
        assert "resources" not in group or not group["rayStartParams"].keys() & {
            "num-cpus",
            "num-gpus",
            "memory",
            "resources",
        }
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_schema_of_kubernetes_finds_mistakes():
    template = copy.deepcopy(templates(of_kind("RayService")[0].values[0])["head"])
    template["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(template)


@pytest.mark.parametrize("document", RAY)
def test_every_cluster_asks_for_a_token_and_runs_the_pinned_ray(document: dict[str, Any]):
    cluster = cluster_of(document)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-" in (FOLDER / "Dockerfile").read_text()
    lasting = document["kind"] != "RayJob"
    assert ("gcsFaultToleranceOptions" in cluster) is lasting


@pytest.mark.parametrize("document", RAY)
def test_no_pod_has_more_rights_than_it_needs(document: dict[str, Any]):
    for group, template in templates(document).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec.get("automountServiceAccountToken", True) is (group == "head")  # autoscaler
        for container in spec["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("document", RAY)
def test_every_ray_container_has_probes_that_need_no_token(document: dict[str, Any]):
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for group, template in templates(document).items():
        if group == "submitter":
            continue
        [container] = template["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] in PUBLIC_EXACT_PATHS
        ready = container["readinessProbe"]["httpGet"]["path"]
        serves = document["kind"] == "RayService"
        expected = "/-/healthz" if serves else "/api/local_raylet_healthz"
        assert ready == ("/api/gcs_healthz" if group == "head" else expected)


@pytest.mark.parametrize("document", RAY)
def test_the_policies_know_every_pod(document: dict[str, Any]):
    [policy] = [each for each in POLICIES if each["metadata"]["name"] == "ray"]
    selector = policy["spec"]["podSelector"]["matchLabels"]
    for template in templates(document).values():
        assert selector.items() <= template["metadata"]["labels"].items()


def test_requests_come_in_by_the_port_of_serve_and_nothing_by_default():
    rules = {policy["metadata"]["name"]: policy["spec"] for policy in POLICIES}
    assert rules["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    port = yaml.safe_load(SERVE_CONFIG.read_text())["http_options"]["port"]
    from_ingress = [
        [each["port"] for each in rule["ports"]]
        for rule in rules["ray"]["ingress"]
        if {"kubernetes.io/metadata.name": "ingress"}
        in [peer.get("namespaceSelector", {}).get("matchLabels") for peer in rule["from"]]
    ]
    assert from_ingress == [[port]]
    service = of_kind("RayService")[0].values[0]
    for template in templates(service).values():
        ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == port
        assert ports["metrics"] == 8080


def test_the_service_deploys_the_clusters_serve_configuration():
    service = of_kind("RayService")[0].values[0]
    given = service["spec"]["serveConfigV2"]
    assert given == SERVE_CONFIG.read_text(), "run `python -m tests.deploy.test_kuberay`"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(given))
    [application] = schema.applications
    mounts = templates(service)["cpu"]["spec"]["containers"][0]["volumeMounts"]
    assert application.args["bundles"].startswith(mounts[0]["mountPath"])


def test_the_replicas_fit_the_workers_that_the_autoscaler_may_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from serve_apps.lint import lint
    from serve_apps.linting.document import Document

    service = of_kind("RayService")[0].values[0]
    cluster = {"metadata": service["metadata"], "spec": cluster_of(service)}
    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    document = Document.read(SERVE_CONFIG)
    keys = tmp_path / "keys"
    keys.write_text(f"shop={'0' * 64}\n")
    env = {each["name"]: each.get("value") for each in container(service, "head")["env"]}
    assert env["FUSIONREC_API_KEYS"] == "/etc/fusionrec/keys"
    environment = {"FUSIONREC_API_KEYS": str(keys)}
    assert read_entries(environment)
    for number, allowed in (("min_workers", "error"), ("max_workers", "warning")):
        nodes = [kind["resources"] for kind in kinds.values() for _ in range(kind[number])]
        found = lint(document, environment, nodes)
        worst = [document.show(each) for each in found if allowed == "warning" or not each.warning]
        assert worst == []


@pytest.mark.parametrize("group", ["head", "cpu", "gpu"])
def test_haproxy_is_started_by_the_script_that_comes_with_the_image(group: str):
    pod = container(of_kind("RayService")[0].values[0], group)
    env = {each["name"]: each.get("value") for each in pod["env"]}
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == env["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    script = Path(env["RAY_SERVE_HAPROXY_BINARY_PATH"])
    image = (FOLDER / "Dockerfile").read_text()
    [folder] = re.findall(r"^WORKDIR (\S+)$", image, flags=re.MULTILINE)
    ours = script.relative_to(folder)
    assert re.search(rf"^COPY .* {ours.parts[0]} {ours.parts[0]}$", image, flags=re.MULTILINE)
    assert os.access(ROOT / ours, os.X_OK)
    for name in (name for name in env if name.startswith("RAY_SERVE_")):
        assert name in inspect.getsource(constants), f"Serve does not read {name}"
    # Statistics and metrics of HAProxy are for Ray, which is in the pod.
    inner = {constants.RAY_SERVE_HAPROXY_STATS_PORT, constants.RAY_SERVE_HAPROXY_METRICS_PORT}
    assert not inner & {port["containerPort"] for port in pod["ports"]}


def test_a_job_is_one_of_ours():
    job = of_kind("RayJob")[0].values[0]
    [module] = re.findall(r"python -m (\S+)", job["spec"]["entrypoint"])
    assert (ROOT / f"{module.replace('.', os.sep)}.py").is_file()
    given = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert given["env_vars"] == yaml.safe_load((ROOT / "runtime_env.yaml").read_text())["env_vars"]


if __name__ == "__main__":
    manifest = FOLDER / "rayservice.yaml"
    block = textwrap.indent(SERVE_CONFIG.read_text(encoding="utf-8"), "    ")
    manifest.write_text(BLOCK.sub(lambda _: block, manifest.read_text(encoding="utf-8"), count=1))
