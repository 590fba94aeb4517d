"""Every runtime that is measured computes the same model, within what its precision loses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.harness import runtimes
from benchmarks.harness.runtimes import (
    Inputs,
    WholeEncoder,
    exported_runtimes,
    gpu_runtimes,
    missing_packages,
    torch_runtimes,
)
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from fusionrec.language.tokens import tokenize

TEXTS = ["love and war in space", "a night of music", "the book"]


@pytest.fixture(scope="module")
def make(tiny_encoder: Path) -> Callable[[], torch.nn.Module]:
    def fresh() -> torch.nn.Module:
        encoder = Encoder.load(tiny_encoder, device="cpu")
        return WholeEncoder(encoder.model, encoder.config.pooling).eval()

    return fresh


@pytest.fixture(scope="module")
def inputs(tiny_encoder: Path) -> Inputs:
    return Encoder.load(tiny_encoder, device="cpu").inputs(TEXTS)


def _least_cosine(found: np.ndarray, exact: np.ndarray) -> float:
    return float((found * exact).sum(axis=1).min())


def test_runtimes_of_torch(make, inputs):
    """But compiled ones, which need a compiler and a minute."""
    prepared = torch_runtimes(make, [inputs])
    exact = prepared.pop("torch fp32")()(inputs)
    np.testing.assert_allclose(np.linalg.norm(exact, axis=1), 1, rtol=1e-5)
    names = [name for name in prepared if "compile" not in name]
    assert names == [
        *("torch bf16", "torch bf16, packed"),
        *("torch int8, dynamic", "torch int8, peaks known"),
    ]
    for name in names:
        assert _least_cosine(prepared[name]()(inputs), exact) > 0.98, name


def test_runtimes_of_a_gpu(tiny_encoder):
    """On the CPU, which captures nothing."""
    encoder = Encoder.load(tiny_encoder, device="cpu")
    rows = tokenize(encoder.tokenizer, 64, TEXTS)
    exact = encoder.run(rows)
    prepared = gpu_runtimes(partial(Encoder.load, tiny_encoder), 2, "cpu")
    assert list(prepared) == ["GPU bf16", "GPU bf16 graphs"]
    for prepare in prepared.values():
        assert _least_cosine(prepare()(rows), exact) > 0.98
    pairs = tokenize(encoder.tokenizer, 64, TEXTS, TEXTS)
    for prepare in gpu_runtimes(partial(Reranker.load, tiny_encoder), 2, "cpu").values():
        assert prepare()(pairs).shape == (len(TEXTS), 1)


@pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
def test_exported_runtimes(make, inputs, tmp_path):
    exact = torch_runtimes(make, [])["torch fp32"]()(inputs)
    prepared = exported_runtimes(make, [inputs], tmp_path, threads=1)
    assert len(prepared) == 6
    for name, prepare in prepared.items():
        found = prepare()(inputs)
        assert found.shape == exact.shape, name
        assert _least_cosine(found, exact) > (0.99999 if "fp32" in name else 0.97), name
    shorter = {name: tensor[:1, :4].contiguous() for name, tensor in inputs.items()}
    np.testing.assert_allclose(
        prepared["ONNX Runtime fp32"]()(shorter),
        torch_runtimes(make, [])["torch fp32"]()(shorter),
        atol=1e-5,
    )


def test_what_is_missing_is_said(make, inputs, tmp_path, monkeypatch):
    find = runtimes.importlib.util.find_spec
    monkeypatch.setattr(
        runtimes.importlib.util,
        "find_spec",
        lambda name: None if name in ("onnx", "openvino") else find(name) or object(),
    )
    sentence = missing_packages()
    assert sentence is not None
    assert "without onnx and openvino" in sentence
    assert "fusionrec[runtimes]" in sentence
    assert exported_runtimes(make, [inputs], tmp_path, threads=1) == {}
