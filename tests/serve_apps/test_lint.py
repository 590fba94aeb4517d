import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import DeploymentSchema

from benchmarks.harness.application import embed_apart, write_application
from fusionrec.bundles.store import BundleStore
from serve_apps.lint import lint
from serve_apps.linting.document import Document
from serve_apps.linting.rules import EMBEDDER, GATEWAY, STAGES, _queue
from serve_apps.recommend import CONFIG_FILE, AppArgs, app

ROOT = Path(__file__).resolve().parents[2]
CLUSTER_FILE = CONFIG_FILE.with_name("recommend.cluster.yaml")
KEYED = {"FUSIONREC_API_KEYS": f"shop={'0' * 64}"}
LAPTOP: dict[str, Any] = yaml.safe_load(CONFIG_FILE.read_text())


@pytest.fixture
def values() -> dict[str, Any]:
    """The laptop's YAML, but with an embedder of its own, as on a cluster."""
    values = copy.deepcopy(LAPTOP)
    embed_apart(values["applications"][0])
    return values


def change(values: dict[str, Any], path: str, value: Any = ...) -> None:
    """Set what ``path`` names (``a.0.b``), or take it out."""
    *parents, last = path.split(".")
    here: Any = values
    for part in parents:
        here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
    if value is ...:
        del here[last]
    else:
        here[last] = value


def said(
    values: dict[str, Any], environment: dict[str, str] | None = None, **options: Any
) -> list[str]:
    document = Document(values)
    return [document.show(finding) for finding in lint(document, environment or {}, **options)]


GATEWAY_PLACE = "applications.0.deployments.0"
EMBEDDER_PLACE = "applications.0.deployments.1"


def test_the_laptop_profile_is_clean_and_fits_two_cores(values: dict[str, Any]):
    assert said(LAPTOP, nodes=[{"CPU": 2.0}]) == said(values, nodes=[{"CPU": 2.0}]) == []


@pytest.mark.parametrize("both", [False, True])
def test_a_retriever_that_embeds_needs_no_embedder(tmp_path: Path, both: bool):
    file = write_application(tmp_path / "a.yaml", {"Retriever": 2}, embed_in_retriever=both)
    assert lint(Document.read(file), {}, [{"CPU": 2.0}]) == []


def test_the_cluster_profile_is_clean_with_keys_and_fits_three_nodes():
    document = Document.read(CLUSTER_FILE)
    assert lint(document, KEYED, [{"CPU": 16.0, "GPU": 1.0, "memory": 2.0**36}] * 3) == []
    (bind,) = [document.show(finding) for finding in lint(document, {})]
    assert "http_options.host = 0.0.0.0 can be reached from other machines" in bind


