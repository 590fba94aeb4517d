from contextlib import nullcontext

import pytest
import torch

from fusionrec.errors import NonFiniteLoss, Preempted
from fusionrec.training import tracking
from fusionrec.training.config import TrackerName, TrainingConfig
from fusionrec.training.peak import PeakMemory
from fusionrec.training.tracking import Meter, Report, count_tokens

SETTINGS = {"task.name": "toy", "training.seed": 3}
STEP = {"epoch": 0, "learning_rate": 0.1, "grad_norm": 1.0, "examples": 4, "tokens": 20}
STEP |= {"skipped": 0, "spikes": 0}


@pytest.fixture
def meter(tmp_path, monkeypatch):
    def make(*trackers: TrackerName, start: int = 0) -> Meter:
        config = TrainingConfig(trackers=trackers, report_every=2)
        return Meter(tmp_path, config, SETTINGS, PeakMemory(), start=start, total=4)

    monkeypatch.setattr(tracking.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(tracking.dist, "get_world_size", lambda: 1)
    return make


def test_reports_are_due_at_every_second_step(meter):
    with meter() as counted:
        reports = [counted.step(loss=float(step), **STEP) for step in range(4)]
    assert [report is not None for report in reports] == [False, True, False, True]
    last = reports[-1]
    assert (last.step, last.total, last.loss) == (4, 4, 3.0)
    assert last.tokens_per_s == pytest.approx(5 * last.examples_per_s)
    assert "tokens/s" in last.note
    assert len(last.memory_bytes) == 1
    assert Report.model_validate_json(last.model_dump_json()) == last
    skipped = last.model_copy(update={"loss": float("nan"), "skipped": 1})
    assert "1 left out" in Report.model_validate_json(skipped.model_dump_json()).note


class Broken:
    def __init__(self, *_):
        self.closed = False

    def log(self, *_):
        raise ConnectionError("server is down")

    def close(self, _):
        raise AssertionError("was dropped before")


def test_tracker_that_fails_is_dropped(meter, monkeypatch, capsys):
    monkeypatch.setitem(tracking._KINDS, TrackerName.WANDB, Broken)
    with meter(TrackerName.WANDB) as counted:
        assert counted.step(loss=1.0, **STEP) is None
        assert counted.step(loss=1.0, **STEP) is not None
    assert "tracker wandb is dropped: server is down" in capsys.readouterr().err


# Libraries of others, with warnings of their own.
@pytest.mark.filterwarnings("ignore")
def test_mlflow(meter, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for start in (0, 2):  # resumed half-way
        with meter(TrackerName.MLFLOW, start=start) as counted:
            for step in range(start, start + 2):
                counted.step(loss=float(step), **STEP)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = (tmp_path / "mlflow-run").read_text()
    history = [(m.step, m.value) for m in client.get_metric_history(run, "loss")]
    assert history == [(1, 0.0), (2, 1.0), (3, 2.0), (4, 3.0)]
    assert client.get_run(run).data.params["training.seed"] == "3"
    assert client.get_run(run).info.status == "FINISHED"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("error", "status"), [(NonFiniteLoss, "FAILED"), (Preempted, "KILLED"), (None, "FINISHED")]
)
def test_how_a_run_ended(meter, tmp_path, monkeypatch, error, status):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(error) if error else nullcontext(), meter(TrackerName.MLFLOW):
        run = client.get_run((tmp_path / "mlflow-run").read_text()).info
        assert run.status == "RUNNING"
        if error is not None:
            raise error("told")
    assert client.get_run(run.run_id).info.status == status
    with meter(TrackerName.MLFLOW):  # resumed
        assert client.get_run(run.run_id).info.status == "RUNNING"


def test_where_curves_are(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    look = [tracking.where(tracker, tmp_path) for tracker in TrackerName]
    assert look == [
        f"tensorboard --logdir {tmp_path}/tensorboard",
        f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db",
        f"wandb sync {tmp_path}/wandb/offline-run-*",
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://curves")
    assert tracking.where(TrackerName.MLFLOW, tmp_path) == "http://curves"


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(meter, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with meter(TrackerName.WANDB) as counted:
        for step in range(2):
            counted.step(loss=float(step), **STEP)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    assert b"training.seed" in log.read_bytes()


def test_tokens_of_a_batch():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert count_tokens({"input_ids": ids, "target": ids}) == 6
    both = {"history.input_ids": ids, "history.attention_mask": mask, "item.input_ids": ids}
    assert count_tokens(both) == 3 + 6
    assert count_tokens({"target": ids}) == 0


def test_settings_are_kept(meter, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with meter(TrackerName.TENSORBOARD) as counted:
        counted.step(loss=1.0, **STEP)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [1.0]
    (tag,) = events.Tags()["tensors"]
    (text,) = events.Tensors(tag)
    assert b"training.seed: 3" in text.tensor_proto.string_val[0]
