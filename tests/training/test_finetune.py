"""jobs.finetune from end to end: under Ray Train, under torchrun, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionrec.config import parse
from fusionrec.data.dataset import Dataset
from fusionrec.errors import ConfigError, NonFiniteLoss, TrainingError
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from fusionrec.serving.pipeline import Pipeline
from fusionrec.training.curves import read
from fusionrec.training.examples import Examples
from fusionrec.training.tasks import load_task
from jobs.finetune import FinetuneConfig, finetune, plan, prepare
from jobs.finished import use
from tests.pages.reading import check
from tests.training.tiny import NUM_ITEMS, NUM_USERS, write_dataset

# Ray copies its own settings, deprecated ones among them, whenever it starts something.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    """The same with ratings from 1 to 5."""
    values = np.random.default_rng(1).integers(1, 6, NUM_USERS * 8).astype(np.float32)
    return write_dataset(tmp_path_factory.mktemp("rated") / "dataset", values)


@pytest.fixture
def pipeline(monkeypatch, dataset, tmp_path) -> Path:
    """A pipeline that recommends every item in order of its code."""
    return fake_pipeline(monkeypatch, dataset, tmp_path)


@pytest.fixture
def rated_pipeline(monkeypatch, rated, tmp_path) -> Path:
    """The same, fitted on the data set with ratings."""
    return fake_pipeline(monkeypatch, rated, tmp_path)


def fake_pipeline(monkeypatch, dataset: Path, tmp_path: Path) -> Path:
    class Fake:
        config = types.SimpleNamespace(dataset=Dataset.open(dataset).info, protocol="leave-one-out")

        def recommend(self, histories, *, rerank):
            assert not rerank
            items = np.tile(np.arange(NUM_ITEMS, dtype=np.int32), (len(histories), 1))
            return types.SimpleNamespace(items=items)

    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: Fake())
    (tmp_path / "pipeline").mkdir()
    return tmp_path / "pipeline"


def test_defaults_depend_on_the_task(configure):
    resolved = {task: configure(task, "--seed", "3").resolved() for task in DEFAULT_BATCH}
    encoder, reranker = resolved["encoder"], resolved["reranker"]
    assert encoder[1].batch_size == DEFAULT_BATCH["encoder"]
    assert reranker[1].batch_size == DEFAULT_BATCH["reranker"]
    assert encoder[1].seed == 3
    assert configure("encoder", "--batch-size", "5").resolved()[1].batch_size == 5
    for task, size in DEFAULT_BATCH.items():  # what --help says
        assert f"{task} --batch-size {size}" in " ".join((FinetuneConfig.__doc__ or "").split())


DEFAULT_BATCH = {"encoder": 64, "reranker": 8, "decoder": 4, "pretraining": 32, "rating": 32}
DEFAULT_BATCH |= {"distillation": 8, "multi-task": 16}


def test_plan_is_about_the_nodes_of_the_cluster(configure, monkeypatch):
    import ray

    from jobs import cluster

    node = {"Alive": True, "NodeManagerHostname": "gpus", "NodeManagerAddress": "10.0.0.3"}
    node |= {"Resources": {"CPU": 8.0, "GPU": 4.0, "memory": 6e10, "accelerator_type:H100": 1.0}}
    monkeypatch.setattr(cluster, "is_given", lambda: True)
    monkeypatch.setattr(cluster, "start", nullcontext)
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setenv("CXX", "no-such-compiler")  # on this machine nothing is compiled
    config = configure("encoder", "--num-workers", "2")
    assert "of the 80.00 GB of a GPU of node 10.0.0.3 (H100)" in plan(config).sentence
    without = config.model_copy(update={"use_gpu": False})
    assert "of the CPUs of node 10.0.0.3" in plan(without).sentence


def test_reranker_needs_a_pipeline(configure):
    with pytest.raises(ConfigError, match="--pipeline DIR"):
        finetune(configure("reranker"))


def test_what_a_task_cannot_do_without(configure, pipeline, tmp_path):
    place = ("--pipeline", str(pipeline))
    with pytest.raises(ConfigError, match="--teacher DIR"):
        finetune(configure("distillation", *place))
    config = parse(
        FinetuneConfig,
        ["--task", "decoder", "--dataset", "nowhere", "--out", str(tmp_path / "run"), *place],
    )
    with pytest.raises(ConfigError, match="--encoder FOLDER"):
        finetune(config)


def test_settings_of_other_tasks_are_ignored_aloud(configure):
    with pytest.warns(UserWarning, match="--ranking-loss is ignored by --task encoder"):
        configure("encoder", "--ranking-loss", "pairwise").resolved()


def test_settings_reach_their_task(configure):
    encoder, _ = configure(
        "encoder",
        "--dimensions",
        "8,16",
        "--mined-negatives",
        "3",
        "--no-gather-negatives",
        "--towers",
        "2",
    ).resolved()
    assert encoder.towers == 2
    assert encoder.dimensions == (8, 16)
    assert encoder.mined_negatives == 3
    assert not encoder.gather_negatives
    several, _ = configure(
        "multi-task", "--objectives", "encoder,rating", "--objective-weights", "1,0.5"
    ).resolved()
    assert several.objectives == ("encoder", "rating")
    assert several.objective_weights == (1.0, 0.5)
    with pytest.raises(ConfigError, match="give a weight for each"):
        configure("multi-task", "--objective-weights", "1")
    several, _ = configure("multi-task", "--dimensions", "8", "--mask-share", "0.3").resolved()
    assert (several.dimensions, several.mask_share) == ((8,), 0.3)
    with pytest.warns(UserWarning, match="--ranking-loss is ignored by --objectives encoder,pre"):
        configure("multi-task", "--ranking-loss", "pairwise").resolved()


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("reranker", ["--ranking-loss", "pairwise"]),
        ("pretraining", []),
        ("rating", []),
        ("distillation", ["--student", "encoder"]),
        (
            "multi-task",
            [
                "--objectives",
                "encoder,reranker,rating,pretraining,distillation",
                "--student",
                "encoder",
                "--dimensions",
                "8",
                "--mined-negatives",
                "1",
            ],
        ),
    ],
)
def test_every_task_is_made_from_a_data_set(
    configure, rated, rated_pipeline, tiny_encoder, tmp_path, task, flags
):
    Reranker.load(tiny_encoder, device="cpu").save(tmp_path / "teacher")
    places = ["--pipeline", str(rated_pipeline), "--teacher", str(tmp_path / "teacher")]
    config = configure(task, *places, *flags).model_copy(update={"dataset": rated})
    config.check(config.resolved()[0])
    prepare(config, config.resolved()[0])
    made = load_task(config.out / "examples")
    assert made.name == task
    model = made.build_model()
    (first, *_) = made.plan(2, np.random.default_rng(0))
    loss = made.loss(model, made.batch(first))
    assert np.isfinite(loss.item())
    made.save(model, tmp_path / "model")
    assert made.describe(first)


def test_hard_negatives_come_from_the_pipeline(configure, pipeline):
    config = configure("reranker", "--pipeline", str(pipeline), "--negatives-from", "10")
    prepare(config, config.resolved()[0])
    examples = Examples.load(config.out / "examples")
    assert examples.negatives.shape[1] == 7
    assert examples.negatives.max() < 10
    for row in range(len(examples)):
        negatives = examples.negatives[row][examples.negatives[row] >= 0]
        assert len(set(negatives)) == len(negatives) > 0
        assert not set(negatives) & set(examples.seen.row(int(examples.users[row])))
    other = ("--protocol", "global-time", "--out", str(config.out / "other"))
    other = configure("reranker", "--pipeline", str(pipeline), *other)
    with pytest.raises(ConfigError, match="global-time"):
        prepare(other, other.resolved()[0])
    before = (config.out / "examples" / "examples.safetensors").stat().st_mtime_ns
    prepare(config, config.resolved()[0])  # there already: nothing is made again
    assert (config.out / "examples" / "examples.safetensors").stat().st_mtime_ns == before
    assert load_task(config.out / "examples").name == "reranker"


@pytest.mark.ray
@pytest.mark.slow
def test_encoder_under_ray(configure, ray_cluster, tmp_path):
    elastic = ("--num-workers", "2", "--min-workers", "1")
    config = configure("encoder", "--batch-size", "2", "--method", "lora", *elastic)
    result = finetune(config)
    assert result.steps == (NUM_USERS * 5) // 4
    assert result.identity["training"]["batches"] == 2
    assert Encoder.load(result.model, device="cpu").encode(["love and war"]).shape == (1, 32)
    progress = json.loads((config.out / "progress.json").read_text())
    assert progress["step"] == progress["total"] == result.steps
    # The same command again: nothing is trained, the result is there.
    assert finetune(config) == result
    with pytest.raises(TrainingError, match="another --out"):
        finetune(configure("encoder", "--batch-size", "5"))


def mortal(directory: Path, marker: Path):
    """The task of ``directory``, but the first worker that comes to its eighth batch is killed."""
    task = load_task(directory)
    make, calls = task.batch, iter(range(1000))

    def batch(examples):
        if next(calls) == 7 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return make(examples)

    task.batch = batch
    return task


@pytest.mark.ray
@pytest.mark.slow
def test_killed_worker_is_started_again(configure, ray_cluster, tmp_path):
    from ray import cloudpickle

    from fusionrec.training import worker

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see the tests
    config = configure("encoder", "--batch-size", "4", "--checkpoint-every", "4")
    settings, training = config.resolved()
    prepare(config, settings)
    examples = config.out / "examples"
    whole = worker.fit(partial(load_task, examples), training, tmp_path / "whole")
    marker = tmp_path / "killed"
    make = partial(mortal, examples, marker)
    broken = worker.fit(make, training, tmp_path / "broken", max_failures=1)
    assert marker.exists()
    assert broken.loss == whole.loss
    assert broken.weights_sha256 == whole.weights_sha256


@pytest.mark.ray
@pytest.mark.slow
def test_reranker_under_ray(configure, pipeline, ray_cluster):
    result = finetune(configure("reranker", "--pipeline", str(pipeline), "--max-steps", "3"))
    reranker = Reranker.load(pipeline / "reranker", device="cpu")
    (scores,) = reranker.score(["love (film)."], [["war in space", "the night"]])
    assert scores.shape == (2,)
    assert result.steps == 3


@pytest.mark.ray
@pytest.mark.slow
def test_non_finite_loss_reaches_the_driver(configure, ray_cluster):
    config = configure("encoder", "--batch-size", "4", "--learning-rate", "1e30")
    with pytest.raises(NonFiniteLoss, match="at step"):
        finetune(config)
    assert "The run stopped." in (config.out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", ["rating", "multi-task"])
def test_rating_report(configure, rated, tiny_encoder, tmp_path, capsys, task):
    flags = ("--objectives", "encoder,rating") if task == "multi-task" else ()
    config = configure(task, *flags).model_copy(update={"dataset": rated})
    prepare(config, config.resolved()[0])
    task = load_task(config.out / "examples")
    model = task.build_model()
    rater = model.of("rating") if flags else model
    torch.nn.init.zeros_(rater.classifier.weight)
    task.save(model, tmp_path / "model")
    use(config, tmp_path / "model")
    report = json.loads((config.out / "rating-errors.json").read_text())
    assert set(report) == {"validation", "test"}
    # Test is each user's last event, validation the one before.
    values = Dataset.open(rated).events.values.reshape(NUM_USERS, 8)
    for part, place in (("validation", -2), ("test", -1)):
        found = report[part]
        assert set(found) == {"model", "factors", "item-kNN", "biases", "user", "mean"}
        assert found["model"] == found["user"]  # its logit is 0 for everything
        mean = values[:, :place].mean()
        expected = (values[:, :place].sum(axis=1) + 5 * mean) / (8 + place + 5)
        error = values[:, place] - expected
        assert found["user"]["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
        assert found["mean"]["mae"] == pytest.approx(
            np.abs(values[:, place] - mean).mean(), rel=1e-5
        )
    assert capsys.readouterr().out.startswith("validation, model: MAE")


def test_torchrun(configure, tmp_path):
    """Two gloo workers without Ray."""
    config = configure("encoder")
    flags = ["--task", "encoder", "--dataset", str(config.dataset), "--out", str(tmp_path / "run")]
    flags += ["--encoder", config.encoder, "--batch-size", "4", "--num-threads", "1"]
    flags += ["--no-use-gpu", "--trackers", "tensorboard"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "jobs.finetune", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model:") == 1
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    check(page)
    for told in ("worker 1", "tokens/s", Dataset.open(config.dataset).info.fingerprint):
        assert told in page
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    found = read(tmp_path / "run")
    assert len(found.curves["loss"]) == result["steps"]
    assert found.curves["loss"][-1][1] == result["loss"]
    assert min(size for _, size in found.curves["memory_bytes/worker-1"]) > 0
    assert done.stdout.count("curves: tensorboard --logdir") == 1
    assert " of the CPUs of this machine; " in done.stderr
    assert Encoder.load(tmp_path / "run" / "model", device="cpu").dimension == 32
