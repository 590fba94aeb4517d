"""Numbers that are kept in half precision where there are many of them, and read in single.

numpy converts float16 one number at a time, which for the vectors of 800 candidates took ten times
as long as their inner products. The bits of a float16, moved to their places in a float32, are the
same number but for a power of two, and moving them is a few passes over whole arrays.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fusionrec.data.histories import FloatArray

Stored: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float16]
"""Numbers that take half the memory where there are many of them."""

_SHIFT = 13
"""Bits of fraction that a float32 has more."""
_KEEP = np.int32(-0x7000_2000)
"""The sign, and what was moved: a negative number came with its sign repeated in between."""
_EXPONENTS = np.float32(2.0**112)
"""A float32 counts its exponents from 127, a float16 from 15."""


def single(stored: Stored) -> FloatArray:
    """The same finite numbers as float32, exactly; what already is float32, as it is."""
    if stored.dtype != np.float16:
        return np.asarray(stored, dtype=np.float32)
    bits = stored.view(np.int16).astype(np.int32)
    bits <<= _SHIFT
    bits &= _KEEP
    numbers: FloatArray = bits.view(np.float32)
    numbers *= _EXPONENTS
    return numbers
