"""Whichever reranker a folder holds: a cross-encoder or a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from fusionrec.language.decoder import DecoderConfig, DecoderReranker
from fusionrec.language.models import resolve, settings_name
from fusionrec.language.precision import Precision
from fusionrec.language.reranker import Reranker

AnyReranker: TypeAlias = Reranker | DecoderReranker


def load_reranker(
    model: str | Path,
    *,
    precision: Precision = Precision.AUTO,
    frozen: bool = False,
    peaks: Sequence[float] = (),
) -> AnyReranker:
    """Load what ``jobs.finetune --task reranker`` or ``--task decoder`` left.

    ``frozen`` cross-encoders can be neither trained nor saved, and answer faster. ``auto`` is, of
    what is frozen, fp32. ``peaks`` are of cross-encoders in int8, see :meth:`Reranker.load`.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
    """
    folder = resolve(model)
    if (folder / settings_name(DecoderConfig)).is_file():
        # Nothing of it is laid out anew, but on a GPU autocast would be bf16 that nobody measured.
        unmeasured = frozen and precision is Precision.AUTO
        return DecoderReranker.load(folder, precision=Precision.FP32 if unmeasured else precision)
    return Reranker.load(folder, precision=precision, frozen=frozen, peaks=peaks)
