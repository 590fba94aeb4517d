import math

import pytest

from fusionrec.data.dataset import DatasetInfo
from fusionrec.training.curves import Attempt, History
from fusionrec.training.engine import TrainingResult
from fusionrec.training.memory import Estimate
from fusionrec.training.page import Told, html, write
from tests.pages.reading import check

DATASET = DatasetInfo(
    name="shop <&> co",
    format="table",
    fingerprint="f" * 64,
    num_interactions=1234,
    num_users=5,
    num_items=6,
)
ESTIMATE = Estimate(
    parameters=2_000,
    trained=1_500,
    weights=10**8,
    gradients=2 * 10**8,
    optimizer=3 * 10**8,
    host=0,
    activations=4 * 10**8,
    peak=8 * 10**8,
    checkpoint=5,
)
RESULT = TrainingResult(
    task="encoder",
    steps=40,
    examples=320,
    loss=0.125,
    skipped=1,
    spikes=2,
    seconds=16.0,
    peak_memory_bytes=7 * 10**8,
    weights_sha256="a" * 64,
    adapter_sha256="b" * 64,
    model="run/model",
    identity={"task": {"name": "encoder", "examples": "e" * 64}, "training": {}},
)
SETTINGS = {"learning_rate": 0.0003, "method": "lora"}


@pytest.fixture
def history() -> History:
    steps = range(1, 41)
    curves = {
        "loss": [(s, 3.0 / s if s != 7 else math.nan) for s in steps],
        "learning_rate": [(s, 1e-4 * s) for s in steps],
        "grad_norm": [(s, 1.0) for s in steps],
        "skipped": [(s, 0.0) for s in steps],
        "own scalar": [(s, float(s)) for s in steps],
        "examples_per_s": [(s, 20.0) for s in steps if s % 5 == 0],
    }
    for worker, size in enumerate((6 * 10**8, 7 * 10**8)):
        curves[f"memory_bytes/worker-{worker}"] = [(s, size + s) for s in (5, 10, 40)]
    return History([Attempt(0, 2, 1_800_000_000), Attempt(20, 2, 1_800_000_600)], curves)


@pytest.fixture
def told():
    def make(**changed) -> Told:
        known = {"task": "encoder", "dataset": DATASET, "settings": SETTINGS}
        return Told(**(known | {"estimate": ESTIMATE, "result": RESULT} | changed))

    return make


def test_the_page_is_whole_and_needs_no_other_host(history, told):
    text = html(history, told(), checkpoints=[("step-00000040", 123_000_000)])
    page = check(text)
    # The loss, the workers' memory, and each of the other four that ever was not 0.
    assert page.tags.count("svg") == 6
    assert "shop &lt;&amp;&gt; co" in text
    assert "shop <&> co" not in text


def test_it_says_what_a_reader_looks_for(history, told):
    text = html(history, told(), checkpoints=[("step-00000040", 123_000_000)])
    for expected in (
        "0.1250",  # the last loss
        "20.0</b>",  # examples/s over the run
        "own scalar",
        "steps left out so far",
        "learning rate",
        "worker 1",
        "0.70 GB",  # measured
        "0.80 GB",  # estimated
        "<td>0.88</td>",  # one to the other, of worker 1
        "1,500 of 2,000",
        "from step 20",
        "step-00000040",
        "0.12 GB",
        "a" * 64,
        "b" * 64,
        "e" * 64,
        "f" * 64,
        '<code>method</code></td><td class="left">lora</td>',
        "FusionRec ",
        "torch ",
    ):
        assert expected in text, expected


def test_a_run_that_stopped_says_why(history, told):
    text = html(
        history, told(result=None, stopped="the loss became nan <at> step 7"), checkpoints=[]
    )
    check(text)
    assert "The run stopped." in text
    assert "nan &lt;at&gt; step 7" in text
    assert "40 steps" in text


def test_a_run_without_a_step(told):
    check(html(History([Attempt(0, 1, 0)], {}), told(result=None), checkpoints=[]))


def test_many_workers_are_drawn_without_names(history, told):
    curves = {f"memory_bytes/worker-{w}": [(1, 1e9), (2, 2e9)] for w in range(64)}
    text = html(History(history.attempts, {"loss": [(1, 1.0)]} | curves), told(), checkpoints=[])
    assert text.count('class="line other"') == 64
    assert "worker 63<" not in text
    assert "<td>63</td>" in text


def test_nothing_is_left_where_nothing_began(tmp_path, told):
    assert write(tmp_path, told()) is None
    assert list(tmp_path.iterdir()) == []
