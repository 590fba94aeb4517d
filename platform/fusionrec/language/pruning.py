"""Structured pruning: the layers of a transformer that change its outputs least are dropped.

Greedy: of the layers that are left, the one goes without which the outputs are most like those of
the whole model, until few enough are left. Layers near the end mostly go first (Sajjad et al., On
the effect of dropping layers of pre-trained transformer models, Computer Speech & Language 2023).
What is left has the same width, so it is as fast as it has layers, and can be trained on: the
objective ``distillation`` teaches it the whole model's scores again. To drop n of N layers takes
about n·N forward passes over what the outputs are compared on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusionrec.config import Config
from fusionrec.errors import ConfigError, ModelError


class Dropped(Config):
    """A layer that went."""

    layer: int
    """Its place in the whole model, from 0."""
    likeness: float
    """Of the outputs without it, and those that went before it, to those of the whole model."""


def drop_layers(model: Any, num_layers: int, likeness: Callable[[], float]) -> list[Dropped]:
    """Drop layers of ``model``, in place, until ``num_layers`` are left; in the order they went.

    Args:
        model: A model of Transformers; its ``config`` follows.
        num_layers: Layers to keep, fewer than there are.
        likeness: Of the outputs of the model as it then is to those of the whole; higher is better.

    Raises:
        ConfigError: the model has not more layers than that.
        ModelError: its architecture has no list of layers.
    """
    parent, name = _place(model)
    whole = list(getattr(parent, name))
    if not 0 < num_layers < len(whole):
        raise ConfigError(
            f"setting num_layers = {num_layers} is wrong: the model has {len(whole)} layers; give "
            f"1 to {len(whole) - 1}"
        )
    kinds = getattr(model.config, "layer_types", None)

    def keep(places: Sequence[int]) -> None:
        setattr(parent, name, torch.nn.ModuleList([whole[place] for place in places]))
        model.config.num_hidden_layers = len(places)
        if kinds is not None:
            model.config.layer_types = [kinds[place] for place in places]
        for number, place in enumerate(places):
            for module in whole[place].modules():
                if hasattr(module, "layer_idx"):  # where a decoder keeps its keys and values
                    module.layer_idx = number

    left, dropped = list(range(len(whole))), []
    while len(left) > num_layers:
        found = []
        for place in left:
            keep([other for other in left if other != place])
            found.append(likeness())
        # Of equals the last: what is near the output carries least.
        best = max(range(len(left)), key=lambda each: (found[each], each))
        dropped.append(Dropped(layer=left.pop(best), likeness=found[best]))
        keep(left)
    return dropped


def _place(model: Any) -> tuple[Any, str]:
    """The module that has the list of layers, and the list's name in it."""
    count = model.config.num_hidden_layers
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return module, name
    raise ModelError(
        f"a model of architecture {model.config.model_type} has no list of {count} layers to drop "
        "any from: take another"
    )
