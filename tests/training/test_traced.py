"""What is traced: of real tensors with known sizes."""

import torch

from fusionrec.training.heap import Event
from fusionrec.training.traced import LiveBytes


def test_live_bytes():
    with LiveBytes() as live:
        a = torch.ones(250)
        b = a * 2
        view = b[:10]
        assert live.live == live.peak == 2000
        del a
        assert (live.live, live.peak) == (1000, 2000)
        del b
        assert live.live == 1000  # the view holds it
        del view
        assert live.live == 0


def test_events_are_in_their_order():
    weights = torch.ones(250, requires_grad=True)
    with LiveBytes(weights) as live:
        made = weights * 2
        with torch.no_grad():
            torch.zeros(100)
        del made
    assert live.events == [
        *(Event(None), Event(1, 1000)),  # an operator that a backward pass will need
        *(Event(2, 400), Event(2)),
        Event(1),
    ]
