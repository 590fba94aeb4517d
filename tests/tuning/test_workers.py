"""How many trials fit a cluster, and what is said where none would ever start."""

import time
from functools import partial

import pytest

from fusionrec.errors import ConfigError
from tuning.workers import Room, Runs, room, room_on


def nodes(*resources):
    """As Ray tells of them; the last one is gone."""
    found = [{"Alive": True, "Resources": each} for each in resources]
    return [*found, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]


LAPTOP = nodes({"CPU": 2.0, "memory": 4e9})
UNEVEN = nodes({"CPU": 5.0}, {"CPU": 3.0}, {"CPU": 1.0}, {"memory": 1e9})
GPUS = nodes({"CPU": 16.0, "GPU": 4.0}, {"CPU": 3.0, "GPU": 2.0}, {"CPU": 32.0})


@pytest.mark.parametrize(
    ("cluster", "asked", "expected"),
    [
        (LAPTOP, (1,), Room(cpus=2, trials=1)),
        (LAPTOP, (1, 1), Room(cpus=1, trials=2)),
        (LAPTOP, (2,), Room(cpus=1, trials=1)),
        (nodes({"CPU": 1.0}), (1,), Room(cpus=1, trials=1)),
        (UNEVEN, (1, 2), Room(cpus=2, trials=3)),
        (UNEVEN, (2, 2), Room(cpus=2, trials=1)),
        (UNEVEN, (1, 2, 2), Room(cpus=2, trials=2)),
        (UNEVEN, (3, 1, 50), Room(cpus=1, trials=3)),
        (GPUS, (1,), Room(cpus=2, trials=5)),
        (GPUS, (1, 1), Room(cpus=1, trials=6)),
        (GPUS, (2, 8), Room(cpus=8, trials=1)),
    ],
)
def test_as_many_trials_as_have_room(cluster, asked, expected):
    assert room_on(cluster, *asked) == expected


@pytest.mark.parametrize(
    ("cluster", "asked", "message"),
    [
        (
            LAPTOP,
            (2, 2),
            r"num_workers = 2 with cpus = 2 each would never start on this cluster, which has room "
            r"for 1 such workers: set num_workers to 1 with cpus = 2, or cpus to 1$",
        ),
        (LAPTOP, (1, 8), r"room for 0 such workers: set num_workers to 1 with cpus = 2, or cpus"),
        (LAPTOP, (3,), r"room for 2 such workers: set num_workers to 2 with cpus = 1$"),
        (GPUS, (8,), r"cpus = 1, and a GPU, each .* room for 6 such .* set num_workers to 6 "),
        (nodes({"memory": 1e9}), (1,), r"room for 0 such workers: give it CPUs$"),
    ],
)
def test_a_trial_that_would_never_start_is_refused(cluster, asked, message):
    with pytest.raises(ConfigError, match=message) as found:
        room_on(cluster, *asked)
    assert "\n" not in str(found.value)


def test_runs_say_what_they_measured_and_end_when_they_are_told():
    runs = Runs()

    def fit(name):
        runs.say(name, (1, 0.5))
        while not runs.stopped(name):
            time.sleep(0)

    def broken():
        raise ConfigError("no such model")

    for name in ("a", "b"):
        runs.start(name, partial(fit, name))
        assert runs.hear(name) == (1, 0.5)
    runs.stop("a")
    runs.stop("a")
    assert runs.hear("a") is None
    assert not runs.stopped("b")
    runs.start("c", broken)
    assert str(runs.hear("c")) == "no such model"
    runs.close()
    assert runs.hear("b") is None


@pytest.mark.ray
def test_the_cluster_is_that_of_this_process(ray_cluster):
    assert room(1, 2) == Room(cpus=2, trials=2)
    with pytest.raises(ConfigError, match="room for 4 such workers"):
        room(5, 1)
