"""Deploying, and going back: with a Serve on paper, and with a small application on a real one."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from benchmarks.harness.processes import free_port
from fusionrec.errors import ConfigError, ServingError
from serve_apps import deploy
from serve_apps.deploy import LAST_GOOD, bound, in_service, roll_out

ROOT = Path(__file__).resolve().parents[2]


def configuration(port: int, **args: Any) -> dict[str, Any]:
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 30.0},
        "applications": [
            {
                "name": "saying",
                "route_prefix": "/",
                "import_path": "tests.serve_apps.deployable:app",
                "args": args,
                "deployments": [
                    {
                        "name": "Saying",
                        "num_replicas": 1,
                        "max_queued_requests": 8,
                        "ray_actor_options": {"num_cpus": 0.1},
                    }
                ],
            }
        ],
    }


class PaperServe:
    """Takes configurations; those that break are refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deployed: list[str] = []
        self.running: dict[str, Any] | None = None
        monkeypatch.setattr(deploy, "deploy", self.deploy)
        monkeypatch.setattr(deploy, "in_service", lambda: self.running)

    def deploy(self, schema: Any, _timeout_s: float) -> str:
        args = schema.applications[0].args
        self.deployed.append(args["says"])
        if args.get("breaks"):
            self.running = None
            raise ServingError("the endpoint did not come up: it broke")
        self.running = configuration(schema.http_options.port, **args)
        return "http://127.0.0.1:8000"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> PaperServe:
    return PaperServe(monkeypatch)


def test_what_comes_up_is_kept_for_its_owner(paper: PaperServe, tmp_path: Path):
    kept = tmp_path / LAST_GOOD
    assert roll_out(configuration(8000, says="one"), kept, 1) == "http://127.0.0.1:8000"
    assert yaml.safe_load(kept.read_text()) == configuration(8000, says="one")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [kept]


def test_what_fails_is_replaced_by_what_ran(paper: PaperServe, tmp_path: Path):
    kept = tmp_path / LAST_GOOD
    roll_out(configuration(8000, says="one"), kept, 1)
    sentence = f"did not come up: it broke; the last good configuration, {kept}, is in service"
    with pytest.raises(ServingError, match=sentence):
        roll_out(configuration(8000, says="two", breaks=True), kept, 1)
    assert paper.deployed == ["one", "two", "one"]
    assert yaml.safe_load(kept.read_text()) == configuration(8000, says="one")


def test_what_runs_counts_and_not_what_was_once_kept(paper: PaperServe, tmp_path: Path):
    kept = tmp_path / LAST_GOOD
    kept.write_text(yaml.safe_dump(configuration(8000, says="old")))
    paper.running = configuration(8000, says="by other means")
    with pytest.raises(ServingError, match="is in service again"):
        roll_out(configuration(8000, says="two", breaks=True), kept, 1)
    assert paper.deployed == ["two", "by other means"]


def test_where_nothing_runs_the_kept_one_is_gone_back_to(paper: PaperServe, tmp_path: Path):
    kept = tmp_path / LAST_GOOD
    kept.write_text(yaml.safe_dump(configuration(8000, says="old")))
    with pytest.raises(ServingError, match="is in service again"):
        roll_out(configuration(8000, says="two", breaks=True), kept, 1)
    assert paper.deployed == ["two", "old"]


def test_the_first_one_has_nothing_to_go_back_to(paper: PaperServe, tmp_path: Path):
    with pytest.raises(ServingError, match="it broke; nothing ran before"):
        roll_out(configuration(8000, says="two", breaks=True), tmp_path / LAST_GOOD, 1)


def test_when_both_fail_both_are_named(paper: PaperServe, tmp_path: Path):
    kept = tmp_path / LAST_GOOD
    kept.write_text(yaml.safe_dump(configuration(8000, says="old", breaks=True)))
    with pytest.raises(ServingError, match=r"it broke; the last good .* fails too: .* it broke"):
        roll_out(configuration(8000, says="two", breaks=True), kept, 1)


def test_another_address_keeps_the_rest():
    values = {"http_options": {"request_timeout_s": 3, "port": 1}, "applications": []}
    assert bound(values, "::1", 2) == {
        "http_options": {"request_timeout_s": 3, "port": 2, "host": "::1"},
        "applications": [],
    }
    assert values["http_options"]["port"] == 1


def test_keys_of_the_environment_go_along(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FUSIONREC_API_KEYS", f"shop={'0' * 64}")
    ours = {"import_path": "serve_apps.recommend:app"}
    (application,) = deploy._with_keys({"applications": [ours]})["applications"]
    assert application["args"]["access"]["api_keys"] == [f"shop={'0' * 64}"]
    keyed = {**ours, "args": {"access": {"api_keys": ["1" * 64]}}}
    for unchanged in ({"applications": [keyed]}, configuration(8000, says="one")):
        assert deploy._with_keys(unchanged) == unchanged


def test_an_address_that_takes_jobs_only_is_told_from_a_cluster(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deploy.ray, "is_initialized", lambda: False)
    with (
        pytest.raises(ConfigError, match="ray job submit --address http://head:8265"),
        deploy._connect("http://head:8265"),
    ):
        pass


def test_the_command_refuses_what_the_linter_refuses(tmp_path: Path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({**configuration(8000), "http_optoins": {}}))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "serve_apps.deploy", str(wrong)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "http_optoins is unknown: did you mean http_options?" in result.stderr


@pytest.fixture
def real_serve(ray_cluster: Any) -> Iterator[int]:
    from ray import serve

    yield free_port()
    serve.shutdown()


@pytest.mark.ray
def test_a_deployment_that_fails_leaves_the_one_before_in_service(real_serve: int, tmp_path: Path):
    kept = tmp_path / LAST_GOOD
    assert in_service() is None
    address = roll_out(configuration(real_serve, says="one"), kept, 120)
    assert httpx.get(address, timeout=10).text == "one"
    kept.unlink()  # what runs is known to Serve

    sentence = "this one never comes up.*is in service again"
    with pytest.raises(ServingError, match=sentence):
        roll_out(configuration(real_serve, says="two", breaks=True), kept, 120)
    assert httpx.get(address, timeout=10).text == "one"
    running = in_service()
    assert running is not None
    assert running["applications"][0]["args"] == {"says": "one"}

    assert roll_out(configuration(real_serve, says="three"), kept, 120) == address
    assert httpx.get(address, timeout=10).text == "three"
    assert yaml.safe_load(kept.read_text())["applications"][0]["args"] == {"says": "three"}


@pytest.mark.ray
def test_a_proxy_that_cannot_listen_is_one_sentence(real_serve: int):
    schema = ServeDeploySchema.model_validate(configuration(real_serve, says="never"))
    with (
        socket.create_server(("127.0.0.1", real_serve)),
        pytest.raises(ServingError, match="the endpoint did not come up") as raised,
    ):
        deploy.deploy(schema, 60)
    assert "\n" not in str(raised.value)
    assert str(real_serve) in str(raised.value)
