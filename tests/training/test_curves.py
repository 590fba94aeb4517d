import json
import math

import pytest

from fusionrec.training import curves
from fusionrec.training.curves import CURVES, Curves, read


@pytest.fixture(autouse=True)
def two_workers(monkeypatch):
    monkeypatch.setattr(curves.dist, "get_world_size", lambda: 2)


def log(directory, start, losses):
    tracker = Curves(directory, start, {})
    for step, loss in enumerate(losses, start + 1):
        tracker.log({"loss": loss}, step)
    tracker.close(None)


def test_what_was_logged_is_read(tmp_path):
    log(tmp_path, 0, [3.0, 2.5])
    found = read(tmp_path)
    assert found.curves == {"loss": [(1, 3.0), (2, 2.5)]}
    [attempt] = found.attempts
    assert (attempt.start, attempt.workers) == (0, 2)


def test_a_resumed_run_writes_steps_again(tmp_path):
    log(tmp_path, 0, [3.0, 2.5, 2.0, 1.5])
    log(tmp_path, 2, [9.0])  # from the checkpoint of step 2; what came after it never was
    found = read(tmp_path)
    assert found.curves == {"loss": [(1, 3.0), (2, 2.5), (3, 9.0)]}
    assert [attempt.start for attempt in found.attempts] == [0, 2]


def test_half_a_line_is_passed_over(tmp_path):
    log(tmp_path, 0, [3.0, 2.5])
    path = tmp_path / CURVES
    path.write_text(path.read_text()[:-5])
    log(tmp_path, 1, [2.0])
    assert read(tmp_path).curves == {"loss": [(1, 3.0), (2, 2.0)]}


def test_nan_comes_back(tmp_path):
    log(tmp_path, 0, [math.nan])
    [(step, loss)] = read(tmp_path).curves["loss"]
    assert (step, math.isnan(loss)) == (1, True)


def test_a_step_is_on_the_disk_when_it_is_logged(tmp_path):
    tracker = Curves(tmp_path, 0, {})
    tracker.log({"loss": 1.0}, 1)
    assert json.loads((tmp_path / CURVES).read_text().splitlines()[-1]) == {"step": 1, "loss": 1.0}
    tracker.close(None)


def test_a_run_that_never_began(tmp_path):
    assert read(tmp_path) == ([], {})
