"""Compiling with a builder that only notes what it finds."""

import threading
from pathlib import Path

import deepspeed
import pytest
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

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
        baton = self.folder / "lock"
        baton.touch(exist_ok=False)
        threading.Event().wait(0.02)
        baton.unlink()
        self.loads += 1
        self.alone.release()


@pytest.fixture(params=["TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"])
def builder(request, tmp_path, monkeypatch):
    """Told where to build, or not."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv(request.param, str(tmp_path))
    made = Builder(Path(cpp_extension._get_build_directory(Builder.NAME, verbose=False)))
    assert made.folder.is_relative_to(tmp_path)
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda _: made, raising=False)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, made.NAME, True)
    return made


def test_the_file_of_a_process_that_was_killed_is_not_waited_for(builder):
    (builder.folder / "lock").touch()
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
