"""What the CPU of a system is put down to."""

import os

import pytest

from benchmarks.harness.processes import ENDED, Running, kind_of, spent


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["ray::ServeReplica:recommend:Retriever"], "Retriever"),
        (["ray::ServeController.listen_for_change"], "ServeController"),
        (["ray::IDLE", "", ""], "IDLE"),
        (["/usr/lib/ray/raylet", "--static_resource_list"], "raylet"),
        (["/usr/bin/python3", "-u", "/usr/lib/ray/log_monitor.py", "--port=1"], "log_monitor.py"),
        (["python", "-m", "serve_apps.run", "--port", "80"], "serve_apps.run"),
        (["python"], "python"),
        (["ray::ServeReplica:recommend:Gateway.handle_request"], "Gateway"),
        ([], ENDED),
    ],
)
def test_a_process_is_named_by_what_it_does(words, kind):
    assert kind_of(words) == kind


def test_the_cpu_of_this_process_is_found():
    running = Running("http://127.0.0.1:1", os.getpid())
    before = running.cpu()
    while sum(spent(before, running.cpu()).values()) < 0.05:
        sum(range(10_000))


def test_what_was_spent_is_put_down_to_processes_under_their_newest_name():
    before = {(1, 0.0): ("driver", 5.0), (2, 0.0): ("IDLE", 3.0), (3, 0.0): ("probe", 2.0)}
    after = {(1, 0.0): ("driver", 8.0), (2, 0.0): ("Gateway", 4.0), (3, 9.0): ("raylet", 1.0)}
    found = spent(before, after)  # the probe took half a second more, and its parent waited for it
    assert found == {"driver": 3.0, "Gateway": 1.0, "raylet": 1.0, ENDED: -2.0}
