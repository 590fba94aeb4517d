"""The count of FLOPs by hand and by torch's own counter, and the engine's run at a tiny size."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.flops import Counted, count, peak_of
from benchmarks.mfu import Cell, MfuBenchmark, holds, text, weights_of
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.weights import with_adapters

LENGTH = 24
SHAPE = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    attn_implementation="eager",
)
# q and o, k and v, gate, up and down.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64


def counted_by_torch(model, rows: int) -> int:
    ids = torch.ones(rows, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    return counter.get_total_flops()


def test_flops_by_hand():
    found = count(LlamaForCausalLM(SHAPE))
    assert found == Counted(frozen=0, trained=3 * LAYER + 50 * 32, attention=12 * 3 * 4 * 8)
    assert found.a_token(LENGTH) == 6 * (3 * LAYER + 1600) + 12 * 3 * 4 * 8 * LENGTH


def test_flops_are_those_that_torch_counts():
    model = LlamaForCausalLM(SHAPE)
    expected = count(model).a_token(LENGTH) * 2 * LENGTH
    assert counted_by_torch(model, 2) == pytest.approx(expected, rel=2e-3)  # positions beside


def test_frozen_weights_have_no_gradient_of_their_own():
    class Headless:
        head = ()

    config = TrainingConfig(method=Method.LORA)
    model = with_adapters(LlamaForCausalLM(SHAPE), Headless(), config)
    found = count(model)
    assert found.frozen == 3 * LAYER + 50 * 32
    # 16 · (in + out) for each of the seven matrices.
    assert found.trained == 3 * 16 * (2 * 64 + 2 * 48 + 3 * 96)
    # Nothing flows back into what the first layer reads: its q, k and v, at most.
    saved = 2 * (32 * 32 + 2 * 32 * 16 + 3 * 16 * 32) * 2 * LENGTH
    expected = found.a_token(LENGTH) * 2 * LENGTH
    assert expected - saved * 1.01 <= counted_by_torch(model, 2) <= expected * 1.002


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_of(name) == peak


def cell(method: str, mfu: float | None) -> Cell:
    return Cell(
        method=method,
        workers=2,
        parameters=10**9,
        trained=10**7,
        flops_a_token=6_500_000_000,
        tokens_per_s=12_345.0,
        mfu=mfu,
        peak_memory=30 * 10**9,
        estimate=25 * 10**9,
    )


def test_the_claim_is_on_full_fine_tuning_of_long_texts():
    config = MfuBenchmark()
    assert holds(config, [cell("full", 0.46), cell("lora", 0.3)])
    assert not holds(config, [cell("full", 0.44)])
    assert holds(config, [cell("full", None)])
    assert holds(config.model_copy(update={"length": 512}), [cell("full", 0.1)])


def test_the_report_names_batch_and_length():
    found = text(MfuBenchmark(), [cell("full", 0.456)], "a machine")
    assert "8 texts of 2048 tokens" in found
    assert "| full | 10.0 of 1,000.0 | 6.50 | 12,345 | 45.6% | 30.00 | 25.00 | 1.20 |" in found


def test_a_tied_head_counts_once_and_the_table_of_tokens_not_at_all(tmp_path):
    tied = LlamaConfig(**(SHAPE.to_dict() | {"tie_word_embeddings": True}))
    tied.save_pretrained(tmp_path)
    found, parameters, trained = weights_of(tmp_path, TrainingConfig())
    assert found.trained == 3 * LAYER + 50 * 32
    assert parameters == trained == 3 * LAYER + 50 * 32 + (2 * 3 + 1) * 32
    found, parameters, trained = weights_of(tmp_path, TrainingConfig(method=Method.LORA))
    assert (found.frozen, found.trained) == (3 * LAYER + 50 * 32, trained)


@pytest.mark.slow
def test_a_tiny_decoder(tmp_path):
    flags = ["--size", "tiny", "--length", "64", "--batch-size", "2", "--steps", "4"]
    flags += ["--warm-up", "1", "--peak-tflops", "0.01", "--out", str(tmp_path / "mfu")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.mfu", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [raw] = (tmp_path / "mfu").glob("mfu-*.json")
    full, lora = json.loads(raw.read_text())
    assert (full["method"], lora["method"]) == ("full", "lora")
    assert full["trained"] == full["parameters"]
    assert 0 < lora["trained"] < full["trained"]
    for each in (full, lora):
        expected = each["tokens_per_s"] * each["flops_a_token"] / 0.01e12
        assert each["mfu"] == pytest.approx(expected)
        assert each["peak_memory"] > 0
        assert each["estimate"] > 0
