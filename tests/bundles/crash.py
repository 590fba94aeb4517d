"""Publishes and promotes once per system call that changes the disk, and dies before that call.

Run as ``python crash.py BUNDLES PIPELINE``; prints one line ``N CURRENT`` per crash point, where
CURRENT is what the store holds in service afterwards, and ``done`` when a run got through.
"""

import os
import signal
import sys
from pathlib import Path

from fusionrec.bundles.store import BundleStore

CALLS = ("fsync", "rename", "replace", "symlink", "open", "chmod")


def dying(original, countdown: list[int]):
    def call(*args, **kwargs):
        countdown[0] -= 1
        if countdown[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return call


def main() -> None:
    store, pipeline = BundleStore(Path(sys.argv[1])), Path(sys.argv[2])
    for point in range(1000):
        child = os.fork()
        if child == 0:
            countdown = [point]
            for name in CALLS:
                setattr(os, name, dying(getattr(os, name), countdown))
            store.promote(store.add(pipeline).id, "crash test")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        current = store.current()
        store.verify(current.name)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print("done", current.name)
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        print(point, current.name)


main()
