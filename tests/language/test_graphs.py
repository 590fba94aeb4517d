"""What is captured finds what the model finds, whatever the texts; GPUs have tests of their own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusionrec.language import graphs, inference
from fusionrec.language.buckets import Bucket, Buckets
from fusionrec.language.encoder import Encoder
from fusionrec.language.graphs import FixedShapes, GraphRunner, runner_of
from fusionrec.language.layers import pack
from fusionrec.language.precision import Precision
from fusionrec.language.reranker import Reranker
from fusionrec.language.tokens import tokenize

CPU = torch.device("cpu")
WORDS = ["love", "war", "space", "a night of music", "the book", "zzz"]
TEXTS = [" ".join(WORDS[i % 6] for i in range(n)) for n in (1, 9, 3, 40, 2, 17, 5, 0, 28, 1)]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class EagerRunner:
    """Runs at once on the CPU, and counts captures and replays."""

    device, pins = CPU, False

    def __init__(self, _: torch.device = CPU) -> None:
        self.captures = self.replays = 0

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay

    def mark(self) -> Callable[[], None]:
        return lambda: None


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> EagerRunner:
    """That of whatever is loaded frozen; with few small shapes."""
    runner = EagerRunner()
    monkeypatch.setattr(graphs, "runner_of", lambda _: runner)
    monkeypatch.setattr(graphs, "_MOST_TOKENS", 512)
    return runner


def plain(model: Any) -> Any:
    """The same model, without what was captured."""
    model._captured = None
    return model


def test_a_captured_encoder_finds_the_same_vectors(tiny_encoder: Path, runner: EagerRunner):
    captured = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32, frozen=True)
    assert runner.captures == len(Buckets(captured.config.max_tokens, 512).shapes)
    found = captured.encode(TEXTS)
    assert runner.replays > 1
    np.testing.assert_allclose(found, plain(captured).encode(TEXTS), atol=1e-5)
    assert not found[7].any()  # blank


def test_a_captured_reranker_finds_the_same_logits(tiny_encoder: Path, runner: EagerRunner):
    captured = Reranker.load(tiny_encoder, device="cpu", precision=Precision.FP32, frozen=True)
    asked, candidates = ["love and war", "", "the book of the night"], [TEXTS[:5], TEXTS, TEXTS]
    found = captured.score(asked, candidates)
    assert runner.replays > 1
    for row, exact in zip(found, plain(captured).score(asked, candidates), strict=True):
        np.testing.assert_allclose(row, exact, atol=1e-5)


@pytest.fixture(scope="module")
def packed(tiny_encoder: Path) -> Encoder:
    """As it is served on a CPU."""
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32)
    encoder.model.to(torch.bfloat16)  # whether or not this CPU is fast at it
    encoder.precision = Precision.BF16
    pack(encoder.model)
    return encoder


def fixed(encoder: Encoder, most_tokens: int = 512) -> FixedShapes:
    return FixedShapes(
        encoder.model,
        encoder.tokenizer,
        encoder._vectors,
        shape=(encoder.dimension,),
        shortest=encoder._shortest,
        buckets=Buckets(encoder.config.max_tokens, most_tokens),
        runner=EagerRunner(),
        precision=encoder.precision,
    )


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.text("abc war", min_size=1, max_size=150), min_size=1, max_size=40))
def test_any_texts_are_found_in_their_order_as_the_packed_model_finds_them(
    packed: Encoder, texts: list[str]
):
    rows = tokenize(packed.tokenizer, packed.config.max_tokens, texts)
    found, exact = fixed(packed)(rows), packed.run(rows)
    # Unit vectors of two layers in bf16, which has 8 bits; batches are rounded differently.
    np.testing.assert_allclose(found, exact, atol=0.03)
    assert (found * exact).sum(axis=1).min() > 0.995


def test_a_text_beyond_the_longest_shape_runs_as_it_is(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fusionrec.language.buckets.LENGTHS", (16, 32))
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32)
    captured = fixed(encoder, 64)
    ran: list[Bucket] = []
    monkeypatch.setattr(captured, "_run", spied(captured._run, ran))
    assert captured.capture() == len(Buckets(128, 64).shapes) == 5
    rows = tokenize(encoder.tokenizer, 128, TEXTS)
    np.testing.assert_allclose(captured(rows), encoder.run(rows), atol=1e-5)
    assert Bucket(1, len(rows[3]["input_ids"])) in ran
    assert max(map(len, [row["input_ids"] for row in rows])) > 64


def spied(run: Callable[[Bucket], None], ran: list[Bucket]) -> Callable[[Bucket], None]:
    def spy(bucket: Bucket) -> None:
        ran.append(bucket)
        run(bucket)

    return spy


def test_threads_share_a_captured_model(tiny_encoder: Path, runner: EagerRunner):
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32, frozen=True)
    exact = encoder.encode(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: encoder.encode(TEXTS), range(12)))
    for each in found:
        np.testing.assert_array_equal(each, exact)


def test_a_pass_that_failed_leaves_nothing_behind(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32)
    captured = fixed(encoder, 64)
    rows = tokenize(encoder.tokenizer, 128, TEXTS)

    def failing(slot: Any, batch: Any, wait: Any, out: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(graphs, "_collect", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            captured(rows)
    np.testing.assert_allclose(captured(rows), encoder.run(rows), atol=1e-5)


def test_memory_that_the_device_may_still_read_is_not_filled(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32)
    captured, done = fixed(encoder, 64), []
    upload = captured._upload

    def filled(slot: Any, *rest: Any) -> None:
        done.append(("fill", captured._slots.index(slot)))
        upload(slot, *rest)

    def mark() -> Callable[[], None]:
        _, number = done[-1]
        return lambda: done.append(("wait", number))

    monkeypatch.setattr(captured, "_upload", filled)
    monkeypatch.setattr(captured._runner, "mark", mark)
    captured(tokenize(encoder.tokenizer, 128, TEXTS[3:4] * 4))
    assert done == [
        *(("fill", 0), ("fill", 1), ("wait", 0), ("fill", 0), ("wait", 1), ("fill", 1)),
        *(("wait", 0), ("wait", 1)),
    ]


class Cuda:
    """Stands for ``torch.cuda`` and everything in it; notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._real = torch.cuda

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(self._real, name))

        def called(*args: Any, **options: Any) -> Any:
            signature.bind(*args, **options)
            self.asked.append(f"{name} {options['capture_error_mode']}" if options else name)
            return self

        return called

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.asked.append("leave")

    def wait_stream(self, _: Any) -> None:
        self.asked.append("wait for stream")

    def synchronize(self) -> None:
        self.asked.append("synchronize")

    def record(self) -> None:
        self.asked.append("record")

    def replay(self) -> None:
        self.asked.append("replay")


