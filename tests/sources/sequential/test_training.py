import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.epochs import Training
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.sources.sequential.training import SequentialLearner

TINY = SASRecConfig(width=8, num_heads=1, num_blocks=1, dropout=0, epochs=9, patience=2)


def training(rows, times=None, has_timestamps=True, num_items=30):
    empty = ("",) * num_items
    ids = tuple(map(str, range(num_items)))
    catalogue = Catalogue(ids, empty, empty, ((),) * num_items, empty)
    return TrainingData(catalogue, Histories.of(rows, times), has_timestamps)


def course(data, **changes):
    config = TINY.model_copy(update=changes)
    return Training(SequentialLearner(data, config), config)


def test_asking_on_the_way_changes_nothing():
    data = training([[1, 2, 3, 4], [2, 3, 4, 5]] * 20)
    asked, alone = course(data), course(data)
    for _ in range(3):
        asked.epoch()
        asked.learned()
        alone.epoch()
    assert asked.epochs == alone.epochs
    np.testing.assert_array_equal(asked.learned().vectors, alone.learned().vectors)


def test_the_loss_falls_to_what_is_left_to_chance():
    # After 0 comes 1 or 2 as often, after 1 and 2 comes 3: ln 2 for half of the questions.
    data = training([[0, 1, 3], [0, 2, 3]] * 40, num_items=4)
    slow = course(data, learning_rate=0.1, held_out=1e-9, epochs=40)
    while not slow.done:
        slow.epoch()
    assert len(slow.epochs) == 40  # nothing is held out that could end it
    assert slow.epochs[-1].loss == pytest.approx(np.log(2) / 2, abs=0.05)


def test_the_mean_of_what_was_learned_is_kept():
    data = training([[1, 2, 3, 4], [2, 3, 4, 5]] * 20)  # one batch an epoch
    last, mean = (course(data, held_out=1e-9, averaging=past, epochs=4) for past in (0, 0.2))
    expected = SequentialLearner(data, TINY).model.items.free.weight.detach().numpy()
    warm = [1, 2, 3, 4, 5]
    for past in (1 / 10, 2 / 11, 0.2, 0.2):
        last.epoch()
        mean.epoch()
        expected = past * expected + (1 - past) * last.learned().vectors
    np.testing.assert_allclose(mean.learned().vectors[warm], expected[warm], atol=1e-6)


def test_the_mean_shares_the_texts():
    data = training([[1, 2, 3, 4], [2, 3, 4, 5]] * 20)
    texts = np.random.default_rng(0).standard_normal((30, 12)).astype(np.float32)
    learner = SequentialLearner(replace(data, item_vectors=texts), TINY)
    assert learner.model.items._texts is texts
    assert learner.model.items.free.weight is not learner._learning.items.free.weight


RANK = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.epochs import Training
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.config import SASRecConfig
from fusionrec.sources.sequential.training import SequentialLearner

rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
given = json.loads((folder / "given.json").read_text())
config = SASRecConfig(**given["config"])
empty = ("",) * 30
catalogue = Catalogue(tuple(map(str, range(30))), empty, empty, ((),) * 30, empty)
data = TrainingData(catalogue, Histories.of(given["rows"]))
course = Training(SequentialLearner(data, config), config)
while not course.done:
    course.epoch()
found = {
    "epochs": [[epoch.loss, epoch.ndcg] for epoch in course.epochs],
    "vectors": course.learned().vectors.tolist(),
}
(folder / f"found-{rank}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


def test_two_ranks_learn_what_one_process_does(tmp_path):
    generator = np.random.default_rng(0)
    rows = [list(range(start, start + 6)) for start in generator.integers(0, 20, 101).tolist()]
    rows.append(list(range(30)))  # alone in its batch: one of the ranks has no share in it
    config = TINY.model_copy(update={"epochs": 2, "num_negatives": 16, "batch_events": 40})
    given = {"config": config.model_dump(mode="json"), "rows": rows}
    (tmp_path / "given.json").write_text(json.dumps(given))
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), "2", str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    alone = course(training(rows), **config.model_dump())
    alone.epoch(), alone.epoch()
    first, second = (json.loads((tmp_path / f"found-{n}.json").read_text()) for n in range(2))
    assert first == second
    expected = [[epoch.loss, epoch.ndcg] for epoch in alone.epochs]
    assert first["epochs"] == [pytest.approx(epoch, rel=1e-4) for epoch in expected]
    np.testing.assert_allclose(first["vectors"], alone.learned().vectors, atol=1e-4)
