"""Pieces leave the least padding there can be, and what is made of them is in order."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fusionrec.training import pieces
from fusionrec.training.examples import Examples
from fusionrec.training.objectives.reranker import RerankerSettings, RerankerTask
from fusionrec.training.tracking import count_tokens
from tests.training.test_tasks import CATALOGUE, TRAIN


@pytest.fixture
def tokenizer(tiny_encoder):
    return AutoTokenizer.from_pretrained(tiny_encoder)


def rows(lengths) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": [5 + at] * length, "attention_mask": [1] * length}
        for at, length in enumerate(lengths)
    ]


def test_no_other_cuts_leave_less_padding():
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 4):
        lengths = np.sort(generator.integers(1, 40, 9))
        ends = pieces._ends(lengths, count)
        assert len(ends) == count
        assert ends[-1] == 9

        def padded(ends, lengths=lengths):
            begins = [0, *ends[:-1]]
            return sum((e - b) * lengths[e - 1] for b, e in zip(begins, ends, strict=True))

        others = itertools.combinations(range(1, 9), count - 1)
        assert padded(ends) == min(padded([*other, 9]) for other in others)


def test_outputs_are_in_the_order_of_the_texts(tokenizer):
    lengths = [9, 2, 30, 3, 8, 2]
    batch = pieces.cut(tokenizer, rows(lengths), 6)
    assert count_tokens(batch) == sum(lengths)
    assert sum(t.numel() for n, t in batch.items() if n.endswith("input_ids")) < 6 * 30
    first = pieces.joined(lambda own: own["input_ids"][:, 0], batch)
    assert first.tolist() == [5, 6, 7, 8, 9, 10]
    length = pieces.joined(lambda own: own["attention_mask"].sum(dim=1), batch)
    assert length.tolist() == lengths


def test_there_are_as_many_pieces_for_every_worker(tokenizer):
    for at_least, lengths in ((2, [3, 4]), (2, [3] * 40), (9, [1, 5, 7] * 3)):
        batch = pieces.cut(tokenizer, rows(lengths), at_least)
        count = sum(name.endswith("input_ids") for name in batch)
        assert count == min(4, at_least)


def test_a_batch_in_pieces_has_the_loss_and_gradients_of_one(tiny_encoder, monkeypatch):
    made = Examples.of(TRAIN, per_user=2, limit=99, generator=np.random.default_rng(0))
    examples = made.with_negatives(np.tile(np.arange(6, dtype=np.int32), (len(made), 1)), 2)
    settings = RerankerSettings(encoder=str(tiny_encoder), max_tokens=32)
    found = []
    for count in (1, 4):
        monkeypatch.setattr(pieces, "_PIECES", count)
        task = RerankerTask(settings, CATALOGUE, examples)
        torch.manual_seed(0)
        model = task.build_model().eval()  # without dropout
        batch = task.batch(np.arange(6))
        assert f"pair.{count - 1}.input_ids" in batch
        loss = task.loss(model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for whole, cut in zip(*found, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)