def test_the_cluster_profile_asks_for_whole_devices_and_several_replicas():
    (application,) = Document.read(CLUSTER_FILE).values["applications"]
    for deployment in application["deployments"]:
        assert deployment["autoscaling_config"]["min_replicas"] >= 2
        assert all(much == int(much) for much in deployment["ray_actor_options"].values())


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("proxy_locatoin", "HeadOnly", "proxy_locatoin is unknown: did you mean proxy_location?"),
        ("http_options.prot", 80, "http_options.prot is unknown: did you mean port?"),
        (
            "logging_config.log_levle",
            "INFO",
            "logging_config.log_levle is unknown: did you mean log_level?",
        ),
        (
            "applications.0.route",
            "/",
            "applications[recommend].route is unknown: did you mean route_prefix?",
        ),
        (
            "applications.0.runtime_env",
            {"env_var": {}},
            "applications[recommend].runtime_env.env_var is unknown: did you mean env_vars?",
        ),
        (
            "applications.0.args.gateway.max_batches",
            32,
            "applications[recommend].args.gateway.max_batches is unknown: did you mean max_batch?",
        ),
        (
            "applications.0.args.access",
            {"bursts": 3},
            "applications[recommend].args.access.bursts is unknown: did you mean burst?",
        ),
        (
            f"{EMBEDDER_PLACE}.max_queued_request",
            64,
            "applications[recommend].deployments[Embedder].max_queued_request is unknown: "
            "did you mean max_queued_requests?",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config.max_replica",
            2,
            "deployments[Embedder].autoscaling_config.max_replica is unknown: "
            "did you mean max_replicas?",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config.policy",
            {"policy_funktion": "a:b"},
            "autoscaling_config.policy.policy_funktion is unknown: did you mean policy_function?",
        ),
        (
            f"{EMBEDDER_PLACE}.ray_actor_options.num_cpu",
            1,
            "deployments[Embedder].ray_actor_options.num_cpu is unknown: did you mean num_cpus?",
        ),
        (
            f"{GATEWAY_PLACE}.backpressure_config.retry_after",
            1,
            "backpressure_config.retry_after is unknown: did you mean retry_after_s?",
        ),
        ("colour", "red", "colour is unknown: known are applications, "),
    ],
)
def test_misspelt_keys_are_found_at_every_level(
    values: dict[str, Any], path: str, value: Any, sentence: str
):
    change(values, path, value)
    (finding,) = said(values)
    assert finding.startswith("configuration: error: ")
    assert sentence in finding


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("http_options.port", "many", "http_options.port = 'many' is wrong: "),
        (
            "http_options.ssl_certfile",
            "cert.pem",
            "http_options.ssl_certfile = 'cert.pem' is wrong: Both ssl_keyfile and ssl_certfile",
        ),
        ("http_options.ssl_keyfile", "key.pem", "given without ssl_certfile: Serve would speak"),
        ("applications.0.args.gateway.max_batch", 0, "args.gateway.max_batch = 0 is wrong: "),
        (
            "applications.0.import_path",
            "serve_apps.recommend:ap",
            "import_path = 'serve_apps.recommend:ap' cannot be imported here (AttributeError: ",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config.policy",
            {"policy_function": "serve_apps.nowhere:policy"},
            "policy.policy_function = 'serve_apps.nowhere:policy' cannot be imported here "
            "(ModuleNotFoundError: No module named 'serve_apps.nowhere')",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config.min_replicas",
            3,
            "deployments[Embedder].autoscaling_config is wrong: max_replicas (2) must be greater",
        ),
        (
            f"{EMBEDDER_PLACE}.name",
            "Embeder",
            "deployments[Embeder].name = 'Embeder' is no deployment of the endpoint: "
            "did you mean Embedder?",
        ),
        (
            "applications.0.args.embed_in_retriever",
            True,
            "deployments[Embedder].name is not there with args.embed_in_retriever: leave the one "
            "or the other out",
        ),
        (
            f"{EMBEDDER_PLACE}.max_queued_requests",
            -1,
            "deployments[Embedder].max_queued_requests is not bounded",
        ),
        (
            f"{EMBEDDER_PLACE}.max_queued_requests",
            ...,
            "deployments[Embedder].max_queued_requests is not bounded",
        ),
        (
            f"{EMBEDDER_PLACE}.max_queued_requests",
            0,
            "[Embedder] is wrong: max_queued_requests must be -1 (no limit) or a positive integer",
        ),
        (
            f"{EMBEDDER_PLACE}.max_ongoing_requests",
            1,
            "max_ongoing_requests = 1 is below 1 + args.gateway.batches_ahead = 2, so that "
            "batches would queue in front of idle replicas: raise it",
        ),
        (
            f"{GATEWAY_PLACE}.max_ongoing_requests",
            ...,
            "max_ongoing_requests is 5 by default, which is below args.gateway.max_batch = 32, "
            "so that batches would never fill",
        ),
        (
            "http_options.request_timeout_s",
            5,
            "http_options.request_timeout_s = 5 is not above args.gateway.timeout_s = 5",
        ),
        ("http_options.host", "0.0.0.0", "host = 0.0.0.0 can be reached from other"),  # noqa: S104
        ("http_options.host", ..., "host is 0.0.0.0 by default, which can be reached from other"),
        (
            "applications.0.args.access",
            {"api_keys": ["secret"]},
            "args.access.api_keys are wrong: entry 1",
        ),
        (
            "applications.0.runtime_env",
            {"working_dir": "."},
            "applications[recommend].runtime_env is wrong: runtime_envs in the Serve config",
        ),
    ],
)
def test_settings_that_cannot_work_are_errors(
    values: dict[str, Any], path: str, value: Any, sentence: str
):
    change(values, path, value)
    errors = [line for line in said(values) if ": error: " in line]
    assert any(sentence in line for line in errors), errors


@pytest.mark.parametrize(("bound", "open_"), [(None, True), (-1, True), (0, False), (1, False)])
def test_a_queue_of_no_places_is_bounded(bound: int | None, open_: bool):
    given = {} if bound is None else {"max_queued_requests": bound}
    deployment = DeploymentSchema.model_construct(set(given), name=EMBEDDER, **given)
    assert bool(list(_queue((), deployment))) is open_


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("http_options.request_timeout_s", ..., "request_timeout_s is not set"),
        (
            f"{EMBEDDER_PLACE}.max_ongoing_requests",
            3,
            "max_ongoing_requests = 3 is below 1 + args.gateway.batches_ahead = 2 of 2 gateways",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config.target_ongoing_requests",
            9,
            "target_ongoing_requests = 9 is above max_ongoing_requests = 4",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config.metrics_interval_s",
            5,
            "autoscaling_config makes Serve warn: The `metrics_interval_s` field",
        ),
    ],
)
def test_settings_that_are_seldom_meant_are_warnings(
    values: dict[str, Any], path: str, value: Any, sentence: str
):
    change(values, path, value)
    (finding,) = said(values)
    assert finding.startswith("configuration: warning: ")
    assert sentence in finding


def test_a_deployment_that_is_left_out_is_named(values: dict[str, Any]):
    del values["applications"][0]["deployments"][3]
    (finding,) = said(values)
    assert "applications[recommend].deployments do not configure Reranker" in finding


