from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusionrec.language import inference
from fusionrec.language.encoder import Encoder
from fusionrec.language.inference import infer, pad
from fusionrec.language.precision import Precision
from fusionrec.language.tokens import tokenize

TEXTS = ["war", "a film of space and war in the night", "the book"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return Encoder.load(tiny_encoder, device="cpu")


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_as_transformers_pads_them(encoder: Encoder, side: str):
    tokenizer = encoder.tokenizer
    rows = tokenize(tokenizer, 32, TEXTS, ["love", "music", "a night"])
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        found, expected = pad(tokenizer, rows), tokenizer.pad(rows, return_tensors="pt")
    finally:
        tokenizer.padding_side = before
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert torch.equal(values, expected[name])
    assert 0 in found["attention_mask"]


def test_batches_on_a_cpu_hold_so_many_tokens(encoder: Encoder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inference, "_CPU_TOKENS", 16)
    lengths = (2, 20, 4, 4, 4, 4)
    rows = [{"input_ids": [5] * length, "attention_mask": [1] * length} for length in lengths]
    shapes = []

    def forward(inputs: Any) -> torch.Tensor:
        shapes.append(tuple(inputs["input_ids"].shape))
        return inputs["attention_mask"].sum(dim=1)

    found = infer(encoder.model, encoder.tokenizer, rows, forward, 8, Precision.FP32)
    assert shapes == [(1, 20), (3, 4), (2, 4)]  # the longest texts first, then equal parts
    np.testing.assert_array_equal(found, lengths)
