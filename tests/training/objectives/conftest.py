import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.training.examples import Examples

# All of whose words tiny_decoder knows.
WORDS = ["the love", "war in space", "night music", "book of the night", "film and love", "space"]


@pytest.fixture(scope="package")
def catalogue() -> Catalogue:
    return Catalogue(
        item_ids=tuple("abcdef"),
        titles=tuple(WORDS),
        texts=("",) * 6,
        categories=(("film",), ("film",), ("music",), ("book",), ("film",), ()),
        domains=("",) * 6,
    )


@pytest.fixture(scope="package")
def examples() -> Examples:
    """Eight examples of four users, each with two items that the user never had.

    The items are had 4, 2, 1, 2, 2 and 1 times.
    """
    train = Histories.of([[0, 1, 2], [3, 4, 0], [5, 0, 3], [1, 0, 4]])
    made = Examples.of(train, per_user=2, limit=99, generator=np.random.default_rng(0))
    return made.with_negatives(np.tile(np.arange(6, dtype=np.int32), (len(made), 1)), 2)


@pytest.fixture(scope="package")
def still_encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without dropout, whose losses have known answers."""
    folder = tmp_path_factory.mktemp("still") / "encoder"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