def test_keys_of_the_environment_open_a_bind(values: dict[str, Any]):
    change(values, "http_options.host", "::")
    assert said(values, KEYED) == []


def test_haproxy_speaks_no_tls(values: dict[str, Any]):
    change(values, "http_options.ssl_keyfile", "key.pem")
    change(values, "http_options.ssl_certfile", "cert.pem")
    assert said(values) == []
    (finding,) = said(values, {"RAY_SERVE_ENABLE_HA_PROXY": "1"})
    assert "speaks plain HTTP only: end TLS in front of it" in finding


def test_code_that_only_the_cluster_has_is_a_warning(values: dict[str, Any]):
    change(values, "applications.0.runtime_env", {"working_dir": "https://example.org/code.zip"})
    policy = {"policy_function": "elsewhere:policy"}
    change(values, f"{EMBEDDER_PLACE}.autoscaling_config.policy", policy)
    (finding,) = said(values)
    assert ": warning: " in finding
    assert "the runtime_env may bring it" in finding


@pytest.mark.parametrize(
    ("path", "value", "nodes", "sentence"),
    [
        (
            f"{EMBEDDER_PLACE}.ray_actor_options.num_cpus",
            8,
            [{"CPU": 4.0}] * 3,
            "error: applications[recommend].deployments[Embedder] needs 8 CPU for a replica, and "
            "no node has that (most: 4 CPU)",
        ),
        (
            f"{EMBEDDER_PLACE}.ray_actor_options.num_gpus",
            1,
            [{"CPU": 4.0, "GPU": 0.0}],
            "error: applications[recommend].deployments[Embedder] needs 0.2 CPU, 1 GPU",
        ),
        (
            f"{EMBEDDER_PLACE}.ray_actor_options.memory",
            2**34,
            [{"CPU": 4.0, "memory": 2.0**33}],
            "needs 0.2 CPU, 16 GiB of memory for a replica",
        ),
        (
            f"{EMBEDDER_PLACE}.ray_actor_options",
            {"num_cpus": 3, "resources": {"fast_disk": 1}},
            [{"CPU": 8.0, "fast_disk": 1.0}],
            "warning: applications[recommend].deployments[Embedder] may grow to 2 replicas, and "
            "the nodes have room for 1",
        ),
        (
            f"{EMBEDDER_PLACE}.autoscaling_config",
            {"min_replicas": 5, "max_replicas": 5},
            [{"CPU": 0.7}],
            "starts with 5 replicas, and the nodes have room for 3",
        ),
        (
            f"{EMBEDDER_PLACE}.ray_actor_options.num_cpus",
            1.5,
            [{"CPU": 2.0}],
            "error: applications need 2.2 CPU for their fewest replicas together, and the cluster "
            "has 2 CPU",
        ),
        (
            f"{EMBEDDER_PLACE}.ray_actor_options",
            ...,
            [{"CPU": 1.5}],
            "need 1.7 CPU for their fewest replicas together",  # Serve's default is a whole CPU
        ),
    ],
)
def test_replicas_that_can_never_fit_are_found(
    values: dict[str, Any], path: str, value: Any, nodes: list[dict[str, float]], sentence: str
):
    change(values, path, value)
    assert any(sentence in line for line in said(values, nodes=nodes)), said(values, nodes=nodes)


def test_the_names_of_the_deployments_are_those_that_the_application_builds(
    paper_bundles: BundleStore,
):
    from ray.serve._private.build_app import build_app

    args = AppArgs(bundles=str(paper_bundles.directory))
    built = build_app(app(args), name="recommend")
    assert {deployment.name for deployment in built.deployments} == {GATEWAY, *STAGES}
    both = build_app(app(args.model_copy(update={"embed_in_retriever": True})), name="recommend")
    assert {d.name for d in both.deployments} == {GATEWAY, *STAGES} - {EMBEDDER}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSIONREC_")}
    command = [sys.executable, "-m", "serve_apps.lint", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_command_names_file_and_line_and_counts_errors_only(tmp_path: Path):
    text = CONFIG_FILE.read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("port: 8000", "port: 8000\n  prot: 1\n  port: 8001", 1))
    result = run(str(wrong))
    assert result.returncode == 1
    line = text.splitlines().index("  port: 8000") + 2
    first, second = result.stderr.splitlines()
    assert first == f"{wrong}:{line}: error: http_options.prot is unknown: did you mean port?"
    assert second.startswith(f"{wrong}:{line + 1}: error: http_options.port stands here twice")

    result = run(str(CONFIG_FILE), "--cpus", "1")
    assert (result.returncode, result.stderr) == (0, "")
    result = run(str(CONFIG_FILE), "--cpus", "0.5")
    assert result.returncode == 1
    assert "for their fewest replicas together" in result.stderr
    assert run(str(tmp_path / "none.yaml")).returncode == 2
