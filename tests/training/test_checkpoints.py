"""Checkpoints are committed behind training; one worker here, several in test_engine."""

import threading
from contextlib import closing
from functools import partial

import pytest
import torch.distributed as dist

from fusionrec.errors import CheckpointNotWritten
from fusionrec.training import checkpoints
from fusionrec.training.checkpoints import Checkpoints

IDENTITY = {"task": {}, "training": {}}


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[False, True], ids=["in place", "staged"])
def saving(request, tmp_path):
    staging = tmp_path / "own disk" if request.param else None
    with closing(Checkpoints(tmp_path / "run", keep=2, staging=staging)) as made:
        yield made
    if staging is not None:
        assert list(staging.iterdir()) == []


@pytest.fixture
def slow(monkeypatch):
    """Hashing waits for this event."""
    event = threading.Event()
    real = checkpoints.sha256_of
    monkeypatch.setattr(checkpoints, "sha256_of", lambda path: (event.wait(30), real(path))[1])
    yield event
    event.set()


def write(text, directory):
    (directory / "deepspeed").mkdir()
    (directory / "deepspeed" / "shard.pt").write_text(text)


def committed(saving):
    return sorted(path.name for path in saving.directory.glob("step-*"))


def test_training_goes_on_while_a_checkpoint_is_committed(saving, slow):
    saving.save(1, IDENTITY, partial(write, "one"))
    assert committed(saving) == []
    second = threading.Thread(target=saving.save, args=(2, IDENTITY, partial(write, "two")))
    second.start()
    second.join(0.1)
    assert second.is_alive()  # one at a time
    assert not list(saving.directory.glob(".step-00000002"))
    slow.set()
    second.join()
    saving.wait()
    assert committed(saving) == ["step-00000001", "step-00000002"]
    found = saving.newest()
    assert (found.directory / "deepspeed" / "shard.pt").read_text() == "two"
    assert (found.manifest.step, found.manifest.world_size) == (2, 1)
    assert set(found.manifest.files) == {"deepspeed/shard.pt"}


def test_a_checkpoint_that_cannot_be_committed_is_told_later(saving, monkeypatch):
    saving.save(1, IDENTITY, partial(write, "one"))
    saving.wait()

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "sha256_of", full)
    saving.save(2, IDENTITY, partial(write, "two"))
    with pytest.raises(
        CheckpointNotWritten, match=r"step-00000002 .* No space left on device"
    ) as told:
        saving.save(3, IDENTITY, partial(write, "three"))
    assert ("own disk on each" in str(told.value)) == (saving._staging is not None)
    assert not saving.failed  # it was told
    monkeypatch.undo()
    assert [path.name for path in saving.directory.iterdir()] == ["step-00000001"]
    assert saving.newest().manifest.step == 1


def test_the_last_one_is_committed_at_the_end(tmp_path, slow):
    with closing(Checkpoints(tmp_path, keep=1)) as saving:
        for step in (1, 2):
            saving.save(step, IDENTITY, partial(write, "shard"))
            slow.set()
    assert committed(saving) == ["step-00000002"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_is_not_kept_in_place_of_a_sound_one(tmp_path, keep):
    with closing(Checkpoints(tmp_path, keep=keep)) as saving:
        for step in (4, 12):
            saving.save(step, IDENTITY, partial(write, "shard"))
            saving.wait()
        (tmp_path / "step-00000012" / "deepspeed" / "shard.pt").write_text("other")
        before = saving.newest()
        assert (before and before.manifest.step) == (None if keep == 1 else 4)
        assert (tmp_path / ".step-00000012.passed-over").is_dir()
        for step in (4, 8):  # as a run that begins anew, or goes on from step 4
            if before is None or step > 4:
                saving.save(step, IDENTITY, partial(write, "shard"))
                saving.wait()
        assert saving.newest().manifest.step == 8
    assert committed(saving) == ["step-00000004", "step-00000008"][-keep:]
    assert not list(tmp_path.glob(".*"))
