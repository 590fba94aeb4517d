"""The gate: a bundle is put in service only if it is not significantly worse than the current one.

Both are judged on the validation protocol by the same metric, per case. A pipeline directory keeps
its cases in ``validation.parquet`` (user_id, ndcg@10), so that two bundles are compared, by paired
bootstrap, on the users that both of them were measured on. A bundle whose ``inference.json``
asks for bf16 or int8 is refused, also as the first one, unless that was measured to keep the
quality of float32; ``auto`` and ``fp32`` need no measuring: both are served in float32 everywhere.

What it does not know: whether the validation cases of two versions of a data set are equally hard;
it compares each user with itself. Where nothing can be compared, it says no.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from fusionrec.bundles.manifest import Manifest
from fusionrec.bundles.store import BundleStore
from fusionrec.config import Config
from fusionrec.errors import BundleError
from fusionrec.evaluation.significance import BootstrapConfig, Comparison, compare
from fusionrec.language.precision import INFERENCE, Precision, read_inference

CASES = "validation.parquet"
METRIC = "ndcg@10"
KEPT = 0.995
"""Least share of the NDCG@10 of float32 that a faster precision keeps."""


class Measured(Config):
    """NDCG@10 of the served list on the same validation cases, before a change and after it."""

    num_cases: int = Field(ge=1)
    precision: Precision
    """The faster one."""
    fp32: float = Field(ge=0, le=1)
    """With every language model in float32."""
    faster: float = Field(ge=0, le=1)
    """With this one in the faster precision, and an encoder before it as it is served."""

    @property
    def kept(self) -> bool:
        """Whether the quality of float32 is kept."""
        return self.faster >= KEPT * self.fp32


class InferenceMetrics(Config):
    """What ``jobs.optimise`` leaves in ``metrics.json`` under ``inference``; null: not measured."""

    encoder: Measured | None = None
    reranker: Measured | None = None


class Verdict(Config):
    """Whether a bundle may be put in service, and why."""

    passed: bool
    reason: str
    """One sentence."""
    comparison: Comparison | None = None
    """Candidate (a) against current (b); null where nothing was compared."""


def forget_measurements(directory: Path) -> None:
    """Drop what was measured of a pipeline: for whoever changes it, so that no gate is misled.

    With it goes the precision that was chosen by those measurements.
    """
    for name in ("metrics.json", CASES, INFERENCE):
        (directory / name).unlink(missing_ok=True)


def write_cases(directory: Path, user_ids: Sequence[str], values: Sequence[float] | Any) -> None:
    """Keep the validation metric of a pipeline, one value in [0, 1] a user, for later gates."""
    table = {
        "user_id": pa.array(user_ids, pa.string()),
        METRIC: pa.array(np.asarray(values, dtype=np.float64)),
    }
    pq.write_table(pa.table(table), directory / CASES)


def judge(
    store: BundleStore, candidate: Manifest, config: BootstrapConfig | None = None
) -> Verdict:
    """Look at a bundle's precision, then compare it with the one in service.

    Raises:
        BundleError: the validation cases of one of them, or what was measured of the candidate's
            precision, cannot be read.
    """
    if objection := _objection(store.path(candidate.id), candidate):
        return Verdict(passed=False, reason=objection)
    current_id = store.current_id()
    if current_id is None:
        return Verdict(passed=True, reason="it is the first bundle")
    if current_id == candidate.id:
        return Verdict(passed=True, reason="it is in service already")
    ours, theirs = store.path(candidate.id), store.path(current_id)
    for bundle in (ours, theirs):
        if not (bundle / CASES).is_file():
            return Verdict(
                passed=False,
                reason=f"{bundle.name} has no {CASES}, so the two cannot be compared",
            )
    names = [manifest.dataset.get("name") for manifest in (candidate, Manifest.load(theirs))]
    if names[0] != names[1]:
        return Verdict(
            passed=False,
            reason=f"it is made from data set {names[0]}, the current one from {names[1]}: "
            "the two cannot be compared",
        )
    values = _paired(_read(ours / CASES), _read(theirs / CASES))
    if not len(values):
        return Verdict(passed=False, reason="no validation user is common to both")
    comparison = compare(METRIC, (candidate.id, current_id), values, config or BootstrapConfig())
    difference = comparison.difference
    passed = difference.high >= 0
    interval = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    word = "not significantly worse" if passed else "significantly worse"
    return Verdict(
        passed=passed,
        reason=f"{METRIC} on validation is {comparison.mean_a:.4f} against {comparison.mean_b:.4f} "
        f"of {current_id} over {comparison.num_cases} users: {interval}, {word}",
        comparison=comparison,
    )


def _objection(bundle: Path, manifest: Manifest) -> str | None:
    """What speaks against the precision of the bundle's models."""
    config = read_inference(bundle)
    try:
        found = InferenceMetrics.model_validate(manifest.metrics.get("inference", {}))
    except ValidationError as error:
        raise BundleError(
            f"metrics.json of the pipeline is wrong ({error.errors()[0]['msg']} under inference); "
            "measure it again with `python -m jobs.optimise`"
        ) from error
    for model, precision, measured in (
        ("encoder", config.encoder, found.encoder),
        ("reranker", config.reranker, found.reranker),
    ):
        if precision not in (Precision.BF16, Precision.INT8):
            continue
        claim = f"its {INFERENCE} says {precision} for the {model}"
        if measured is None or measured.precision is not precision:
            return f"{claim}, which was not measured: run `python -m jobs.optimise`"
        if not measured.kept:
            return (
                f"{claim}, with which {METRIC} is {measured.faster:.4f}, less than {KEPT:.1%} of "
                f"the {measured.fp32:.4f} of fp32"
            )
    return None


def _read(path: Path) -> dict[str, float]:
    try:
        table = pq.read_table(path, columns=["user_id", METRIC])
    except (pa.ArrowException, OSError) as error:
        raise BundleError(
            f"{path} cannot be read ({error}); measure the pipeline again on validation"
        ) from error
    users, values = (column.to_pylist() for column in table.columns)
    return dict(zip(users, values, strict=True))


def _paired(
    ours: dict[str, float], theirs: dict[str, float]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[B, 2] the metric of both on the users common to them."""
    common = [user for user in ours if user in theirs]
    pairs = [(ours[user], theirs[user]) for user in common]
    return np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