def test_a_graph_is_captured_once_its_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch):
    cuda = Cuda()
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    runner = GraphRunner(torch.device("cuda"))
    assert cuda.asked == ["Stream", "current_stream", "wait for stream", "graph_pool_handle"]
    cuda.asked.clear()
    with runner.stream():
        replay = runner.capture(lambda: cuda.asked.append("run"))
        replay()
        runner.mark()()
    assert cuda.asked == [
        *("stream", "run", "synchronize", "CUDAGraph", "graph thread_local", "run", "leave"),
        *("replay", "Event", "record", "synchronize", "leave"),
    ]


class Devices(TorchDispatchMode):
    """Notes where results are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), options: Any = None) -> Any:
        found = call(*args, **(options or {}))
        self.seen |= {x.device.type for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


@pytest.mark.parametrize("kind", [Encoder, Reranker])
def test_a_pass_waits_for_no_value_and_copies_none(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
):
    """A graph can do neither; on a device without memory both would show."""
    model = kind.load(tiny_encoder, device="cpu", precision=Precision.BF16)
    model.model.to("meta")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    forward = model._vectors if kind is Encoder else model._logits
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.ones(4, 16, dtype=torch.int64, device="meta") for name in names}
    with torch.inference_mode(), Devices() as devices:
        assert len(forward(inputs)) == 4
    assert devices.seen == {"meta"}


def test_a_model_that_cannot_be_captured_runs_without(
    tiny_encoder: Path, runner: EagerRunner, monkeypatch: pytest.MonkeyPatch, caplog
):
    def capture(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(runner, "capture", capture)
    with caplog.at_level(logging.WARNING, logger=graphs.logger.name):
        encoder = Encoder.load(tiny_encoder, device="cpu", frozen=True)
    assert "BertModel is not captured as CUDA graphs (operation not permitted" in caplog.text
    assert encoder.encode(TEXTS).shape == (len(TEXTS), 32)


def test_a_wide_model_has_smaller_batches(
    tiny_encoder: Path, runner: EagerRunner, monkeypatch: pytest.MonkeyPatch
):
    # 32 wide in float32: 128 bytes.
    monkeypatch.setattr(graphs, "_MEMORY", graphs._LIVE * 128 * 256)
    encoder = Encoder.load(tiny_encoder, device="cpu", precision=Precision.FP32, frozen=True)
    assert encoder._captured is not None
    assert encoder._captured._buckets.largest == 256


def test_only_frozen_models_on_a_gpu_are_captured(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
):
    assert Encoder.load(tiny_encoder, device="cpu", frozen=True)._captured is None
    assert runner_of(CPU) is None
    monkeypatch.setattr(graphs, "GraphRunner", EagerRunner)
    gpu = torch.device("cuda")
    assert isinstance(runner_of(gpu), EagerRunner)
    monkeypatch.setenv(graphs.SWITCH, "0")
    assert runner_of(gpu) is None


def test_what_is_trained_is_not_captured(tiny_encoder: Path, runner: EagerRunner):
    assert Encoder.load(tiny_encoder, device="cpu")._captured is None
    assert Reranker.load(tiny_encoder, device="cpu")._captured is None
    assert runner.captures == 0


@pytest.mark.parametrize("has", [True, False])
def test_frozen_models_are_in_bf16_only_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, has: bool
):
    """The gate looks at what is asked for: were ``auto`` bf16 on a GPU, nobody would measure it."""
    monkeypatch.setattr(inference, "has_bf16", lambda _: has)
    gpu, auto, bf16 = torch.device("cuda"), Precision.AUTO, Precision.BF16
    for device in (gpu, CPU):
        assert inference.usable(auto, device, frozen=True) is Precision.FP32
        assert inference.usable(auto, device) is auto
        assert inference.usable(bf16, device, frozen=True) is (bf16 if has else Precision.FP32)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_graphs_find_what_eager_passes_find(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
):
    made = []
    graph = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(graph()) or made[-1])
    captured = Encoder.load(tiny_encoder, device="cuda", precision=precision, frozen=True)
    assert len(made) == len(Buckets(captured.config.max_tokens, graphs._MOST_TOKENS).shapes)
    texts = TEXTS * 40
    with ThreadPoolExecutor(1) as other:  # than the one that captured
        found = other.submit(captured.encode, texts).result()
    exact = plain(captured).encode(texts)
    np.testing.assert_allclose(found, exact, atol=0.03 if precision is Precision.BF16 else 1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_model_is_captured_while_another_answers(tiny_encoder: Path):
    """And the graphs of one that is gone take nothing from those of the other."""
    answering = Encoder.load(tiny_encoder, device="cuda", frozen=True)
    exact = answering.encode(TEXTS)
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(Reranker.load, tiny_encoder, device="cuda", frozen=True)
        while not loading.done():
            np.testing.assert_array_equal(answering.encode(TEXTS), exact)
    assert loading.result()._captured is not None
    del loading
    np.testing.assert_array_equal(answering.encode(TEXTS), exact)


@pytest.mark.gpu
@needs_gpu
def test_graphs_share_their_memory(tiny_encoder: Path):
    before = torch.cuda.memory_reserved()
    encoder = Encoder.load(tiny_encoder, device="cuda", frozen=True)
    assert encoder._captured is not None
    assert torch.cuda.memory_reserved() - before < graphs._MEMORY
