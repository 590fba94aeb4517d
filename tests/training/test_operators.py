"""Compiling with a builder that only notes what it finds."""

import threading

import deepspeed
import pytest
from deepspeed.accelerator import get_accelerator

from fusionrec.training.operators import load_operator


class Builder:
    NAME = name = "deepspeed_shm_comm"

    def __init__(self, folder):
        self.folder = folder
        self.alone = threading.Lock()
        self.loads = 0

    def load(self):
        """What torch does, but for the waiting."""
        assert self.alone.acquire(blocking=False), "two at a time"
        baton = self.folder / self.NAME / "lock"
        baton.touch(exist_ok=False)
        threading.Event().wait(0.02)
        baton.unlink()
        self.loads += 1
        self.alone.release()


@pytest.fixture
def builder(tmp_path, monkeypatch):
    made = Builder(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda _: made, raising=False)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, made.NAME, True)
    (tmp_path / made.NAME).mkdir()
    return made


def test_the_file_of_a_process_that_was_killed_is_not_waited_for(builder):
    (builder.folder / builder.NAME / "lock").touch()
    load_operator()
    assert builder.loads == 1


def test_one_at_a_time(builder):
    failures = []

    def load():
        try:
            load_operator()
        except (AssertionError, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert builder.loads == 4


def test_nothing_is_compiled_where_it_cannot_be(builder, monkeypatch):
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, builder.NAME, False)
    load_operator()
    assert builder.loads == 0
