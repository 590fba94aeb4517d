import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.language.decoder import LETTERS
from fusionrec.training.examples import Examples

WORDS = ["the love", "war in space", "night music", "book of the night", "film and love", "space"]
PROMPT = "A user chose , newest first : Which of these came next ? Did this Answer Yes No"


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
    """Eight examples of four users, each with two items that the user never had."""
    train = Histories.of([[0, 1, 2], [3, 4, 5], [5, 0, 3], [1, 2, 4]])
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
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random two-layer Llama (32 wide) that knows the words of the tests."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    words = sorted(
        {*" ".join([*WORDS, PROMPT]).split(), *LETTERS, *".,;()", "film", "music", "book"}
    )
    vocabulary = {word: code for code, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("tiny-decoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder
