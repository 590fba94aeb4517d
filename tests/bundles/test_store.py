import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fusionrec.bundles import store as store_module
from fusionrec.bundles.store import BundleStore
from fusionrec.errors import BundleCorrupt, BundleError

CRASH = Path(__file__).with_name("crash.py")


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "bundles")


def publish(store: BundleStore, pipeline: Path) -> str:
    bundle_id = store.add(pipeline).id
    store.promote(bundle_id, "test")
    return bundle_id


def leftovers(store: BundleStore) -> list[Path]:
    return list(store.directory.glob(".new-*"))


def test_publish_puts_in_service(store: BundleStore, pipeline: Path):
    bundle_id = publish(store, pipeline)
    assert store.current() == store.directory / bundle_id
    assert (store.directory / "current").resolve() == store.current().resolve()
    assert store.verify(bundle_id).id == bundle_id
    assert (store.current() / "fusion.json").read_bytes() == (pipeline / "fusion.json").read_bytes()
    assert not leftovers(store)


def test_the_same_content_has_the_same_id_wherever_it_lies(
    store: BundleStore, pipeline: Path, other_pipeline: Path, tmp_path: Path
):
    first = publish(store, pipeline)
    publish(store, other_pipeline)
    elsewhere = Path(shutil.copytree(pipeline, tmp_path / "elsewhere"))
    os.utime(elsewhere / "fusion.json", (0, 0))
    assert publish(store, elsewhere) == first
    assert BundleStore(tmp_path / "second").add(elsewhere).id == first


def test_leftovers_of_a_killed_job_are_not_published(store: BundleStore, pipeline: Path):
    clean = store.add(pipeline).id
    (pipeline / ".encoder.partial").mkdir()
    (pipeline / ".encoder.partial" / "model.safetensors").write_bytes(b"half")
    (pipeline / "sources" / ".vectors.npy.partial").write_bytes(b"half")
    assert store.add(pipeline).id == clean


def test_a_bundle_does_not_follow_its_pipeline(store: BundleStore, pipeline: Path):
    bundle_id = publish(store, pipeline)
    with (pipeline / "fusion.json").open("r+") as file:  # in place, as np.save would
        file.write("{}   ")
    store.verify(bundle_id)


def test_add_alone_changes_nothing_in_service(
    store: BundleStore, pipeline: Path, other_pipeline: Path
):
    first = publish(store, pipeline)
    store.add(other_pipeline)
    assert store.current_id() == first


def test_rollback_goes_back_one_at_a_time(store: BundleStore, pipeline: Path, other_pipeline: Path):
    first, second = publish(store, pipeline), publish(store, other_pipeline)
    assert [p.parent for p in store.history()] == [None, first]
    assert first != second
    assert store.rollback() == first
    assert store.current_id() == first
    store.verify(second)  # stays, to be promoted again
    with pytest.raises(BundleError, match="no bundle before"):
        store.rollback()


def test_rollback_to_a_damaged_bundle_is_refused(
    store: BundleStore, pipeline: Path, other_pipeline: Path
):
    first, second = publish(store, pipeline), publish(store, other_pipeline)
    (store.path(first) / "fusion.json").unlink()
    with pytest.raises(BundleCorrupt, match=r"fusion.json"):
        store.rollback()
    assert store.current_id() == second


def test_a_damaged_bundle_is_not_promoted_and_publishing_again_mends_it(
    store: BundleStore, pipeline: Path, other_pipeline: Path
):
    first = publish(store, pipeline)
    second = store.add(other_pipeline).id
    (store.path(second) / "fusion.json").unlink()
    with pytest.raises(BundleCorrupt):
        store.promote(second, "test")
    assert store.current_id() == first
    assert publish(store, other_pipeline) == second
    store.verify(second)


def test_promoting_twice_is_one_promotion(store: BundleStore, pipeline: Path):
    publish(store, pipeline)
    publish(store, pipeline)
    assert len(store.history()) == 1


def test_history_lost_after_the_swap_is_found_again(
    store: BundleStore, pipeline: Path, other_pipeline: Path
):
    first = publish(store, pipeline)
    before = (store.directory / "history.json").read_bytes()
    second = publish(store, other_pipeline)
    (store.directory / "history.json").write_bytes(before)
    assert [p.bundle for p in store.history()] == [first, second]
    assert store.rollback() == first


def test_nothing_published(store: BundleStore):
    with pytest.raises(BundleError, match="no current bundle; publish one"):
        store.current()


def test_not_a_pipeline(store: BundleStore, tmp_path: Path):
    with pytest.raises(BundleError, match=r"pipeline.json cannot be read"):
        store.add(tmp_path)
    (tmp_path / "pipeline.json").write_text("[1")
    with pytest.raises(BundleError, match=r"pipeline.json is not JSON"):
        store.add(tmp_path)
    (tmp_path / "pipeline.json").write_text("[1]")
    with pytest.raises(BundleError, match="must hold a JSON object"):
        store.add(tmp_path)


def test_a_link_in_the_pipeline_is_refused(store: BundleStore, pipeline: Path):
    (pipeline / "link").symlink_to("/etc/passwd")
    with pytest.raises(BundleError, match="link is not a plain file"):
        store.add(pipeline)


def test_sigkill_anywhere_leaves_a_whole_bundle_current(
    store: BundleStore, pipeline: Path, other_pipeline: Path
):
    first = publish(store, pipeline)
    command = [sys.executable, str(CRASH), str(store.directory), str(other_pipeline)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    *crashes, done = output.splitlines()
    assert len(crashes) > 15
    second = done.removeprefix("done ")
    seen = [line.split()[1] for line in crashes]
    swapped = seen.index(second)
    assert seen == [first] * swapped + [second] * (len(seen) - swapped)
    assert 0 < swapped < len(seen)
    assert store.rollback() == first
    store.add(pipeline)
    assert not leftovers(store)


@pytest.mark.parametrize("call", range(6))
def test_an_error_anywhere_leaves_no_trace(
    store: BundleStore,
    pipeline: Path,
    other_pipeline: Path,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
):
    first = publish(store, pipeline)
    calls = 0
    original = store_module._flush

    def full(file):
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file)

    monkeypatch.setattr(store_module, "_flush", full)
    with pytest.raises(BundleError, match=r"No space left on device.*current bundle stays"):
        publish(store, other_pipeline)
    assert store.current_id() == first
    assert not leftovers(store)
    monkeypatch.undo()
    second = publish(store, other_pipeline)
    assert store.current_id() == second


def test_a_disk_that_is_too_small_is_said_before_copying(
    store: BundleStore, pipeline: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(pipeline)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BundleError, match=r"bytes are needed, 1,000 are free"):
        store.add(pipeline)
    assert not leftovers(store)


def test_a_write_that_the_system_refuses(store: BundleStore, pipeline: Path, other_pipeline: Path):
    first = publish(store, pipeline)
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from fusionrec.bundles.store import BundleStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "BundleStore(Path(sys.argv[1])).add(Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(store.directory), str(other_pipeline)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "BundleError" in result.stderr
    assert "File too large" in result.stderr
    assert store.current_id() == first
    assert not leftovers(store)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_publishers_take_turns(store: BundleStore, pipeline: Path, other_pipeline: Path):
    errors: list[Exception] = []

    def work(directory: Path) -> None:
        try:
            for _ in range(5):
                publish(store, directory)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(p,)) for p in (pipeline, other_pipeline) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store.verify(store.current().name)
    assert not leftovers(store)
