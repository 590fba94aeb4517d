"""``cluster.yaml`` against Ray's own schema, and against what this project says of it."""

import json
import tomllib
from itertools import chain
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cluster() -> dict:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def runtime_env() -> dict:
    return yaml.safe_load((ROOT / "runtime_env.yaml").read_text())


def test_rays_schema_accepts_it(cluster):
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate({**cluster, "max_worker": 3}, schema)


def test_ray_up_accepts_it_with_its_defaults_filled_in(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"


def test_head_has_no_gpu_and_gpu_workers_scale_from_zero(cluster):
    types = cluster["available_node_types"]
    families = {name: t["node_config"]["InstanceType"].split(".")[0] for name, t in types.items()}
    assert not families["head"].startswith(("g", "p"))
    assert families["gpu_worker"].startswith(("g", "p"))
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu_worker"]["min_workers"] == 0 < types["gpu_worker"]["max_workers"]
    assert sum(t.get("max_workers", 0) for t in types.values()) <= cluster["max_workers"]


def test_images_carry_the_pinned_ray(cluster):
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    version = next(pin for pin in pins if pin.startswith("ray==")).removeprefix("ray==")
    node_types = cluster["available_node_types"].values()
    docker = [cluster["docker"], *(node_type.get("docker", {}) for node_type in node_types)]
    images = [image for d in docker for key, image in d.items() if key.endswith("_image")]
    assert len(images) == 3
    assert {image.split(":")[1].split("-")[0] for image in images} == {version}


def test_mounted_files_are_those_of_the_project(cluster):
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert local
    assert all((ROOT / path).is_file() for path in local)


def test_runtime_env_is_one_that_ray_accepts(runtime_env, monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = ray.runtime_env.RuntimeEnv(**runtime_env)
    assert checked.py_modules() == ["platform/fusionrec"]
    assert all((ROOT / module / "__init__.py").is_file() for module in runtime_env["py_modules"])
    # A pattern without a leading slash would also match inside the library and lose files there.
    assert all(pattern.startswith("/") for pattern in runtime_env["excludes"])


def test_pins_hold_what_the_project_asks_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in chain(project["dependencies"], *extras.values()):
        asked = Requirement(line)
        assert pinned[asked.name.lower()] in asked.specifier, line
    assert "torch==2.13.0" in project["dependencies"]
