"""Disks of a run: what is there already, and what is staged elsewhere."""

import shutil
from types import SimpleNamespace

import pytest

from fusionrec.errors import TrainingError
from fusionrec.training import room
from fusionrec.training.config import TrainingConfig

CHECKPOINT, PARAMETERS = 1000, 25
RESULTS = 2 * 4 * PARAMETERS


@pytest.fixture
def enough(monkeypatch, tmp_path):
    """Whether a disk with so much free is enough."""

    def ask(free: int, share_here: float = 1.0, **settings) -> bool:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        need = SimpleNamespace(checkpoint=CHECKPOINT, parameters=PARAMETERS)
        refused = []
        try:
            room.check(need, TrainingConfig(**settings), tmp_path / "run", share_here=share_here)
        except TrainingError as error:
            refused.append(str(error))
        return not refused

    return ask


def leave(folder, size):
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(bytes(size))


def test_first_attempt(enough):
    assert enough(3 * CHECKPOINT + RESULTS)
    assert not enough(3 * CHECKPOINT + RESULTS - 1)
    assert enough(2 * CHECKPOINT + RESULTS, keep_checkpoints=1)


def test_what_is_kept_already_is_not_asked_for_again(enough, tmp_path):
    saved = tmp_path / "run" / "checkpoints"
    for name in ("step-00000004", "step-00000008"):
        leave(saved / name, CHECKPOINT)
    assert enough(CHECKPOINT + RESULTS)
    assert not enough(CHECKPOINT + RESULTS - 1)
    # They are removed only after a new one is whole.
    assert not enough(CHECKPOINT + RESULTS - 1, keep_checkpoints=1)
    leave(saved / ".step-00000012", 700)  # given up when the disk was full: removed first
    assert enough(300 + RESULTS)


def test_staging_has_a_disk_of_its_own(enough, monkeypatch, tmp_path):
    staging = tmp_path / "own" / "staging"
    # On the same disk both are there at once.
    assert not enough(3 * CHECKPOINT + RESULTS, checkpoint_staging=staging)
    assert enough(3 * CHECKPOINT + RESULTS + 500, 0.5, checkpoint_staging=staging)
    assert enough(3 * CHECKPOINT + RESULTS, 0.0, checkpoint_staging=staging)


def test_refusal_names_the_disk(monkeypatch, tmp_path):
    need = SimpleNamespace(checkpoint=10**9, parameters=PARAMETERS)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**8))
    with pytest.raises(TrainingError, match=r"run needs about 3.00 GB more .* has 0.10 GB free"):
        room.check(need, TrainingConfig(), tmp_path / "run", share_here=1)
