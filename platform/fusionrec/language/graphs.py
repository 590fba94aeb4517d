"""Forward passes on a GPU as CUDA graphs: one launch for a batch instead of one for each kernel.

A small transformer's kernels take less time than Python takes to launch them. A graph is launched
as a whole, but repeats one shape at the same addresses; so batches are padded to a few shapes
(:mod:`fusionrec.language.buckets`), each of which is captured when the model is loaded, in the
thread that loads it. While the GPU computes a batch, the next is padded in memory that it can read
by itself; a batch is one copy there and one back.

Captured by hand rather than by ``torch.compile(mode="reduce-overhead")``, whose graphs belong to
the thread that ran first (pytorch#123177): here one thread loads and another answers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from fusionrec.data.histories import FloatArray
from fusionrec.language.buckets import Batch, Bucket, Buckets
from fusionrec.language.inference import fill, inference
from fusionrec.language.precision import Precision
from fusionrec.language.tokens import Row

logger = logging.getLogger(__name__)

SWITCH = "FUSIONREC_CUDA_GRAPHS"
"""An environment variable: with 0, models on a GPU launch each kernel."""

Forward: TypeAlias = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]

_MEMORY = 2**30
"""Bytes for what the layers of the largest batch leave; all graphs of a model share it."""
_MOST_TOKENS = 2**14
_LIVE = 24
"""Values of a token, in widths of the model, that are there at once at most: what comes in, query,
key, value, what comes of them, the feed-forward network's four twice, and copies in float32."""

_CAPTURING = threading.Lock()
"""A process can only have one capture under way."""


class Runner(Protocol):
    """Where passes run, one after the other: :class:`GraphRunner`, and what tests have instead."""

    device: torch.device
    pins: bool
    """Whether it reads and writes the host's memory by itself, if that is pinned."""

    def stream(self) -> AbstractContextManager[Any]:
        """Within it, what is asked of the device comes after what was asked before."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does the same as ``run``, on the tensors that ``run`` read and wrote."""

    def mark(self) -> Callable[[], None]:
        """What waits until everything that has been asked so far is done."""


class GraphRunner:
    """CUDA graphs on a stream of their own, whose passes share one pool of memory.

    Since no two of them run at once, a pass may overwrite what another one left, and only what is
    copied out in between is safe. The stream is no other runner's: a graph that is destroyed takes
    the workspace of cuBLAS with it that all graphs of its stream use (pytorch#193402). So graphs
    are never dropped one by one either.
    """

    pins = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights' copies
        self._pool = torch.cuda.graph_pool_handle()

    def stream(self) -> AbstractContextManager[Any]:
        """Makes the runner's stream the current one."""
        return torch.cuda.stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Replays the graph. Raises a RuntimeError for what waits for the GPU or takes its memory.

        Other threads may go on answering, as long as none waits for the whole device.
        """
        run()  # loads kernels and makes workspaces, which a capture must not
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with (
            _CAPTURING,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            run()
        return graph.replay

    def mark(self) -> Callable[[], None]:
        """Waits for an event of the stream, never for the device."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize


class _Slot:
    """The host's side of a batch under way."""

    def __init__(self, inputs: int, found: tuple[int, ...], *, pinned: bool) -> None:
        self.inputs = torch.zeros(inputs, dtype=torch.int64, pin_memory=pinned)
        self.found = torch.zeros(found, dtype=torch.float32, pin_memory=pinned)


