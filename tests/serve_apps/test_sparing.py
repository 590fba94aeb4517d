import logging
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from serve_apps import sparing
from serve_apps.sparing import Sparing


def test_the_same_thing_of_the_same_subject_is_said_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [100.0]
    monkeypatch.setattr(sparing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    logger = create_autospec(logging.Logger, instance=True)
    log = Sparing(logger, every_s=10)
    for stage in ("embed", "embed", "rerank", "embed"):
        log.warning("%s failed: %r", stage, 1)
    log.warning("%s is back", "embed")
    now[0] += 10
    log.warning("%s failed: %r", "embed", 2)
    now[0] += 10
    log.warning("%s failed: %r", "embed", 3)
    said = [call.args[0] % call.args[1:] for call in logger.warning.call_args_list]
    assert said == [
        "embed failed: 1",
        "rerank failed: 1",
        "embed is back",
        "embed failed: 2 (2 times more since the last line)",
        "embed failed: 3",
    ]
