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


@pytest.fixture(scope="package")
def wide(still_encoder, tiny_decoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models with layers of more than 10,000 weights, which ZeRO 3 shards in every step."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    folders = {}
    for kind, source in (("encoder", still_encoder), ("decoder", tiny_decoder)):
        folders[kind] = tmp_path_factory.mktemp("wide") / kind
        shutil.copytree(source, folders[kind])
        config = json.loads((source / "config.json").read_text())
        config |= {"hidden_size": 128, "intermediate_size": 128}
        config |= {"head_dim": 64} if "head_dim" in config else {}
        (folders[kind] / "config.json").write_text(json.dumps(config))
        made = AutoModel if kind == "encoder" else AutoModelForCausalLM
        with torch.random.fork_rng():
            torch.manual_seed(7)
            made.from_config(AutoConfig.from_pretrained(folders[kind])).save_pretrained(
                folders[kind]
            )
    return folders