class FixedShapes:
    """A model's forward pass in the shapes of :class:`Buckets`. Safe to call from several threads.

    Shape legend: N inputs (``input_ids`` and what else the model takes), R rows and L tokens of a
    bucket.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        forward: Forward,
        *,
        shape: tuple[int, ...],
        shortest: Row,
        buckets: Buckets,
        runner: Runner,
        precision: Precision,
    ) -> None:
        """Make the buffers.

        Args:
            model: on the runner's device.
            tokenizer: the one that makes the rows.
            forward: from inputs [R, L] to a tensor [R, *shape], each row by itself.
            shape: what comes of a text.
            shortest: the row of no text, whose tokens fit every bucket.
            buckets: those of the model's longest text.
            runner: where passes run.
            precision: what the model was loaded in.
        """
        self._model, self._tokenizer, self._forward = model, tokenizer, forward
        self._shape, self._shortest, self._precision = shape, shortest, precision
        self._buckets, self._runner = buckets, runner
        self._names = tuple(shortest)
        self._ready: dict[Bucket, Callable[[], None]] = {}
        self._lock = threading.Lock()
        rows = max(bucket.rows for bucket in buckets.shapes)
        size, found = len(self._names) * buckets.largest, (rows, *shape)
        with runner.stream():
            self._inputs = torch.zeros(size, dtype=torch.int64, device=runner.device)
            self._found = torch.zeros(found, dtype=torch.float32, device=runner.device)
        # While one is computed, the other is filled.
        self._slots = [_Slot(size, found, pinned=runner.pins) for _ in range(2)]

    def capture(self) -> int:
        """Capture every shape; how many there are. A shape that is not captured runs eagerly.

        Raises:
            RuntimeError: the model does what a graph cannot, or memory is short.
        """
        with self._lock, inference(self._model, self._precision), self._runner.stream():
            # The largest first, so that the others find their memory among what it took.
            for bucket in self._buckets.shapes:
                # Padded: a graph has the kernels for padding, which other inputs would not warm up.
                self._upload(self._slots[0], bucket, [self._shortest])
                self._ready[bucket] = self._runner.capture(partial(self._run, bucket))
        return len(self._ready)

    def __call__(self, rows: Sequence[Row]) -> FloatArray:
        """[B, *shape] what ``forward`` finds of B rows, in their order."""
        out: FloatArray = np.empty((len(rows), *self._shape), dtype=np.float32)
        under_way: deque[tuple[_Slot, Batch, Callable[[], None]]] = deque()
        batches = self._buckets.plan([len(row["input_ids"]) for row in rows])
        with self._lock, inference(self._model, self._precision), self._runner.stream():
            for number, batch in enumerate(batches):
                if len(under_way) == len(self._slots):
                    _collect(*under_way.popleft(), out)
                slot, count = self._slots[number % len(self._slots)], batch.bucket.rows
                self._upload(slot, batch.bucket, [rows[text] for text in batch.texts])
                self._ready.get(batch.bucket, partial(self._run, batch.bucket))()
                slot.found[:count].copy_(self._found[:count], non_blocking=True)
                under_way.append((slot, batch, self._runner.mark()))
            while under_way:
                _collect(*under_way.popleft(), out)
        return out

    def _upload(self, slot: _Slot, bucket: Bucket, rows: list[Row]) -> None:
        """Pad in the slot, copy. Rows that are left over repeat the last: no row is all padding."""
        host = self._view(slot.inputs, bucket)
        filled = rows + [rows[-1]] * (bucket.rows - len(rows))
        fill(self._tokenizer, filled, dict(zip(self._names, host.numpy(), strict=True)))
        self._view(self._inputs, bucket).copy_(host, non_blocking=True)

    def _run(self, bucket: Bucket) -> None:
        inputs = self._view(self._inputs, bucket)
        found = self._forward(dict(zip(self._names, inputs, strict=True)))
        self._found[: bucket.rows].copy_(found)

    def _view(self, flat: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """[N, R, L] at the beginning of a buffer."""
        count = len(self._names)
        return flat[: count * bucket.tokens].view(count, bucket.rows, bucket.length)


def _collect(slot: _Slot, batch: Batch, wait: Callable[[], None], out: FloatArray) -> None:
    wait()
    out[batch.texts] = slot.found[: len(batch.texts)].numpy()


def runner_of(device: torch.device) -> Runner | None:
    """CUDA graphs on a GPU, if they are not switched off; none elsewhere."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "0":
        return None
    return GraphRunner(device)


def captured(
    model: Any,
    tokenizer: Any,
    forward: Forward,
    *,
    shape: tuple[int, ...],
    shortest: Row,
    max_tokens: int,
    precision: Precision,
) -> FixedShapes | None:
    """A frozen model's forward pass, captured; None where its device has no graphs.

    Costs some seconds. A model that cannot be captured is warned about, and runs without.
    """
    runner = runner_of(model.device)
    if runner is None:
        return None
    width = int(model.config.hidden_size) * model.dtype.itemsize
    most = min(_MOST_TOKENS, max(max_tokens, _MEMORY // (_LIVE * width)))
    fixed = FixedShapes(
        model,
        tokenizer,
        forward,
        shape=shape,
        shortest=shortest,
        buckets=Buckets(max_tokens, most),
        runner=runner,
        precision=precision,
    )
    start = time.perf_counter()
    try:
        number = fixed.capture()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        logger.warning(
            "%s is not captured as CUDA graphs (%s): it runs without, each kernel by itself",
            type(model).__name__,
            reason,
        )
        return None
    took = time.perf_counter() - start
    logger.info("%s: %d shapes captured in %.1f s", type(model).__name__, number, took)
    return fixed
