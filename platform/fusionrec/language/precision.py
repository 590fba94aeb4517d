"""In which arithmetic the language models compute. Imports no torch: whoever loads none may ask."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import PositiveFloat, ValidationError

from fusionrec.config import Config
from fusionrec.errors import BundleError

INFERENCE = "inference.json"


class Precision(StrEnum):
    """Arithmetic of forward and backward. Optimizer states are float32 always."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    """Of linear layers of frozen models on a CPU; see :mod:`fusionrec.language.quantized`."""


class InferenceConfig(Config):
    """What ``inference.json`` of a pipeline directory says: how its models are served.

    Offline evaluation and the endpoint both follow it. ``auto`` is float32, on a GPU, too: a faster
    precision is served only where one is named here, and the gate has seen what it costs. ``bf16``
    falls back to fp32 on a machine without instructions for it, ``int8`` on a GPU.
    """

    encoder: Precision = Precision.AUTO
    """Of histories and queries; the vectors of the items are in the pipeline already."""
    reranker: Precision = Precision.AUTO
    """Of all but the reranker's last layer, which is float32 always."""
    encoder_peaks: tuple[PositiveFloat, ...] = ()
    """Largest value that was seen inside each layer's feed-forward network, of an encoder in int8:
    what is above is cut off. Without them every call looks for its own, which takes time."""
    reranker_peaks: tuple[PositiveFloat, ...] = ()
    """The same of a reranker."""


def read_inference(directory: Path) -> InferenceConfig:
    """What ``inference.json`` says; the defaults where there is none.

    Raises:
        BundleError: the file is not what ``jobs.optimise`` writes.
    """
    path = directory / INFERENCE
    if not path.is_file():
        return InferenceConfig()
    try:
        return InferenceConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BundleError(
            f"{path} is wrong: {field}: {first['msg']}; remove it, then choose again with "
            "`python -m jobs.optimise`"
        ) from error
