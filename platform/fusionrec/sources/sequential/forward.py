"""The vector of one history, in numpy: what serving needs of the model that torch trained.

One history at a time, so that its vector does not depend on who else is in the batch, and without
torch, whose import costs a replica seconds and 200 MB. The last block is worked out for the newest
event alone. It is the twin of :mod:`fusionrec.sources.sequential.model`; a test compares them.

Shape legend: L events of a history, D the width, H heads, E the width of a head, Q events that are
asked about, the newest ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.special

from fusionrec.data.histories import FloatArray

EPSILON = 1e-5
"""Added to a variance before its root is divided by, as torch does."""


@dataclass(frozen=True, slots=True)
class Linear:
    """``x Wᵀ + b``."""

    weight: FloatArray
    """[out, in]"""
    bias: FloatArray
    """[out]"""

    def __call__(self, x: FloatArray) -> FloatArray:
        """[…, out] of ``x`` […, in]."""
        result: FloatArray = x @ self.weight.T + self.bias
        return result

    def rows(self, part: slice) -> Self:
        """The layer that gives the outputs ``part`` only."""
        return type(self)(self.weight[part], self.bias[part])


@dataclass(frozen=True, slots=True)
class Norm:
    """Layer normalisation."""

    weight: FloatArray
    bias: FloatArray

    def __call__(self, x: FloatArray) -> FloatArray:
        """Each row at mean 0 and variance 1, then scaled and moved."""
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        result: FloatArray = centred / np.sqrt(variance + EPSILON) * self.weight + self.bias
        return result


@dataclass(frozen=True, slots=True)
class Gates:
    """What makes a block a LiGR block: how much of each branch is let through."""

    attention: Linear
    feed: Linear


@dataclass(frozen=True, slots=True)
class Block:
    """Attention to what came before, then a feed-forward network, each added to its input."""

    distance: FloatArray
    """[H, max_length] added to the attention to the event so many events back."""
    attention_norm: Norm
    query: Linear
    key_value: Linear
    attended: Linear
    feed_norm: Norm
    up: Linear
    down: Linear
    gates: Gates | None

    def __call__(self, x: FloatArray, num_asked: int) -> FloatArray:
        """[Q, D] of the newest ``num_asked`` of the events ``x`` [L, D]."""
        asked = x[-num_asked:]
        step = self.attended(self._attend(self.attention_norm(x), num_asked))
        if self.gates is not None:
            step *= _sigmoid(self.gates.attention(asked))
        middle = asked + step
        step = self.down(self._activate(self.up(self.feed_norm(middle))))
        if self.gates is not None:
            step *= _sigmoid(self.gates.feed(middle))
        return middle + step

    def _attend(self, x: FloatArray, num_asked: int) -> FloatArray:
        length, num_heads = len(x), len(self.distance)
        query = self.query(x[-num_asked:]).reshape(num_asked, num_heads, -1)
        key_value = self.key_value(x).reshape(length, 2, num_heads, -1)
        key = key_value[:, 0].transpose(1, 2, 0)
        value = key_value[:, 1].transpose(1, 0, 2)
        scores = query.transpose(1, 0, 2) @ key / math.sqrt(query.shape[-1])
        back = np.arange(length - num_asked, length)[:, None] - np.arange(length)
        scores += self.distance[:, np.maximum(back, 0)]
        scores[:, back < 0] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        result: FloatArray = (shares @ value).transpose(1, 0, 2).reshape(num_asked, -1)
        return result

    def _activate(self, x: FloatArray) -> FloatArray:
        result: FloatArray
        if self.gates is None:
            result = 0.5 * x * (1 + scipy.special.erf(x / np.float32(math.sqrt(2))))
        else:
            gate, value = np.split(x, 2, axis=-1)
            result = gate * _sigmoid(gate) * value
        return result


@dataclass(frozen=True, slots=True)
class Forward:
    """Item vectors of a history → the vector that is searched with."""

    blocks: tuple[Block, ...]
    norm: Norm

    @classmethod
    def of(cls, weights: Mapping[str, FloatArray]) -> Self:
        """From the parameters of the torch model, by their names there."""

        def norm(name: str) -> Norm:
            return Norm(weights[f"{name}.weight"], weights[f"{name}.bias"])

        def linear(name: str) -> Linear:
            return Linear(weights[f"{name}.weight"], weights[f"{name}.bias"])

        def block(name: str) -> Block:
            all_three = linear(f"{name}.query_key_value")
            width = len(all_three.bias) // 3
            gated = f"{name}.attention_gate.weight" in weights
            return Block(
                distance=weights[f"{name}.distance"],
                attention_norm=norm(f"{name}.attention_norm"),
                query=all_three.rows(slice(width)),
                key_value=all_three.rows(slice(width, None)),
                attended=linear(f"{name}.attended"),
                feed_norm=norm(f"{name}.feed_norm"),
                up=linear(f"{name}.up"),
                down=linear(f"{name}.down"),
                gates=Gates(linear(f"{name}.attention_gate"), linear(f"{name}.feed_gate"))
                if gated
                else None,
            )

        numbers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
        return cls(tuple(block(f"blocks.{number}") for number in sorted(numbers)), norm("norm"))

    @property
    def max_length(self) -> int:
        """Events that are read of a history."""
        return int(self.blocks[0].distance.shape[1])

    def __call__(self, items: FloatArray) -> FloatArray:
        """[D] the vector of a history of at least one and at most ``max_length`` events."""
        x = items * np.float32(math.sqrt(items.shape[1]))
        for block in self.blocks[:-1]:
            x = block(x, len(x))
        newest: FloatArray = self.norm(self.blocks[-1](x, 1))[0]
        return newest


def _sigmoid(x: FloatArray) -> FloatArray:
    result: FloatArray = scipy.special.expit(x)
    return result
