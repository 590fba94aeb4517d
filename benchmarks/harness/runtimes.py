"""Ways to run a text model: torch, ONNX Runtime, OpenVINO, in several precisions; CUDA graphs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from fusionrec.data.histories import FloatArray
from fusionrec.language.encoder import Encoder, vectors
from fusionrec.language.layers import pack, quantise
from fusionrec.language.precision import Precision
from fusionrec.language.quantized import watched
from fusionrec.language.reranker import Reranker
from fusionrec.language.tokens import Row

Inputs: TypeAlias = Mapping[str, torch.Tensor]
Forward: TypeAlias = Callable[[Inputs], FloatArray]
Run: TypeAlias = Callable[[Sequence[Row]], FloatArray]
"""Tokenised texts or pairs in, results in their order: whoever runs them makes the batches."""


class WholeEncoder(torch.nn.Module):
    """Tokens in, unit vectors out, as one module: what is compiled and exported."""

    def __init__(self, model: Any, pooling: Any) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """[B, D] vectors."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
        }
        return vectors(self.model, inputs, self.pooling)


class WholeReranker(torch.nn.Module):
    """Tokens in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """[B, 1] logits."""
        logits: torch.Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).logits
        return logits.float()


NAMES = ("input_ids", "attention_mask", "token_type_ids")


def forward_of(module: torch.nn.Module) -> Forward:
    """``module`` in torch."""

    def forward(inputs: Inputs) -> FloatArray:
        with torch.inference_mode():
            found: torch.Tensor = module(*(inputs[name] for name in NAMES))
            return found.float().numpy()

    return forward


def torch_runtimes(
    make: Callable[[], torch.nn.Module], calibration: Sequence[Inputs]
) -> dict[str, Callable[[], Forward]]:
    """Name → what prepares it.

    Args:
        make: the model in float32.
        calibration: batches from which static quantisation takes its scales.
    """

    def compiled(dtype: torch.dtype) -> Forward:
        return forward_of(torch.compile(make().to(dtype), dynamic=True))  # type: ignore[arg-type]

    def packed() -> Forward:
        module = make().to(torch.bfloat16)
        pack(module)
        return forward_of(module)

    def int8(batches: Sequence[Inputs]) -> Forward:
        module = make()
        with watched(module) as peaks:
            for batch in batches:
                forward_of(module)(batch)
        quantise(module, peaks if batches else ())
        return forward_of(module)

    return {
        "torch fp32": lambda: forward_of(make()),
        "torch bf16": lambda: forward_of(make().to(torch.bfloat16)),
        "torch bf16, packed": packed,
        "torch int8, dynamic": lambda: int8(()),
        "torch int8, peaks known": lambda: int8(calibration),
        "torch.compile fp32": lambda: compiled(torch.float32),
        "torch.compile bf16": lambda: compiled(torch.bfloat16),
    }


def gpu_runtimes(
    load: Callable[..., Encoder | Reranker], batch_size: int, device: str
) -> dict[str, Callable[[], Run]]:
    """As a bundle is served on a GPU, and without what is captured, ``batch_size`` rows at a time.

    Args:
        load: what loads the model by ``device``, ``precision`` and ``frozen``.
        batch_size: of the pass that is not captured.
        device: the GPU.
    """

    def prepare(*, frozen: bool) -> Run:
        model = load(device=device, precision=Precision.BF16, frozen=frozen)

        def run(rows: Sequence[Row]) -> FloatArray:
            found = model.run(rows, batch_size)
            return found if found.ndim > 1 else found[:, None]

        return run

    return {
        "GPU bf16": lambda: prepare(frozen=False),
        "GPU bf16 graphs": lambda: prepare(frozen=True),
    }


PACKAGES = ("onnx", "onnxruntime", "openvino")
"""What :func:`exported_runtimes` needs."""


def missing_packages() -> str | None:
    """In a sentence, what is absent of ``PACKAGES`` and how to get it."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return (
        f"ONNX Runtime and OpenVINO are not measured without {' and '.join(absent)}: "
        "`pip install -c constraints.txt 'fusionrec[runtimes]'` brings them"
    )


def exported_runtimes(
    make: Callable[[], torch.nn.Module], calibration: Sequence[Inputs], folder: Path, threads: int
) -> dict[str, Callable[[], Forward]]:
    """As :func:`torch_runtimes`, by ONNX Runtime and OpenVINO; none where these are missing.

    Args:
        make: the model in float32.
        calibration: batches from which static quantisation takes its scales.
        folder: where the exported models are kept, and found the next time.
        threads: of a forward pass.
    """
    if missing_packages():
        return {}
    fp32, dynamic, static = (folder / f"{name}.onnx" for name in ("fp32", "dynamic", "static"))

    def exported() -> None:
        if not static.is_file():
            export(make(), calibration[0], fp32)
            quantise_exported(fp32, dynamic, static, calibration)

    def onnx(path: Path) -> Callable[[], Forward]:
        def prepare() -> Forward:
            exported()
            return onnx_forward(path, threads)

        return prepare

    def openvino(path: Path, precision: str) -> Callable[[], Forward]:
        def prepare() -> Forward:
            exported()
            return openvino_forward(path, threads, precision)

        return prepare

    return {
        "ONNX Runtime fp32": onnx(fp32),
        "ONNX Runtime int8, dynamic": onnx(dynamic),
        "ONNX Runtime int8, static": onnx(static),
        "OpenVINO fp32": openvino(fp32, "f32"),
        "OpenVINO bf16": openvino(fp32, "bf16"),
        "OpenVINO int8, static": openvino(static, "f32"),
    }


def export(module: torch.nn.Module, inputs: Inputs, path: Path) -> None:
    """Write ONNX with free batch size and length."""
    axes = {name: {0: "texts", 1: "tokens"} for name in NAMES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            tuple(inputs[name] for name in NAMES),
            str(path),
            input_names=list(NAMES),
            output_names=["out"],
            dynamic_axes={**axes, "out": {0: "texts"}},
            dynamo=False,
        )


def quantise_exported(
    fp32: Path, dynamic: Path, static: Path, calibration: Sequence[Inputs]
) -> None:
    """8-bit weights, activations scaled as they come (dynamic) or as in ``calibration``."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch[name].numpy() for name in NAMES}

    prepared = fp32.with_name("prepared.onnx")
    quant_pre_process(str(fp32), str(prepared), skip_symbolic_shape=True)
    multiply = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
    q.quantize_dynamic(str(prepared), str(dynamic), weight_type=q.QuantType.QInt8, **multiply)
    q.quantize_static(
        str(prepared),
        str(static),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        **multiply,
    )


def onnx_forward(path: Path, threads: int) -> Forward:
    """A session of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    known = {each.name for each in session.get_inputs()}

    def forward(inputs: Inputs) -> FloatArray:
        feed = {name: inputs[name].numpy() for name in NAMES if name in known}
        found: FloatArray = session.run(None, feed)[0]
        return found

    return forward


def openvino_forward(path: Path, threads: int, precision: str) -> Forward:
    """A model compiled by OpenVINO."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    known = {name for port in model.inputs for name in port.get_names()}

    def forward(inputs: Inputs) -> FloatArray:
        found = model({name: inputs[name].numpy() for name in NAMES if name in known})[0]
        return np.array(found, dtype=np.float32)

    return forward
