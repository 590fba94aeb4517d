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

NUM_ITEMS, NEGATIVES = 60, 3
DECODER = {"decoder": True}
CAUSAL = DECODER | {"task": "pretraining", "max_tokens": 96, "batch_size": 8}
RATING = {"task": "rating", "max_tokens": 64, "batch_size": 16}
ALONE = {
    "encoder": {"task": "encoder", "max_tokens": 48, "batch_size": 16},
    "reranker": {"task": "reranker", "max_tokens": 64, "batch_size": 4},
    "letters": DECODER | {"task": "decoder", "max_tokens": 192, "batch_size": 6},
    "causal": CAUSAL,
    "causal, lora": CAUSAL | {"method": "lora"},
    "masked": {"task": "pretraining", "max_tokens": 64, "batch_size": 16},
    "masked, lora": {"task": "pretraining", "max_tokens": 64, "batch_size": 16, "method": "lora"},
    "rating": RATING,
    "rating, lora": RATING | {"method": "lora"},
    "rating, layers again": RATING | {"activation_checkpointing": True},
    "distillation": {"task": "distillation", "max_tokens": 48, "batch_size": 4},
}
TWO = {f"rating, {stage}": RATING | {"zero_stage": stage} for stage in (1, 2, 3)}
TWO |= {"causal, lora, 2": CAUSAL | {"method": "lora", "zero_stage": 2}}
# What libraries make once is in a process's first runs.
FIRST = {
    f"first of {name}": settings for name, settings in (("rating", RATING), ("causal", CAUSAL))
}
FIRST |= {f"{name}, lora": settings | {"method": "lora"} for name, settings in FIRST.items()}


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
    words = ["the", "love", "war", "space", "night", "music", "book", "of"]
    many = Catalogue(
        item_ids=tuple(map(str, range(NUM_ITEMS))),
        titles=tuple(" ".join(draw.choice(words, 200)) for _ in range(NUM_ITEMS)),
        texts=("",) * NUM_ITEMS,
        categories=((),) * NUM_ITEMS,
        domains=("",) * NUM_ITEMS,
    )
    train = Histories.of([draw.permutation(NUM_ITEMS)[:8].tolist() for _ in range(40)])
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
    for name, given in (FIRST | ALONE | TWO).items():
        kind = OBJECTIVES[given["task"]].settings
        encoder = str(models["decoder" in given])
        settings = kind(encoder=encoder, max_tokens=given["max_tokens"])
        folder = tmp_path_factory.mktemp("task")
        save_task(given["task"], settings, many, made, folder)
        found[name] = folder, settings
    return found


@pytest.fixture(scope="module")
def measured(workers, tasks):
    """{variant: (estimated, measured) bytes}."""
    return peaks(workers, tasks, FIRST | ALONE, 1) | peaks(workers, tasks, FIRST | TWO, 2)


def peaks(workers, tasks, variants, count):
    scenarios, estimates = [], []
    for name, given in variants.items():
        folder, settings = tasks[name]
        config = {"max_steps": 3, "checkpoint_every": 99, "num_threads": 1}
        config |= {k: v for k, v in given.items() if k in TrainingConfig.model_fields}
        directory = workers.directory / f"{count} {name}"
        task = {"folder": str(folder)}
        scenarios.append({"task": task, "config": config, "directory": str(directory)})
        load = load_of(given["task"], settings, config["batch_size"], NEGATIVES)
        training = TrainingConfig(**config)
        place = Path(settings.encoder)
        estimates.append(estimate(place, load, training, num_workers=count).peak)
    answers = workers.run(*scenarios, count=count)
    found = [answer["result"]["peak_memory_bytes"] for answer in answers]
    return dict(zip(variants, zip(estimates, found, strict=True), strict=True))


@pytest.mark.parametrize("variant", ALONE | TWO)
def test_estimate_is_within_20_percent_of_the_peak(measured, variant):
    expected, peak = measured[variant]
    assert expected == pytest.approx(peak, rel=0.2)
