"""What each objective was expected to take against what it took, with texts as long as allowed."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.training.config import TrainingConfig
from fusionrec.training.examples import Examples
from fusionrec.training.loads import load_of
from fusionrec.training.memory import estimate
from fusionrec.training.tasks import OBJECTIVES, save_task

NUM_ITEMS, NEGATIVES = 200, 3
DECODER = {"decoder": True}
CAUSAL = DECODER | {"task": "pretraining", "max_tokens": 96, "batch_size": 32}
MASKED = {"task": "pretraining", "max_tokens": 64, "batch_size": 48}
RATING = {"task": "rating", "max_tokens": 64, "batch_size": 48}
LISTS = {"max_tokens": 64, "batch_size": 12}
LORA = {"method": "lora"}
ALONE = {
    "encoder": {"task": "encoder", "max_tokens": 48, "batch_size": 32},
    "reranker": LISTS | {"task": "reranker"},
    "letters": DECODER | {"task": "decoder", "max_tokens": 192, "batch_size": 16},
    "causal": CAUSAL,
    "causal, lora": CAUSAL | LORA,
    "masked": MASKED,
    "masked, lora": MASKED | LORA,
    "rating": RATING,
    "rating, lora": RATING | LORA,
    "rating, layers again": RATING | {"activation_checkpointing": True},
    "distillation": LISTS | {"task": "distillation"},
    "distillation, encoder": LISTS | {"task": "distillation", "student": "encoder"},
}
TWO = {f"rating, {stage}": RATING | {"zero_stage": stage} for stage in (1, 2, 3)}
TWO |= {"causal, lora, 2": CAUSAL | LORA | {"zero_stage": 2}}
SMALL = {"batch_size": 2, "max_steps": 1}
FIRST = {"rating": RATING | SMALL, "causal": CAUSAL | LORA | SMALL}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_encoder, tiny_decoder):
    """{whether it is a decoder: folder of a model of some million parameters}."""
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"intermediate_size": 1024, "vocab_size": 8000, "max_position_embeddings": 256}
    found = {}
    with torch.random.fork_rng():
        for tiny, made in (
            (tiny_encoder, BertModel(BertConfig(**shape))),
            (tiny_decoder, LlamaForCausalLM(LlamaConfig(**shape))),
        ):
            folder = tmp_path_factory.mktemp("model") / "model"
            shutil.copytree(tiny, folder)
            made.save_pretrained(folder)
            found[tiny is tiny_decoder] = folder
    return found


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, models):
    """{variant: (folder of the task, its settings)}."""
    draw = np.random.default_rng(0)
    train = Histories.of([draw.permutation(NUM_ITEMS)[:8].tolist() for _ in range(100)])
    made = Examples.of(train, per_user=4, limit=999, generator=draw)
    drawn = draw.integers(0, NUM_ITEMS, (len(made), 20)).astype(np.int32)
    made = made.with_negatives(drawn, NEGATIVES)
    count = len(made)
    made = replace(
        made,
        ratings=draw.normal(size=count).astype(np.float32),
        expected=np.zeros(count, dtype=np.float32),
        scores=draw.normal(size=(count, 1 + NEGATIVES)).astype(np.float32),
    )
    found = {}
    for name, given in (ALONE | TWO | {f"first {n}": g for n, g in FIRST.items()}).items():
        kind = OBJECTIVES[given["task"]].settings
        # Texts little longer than allowed: a tokenizer keeps all that it cuts off, for a while.
        asked = given | {"history_items": 1, "encoder": str(models["decoder" in given])}
        settings = kind(**{k: v for k, v in asked.items() if k in kind.model_fields})
        folder = tmp_path_factory.mktemp("task")
        save_task(given["task"], settings, items(settings.max_tokens, draw), made, folder)
        found[name] = folder, settings
    return found


def items(words, draw):
    """A catalogue of titles of so many words."""
    known = ["the", "love", "war", "space", "night", "music", "book", "of"]
    return Catalogue(
        item_ids=tuple(map(str, range(NUM_ITEMS))),
        titles=tuple(" ".join(draw.choice(known, words)) for _ in range(NUM_ITEMS)),
        texts=("",) * NUM_ITEMS,
        categories=((),) * NUM_ITEMS,
        domains=("",) * NUM_ITEMS,
    )


@pytest.fixture(scope="module")
def measured(workers, tasks):
    """{variant: (estimated, measured) bytes}."""
    return peaks(workers, tasks, ALONE, 1) | peaks(workers, tasks, TWO, 2)


def peaks(workers, tasks, variants, count):
    def scenario(name, given):
        return {"task": {"folder": str(tasks[name][0])}, "config": config_of(given)}

    first = {name: scenario(f"first {name}", given) for name, given in FIRST.items()}
    asked = {name: scenario(name, given) for name, given in variants.items()}
    found = workers.peaks(first, asked, count)
    expected = {}
    for name, given in variants.items():
        settings, config = tasks[name][1], TrainingConfig(**config_of(given))
        load = load_of(given["task"], settings, config.batch_size, NEGATIVES)
        expected[name] = estimate(Path(settings.encoder), load, config, num_workers=count).peak
    return {name: (expected[name], found[name]) for name in variants}


def config_of(given):
    config = {"max_steps": 3, "checkpoint_every": 99, "num_threads": 1}
    return config | {k: v for k, v in given.items() if k in TrainingConfig.model_fields}


@pytest.mark.parametrize("variant", ALONE | TWO)
def test_estimate_is_within_20_percent_of_the_peak(measured, variant):
    expected, peak = measured[variant]
    assert expected == pytest.approx(peak, rel=0.2)
