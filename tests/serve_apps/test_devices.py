import os

import pytest

from serve_apps.devices import hide_unassigned_gpus


@pytest.mark.ray
def test_an_actor_without_a_gpu_sees_none(ray_cluster, monkeypatch):
    import ray

    class Replica:
        def visible(self) -> str | None:
            from serve_apps.devices import hide_unassigned_gpus

            os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
            hide_unassigned_gpus()
            return os.environ["CUDA_VISIBLE_DEVICES"]

    replica = ray.remote(num_cpus=0)(Replica).remote()
    assert ray.get(replica.visible.remote()) == ""
    ray.kill(replica)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    hide_unassigned_gpus()  # a driver keeps what it has
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(("assigned", "left"), [(["1"], "1"), ([], "")])
def test_an_actor_keeps_its_own(monkeypatch, assigned, left):
    class Context:
        def get_actor_id(self) -> str:
            return "an actor"

        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": assigned}

    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.get_runtime_context", Context)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    hide_unassigned_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
