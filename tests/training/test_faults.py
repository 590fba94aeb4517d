import os
import signal
import threading

import pytest

from fusionrec.training.faults import Spikes, StopSignal


def test_spike_is_far_above_the_losses_before():
    spikes = Spikes(sigmas=2)
    usual = [1.0, 1.1] * 5
    assert not any(spikes.add(loss) for loss in usual)
    assert not spikes.add(1.19)  # median 1.05, deviation 1.4826 · 0.05
    assert spikes.add(1.5)
    assert spikes.add(1.5)  # one spike makes none usual
    assert not spikes.add(0.1)


def test_no_spike_before_there_is_anything_usual():
    spikes = Spikes(sigmas=3)
    assert not any(spikes.add(loss) for loss in [1.0] * 9 + [100.0])


def test_rounding_is_no_spike():
    spikes = Spikes(sigmas=6)
    assert not any(spikes.add(2.0) for _ in range(20))
    assert not spikes.add(2.0 + 1e-6)


@pytest.fixture
def before():
    handler = signal.getsignal(signal.SIGTERM)
    yield handler
    assert signal.getsignal(signal.SIGTERM) == handler


def test_stop_signal_is_noted(before):
    with StopSignal() as stop:
        assert not stop.seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.seen


def test_other_threads_do_not_listen(before):
    def listen() -> None:
        with StopSignal() as stop:
            seen.append(stop.seen)

    seen: list[bool] = []
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [False]
