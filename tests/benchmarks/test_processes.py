"""What the CPU of a system is put down to."""

import os

import pytest

from benchmarks.harness.processes import Running, kind_of


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["ray::ServeReplica:recommend:Retriever"], "Retriever"),
        (["ray::ServeController"], "ServeController"),
        (["ray::IDLE", "", ""], "IDLE"),
        (["/usr/lib/ray/raylet", "--static_resource_list"], "raylet"),
        (["/usr/bin/python3", "-u", "/usr/lib/ray/log_monitor.py", "--port=1"], "log_monitor.py"),
        (["python", "-m", "serve_apps.run", "--port", "80"], "serve_apps.run"),
        (["python"], "python"),
        ([], "ended"),
    ],
)
def test_a_process_is_named_by_what_it_does(words, kind):
    assert kind_of(words) == kind


def test_the_cpu_of_this_process_is_found():
    running = Running("http://127.0.0.1:1", os.getpid())
    before = sum(running.cpu_s().values())
    while sum(running.cpu_s().values()) < before + 0.05:
        sum(range(10_000))
