"""The vector of a history, in numpy: what serving needs of the encoder that torch trained.

One history at a time, so that its vector does not depend on who else is in the batch. It is the
twin of :class:`fusionrec.sources.autoencoder.model.Encoder`; a test compares them.

Shape legend: E distinct items of a history, H the hidden width, D the factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.special

from fusionrec.data.histories import FloatArray

EPSILON = 0.1
"""Added to a variance before its root is divided by: that of the authors' code."""


def encode(parameters: Mapping[str, FloatArray], summed: FloatArray) -> FloatArray:
    """[D] the mean of what is believed of a history.

    Args:
        parameters: by the names that torch gives them.
        summed: [H] the weighted sum of the first layer's rows of its items.
    """
    layers = [_layer(parameters, 0, summed + parameters["first_bias"])]
    read = layers[0]
    for number in range(sum(name.startswith("norms.") for name in parameters) // 2 - 1):
        linear = f"linears.{number}"
        found = parameters[f"{linear}.weight"] @ layers[-1] + parameters[f"{linear}.bias"]
        layers.append(_layer(parameters, number + 1, found + read))
        read = read + layers[-1]
    result: FloatArray = parameters["mean.weight"] @ layers[-1] + parameters["mean.bias"]
    return result


def _layer(parameters: Mapping[str, FloatArray], number: int, x: FloatArray) -> FloatArray:
    """Swish, then layer normalisation."""
    active = x * scipy.special.expit(x)
    centred = active - active.mean()
    scaled = centred / np.sqrt(np.square(centred).mean() + np.float32(EPSILON))
    norm = f"norms.{number}"
    result: FloatArray = scaled * parameters[f"{norm}.weight"] + parameters[f"{norm}.bias"]
    return result
