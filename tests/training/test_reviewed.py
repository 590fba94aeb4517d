"""Reviews that are pretrained on: those of training events, and no others."""

import pyarrow.parquet as pq
import pytest

from fusionrec.data.dataset import Dataset
from fusionrec.data.splits import Protocol, split
from fusionrec.errors import ConfigError
from fusionrec.training.tasks import load_task
from jobs.finetune import prepare
from tests.training.tiny import NUM_USERS, write_dataset


@pytest.mark.parametrize("protocol", ["leave-one-out", "global-time"])
def test_only_reviews_of_training_events_are_pretrained_on(configure, tmp_path, protocol):
    texts = [f"user {event // 8} wrote {event}" for event in range(NUM_USERS * 8)]
    folder = write_dataset(tmp_path / "reviewed", None, texts)
    train = split(Dataset.open(folder), Protocol(protocol)).train
    # Event 8·u + n is the n-th of user u.
    seen = [8 * user + place for user, n in enumerate(train.lengths) for place in range(n)]
    assert 0 < len(seen) < len(texts)

    def reviews(*flags: str) -> list[str]:
        config = configure("pretraining", "--protocol", protocol, *flags)
        config = config.model_copy(update={"dataset": folder})
        prepare(config, config.resolved()[0])
        load_task(config.out / "examples")
        table = pq.read_table(config.out / "examples" / "pretraining-reviews.parquet")
        return table.column("text").to_pylist()

    assert sorted(reviews()) == sorted(texts[event] for event in seen)
    some = reviews("--max-examples", "5")
    assert len(set(some)) == 5
    assert set(some) <= {texts[event] for event in seen}
    read = load_task(tmp_path / "run" / "examples")
    config = configure("pretraining", "--no-reviews").model_copy(update={"dataset": folder})
    prepare(config, config.resolved()[0])
    assert load_task(config.out / "examples")._count < read._count


def test_reviews_that_are_not_there(configure):
    config = configure("pretraining", "--reviews")
    with pytest.raises(ConfigError, match="leave --reviews out"):
        prepare(config, config.resolved()[0])
