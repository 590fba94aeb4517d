"""What passes through a model make and leave, from its ``config.json`` alone.

The model is built of fake tensors, which have shapes and no content, and one forward and backward
pass of the largest batch is traced through it, tensor by tensor, so that an architecture needs no
formula of its own. No weights are read; a model of a billion parameters takes seconds and no
memory.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fusionrec.language.models import load_pretrained
from fusionrec.training import quantization
from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.heap import Event
from fusionrec.training.vocabulary import causal_loss, guesses
from fusionrec.training.weights import checkpoint_activations, with_adapters


class Architecture(StrEnum):
    """The class of transformers that a model is loaded as."""

    BACKBONE = "AutoModel"
    CLASSIFIER = "AutoModelForSequenceClassification"
    MASKED_LM = "AutoModelForMaskedLM"
    CAUSAL_LM = "AutoModelForCausalLM"


class Reads(StrEnum):
    """What a loss reads of a forward pass."""

    HIDDEN = "hidden"
    """The last hidden states."""
    ANSWER = "answer"
    """The logit of a text, or a language model's logits after its last token."""
    TOKENS = "tokens"
    """A language model's logits of the tokens that it predicts."""


class Pass(NamedTuple):
    """One forward pass."""

    rows: int
    """Texts of it."""
    reads: Reads
    share: float = 1.0
    """Of its tokens, those that a masked language model guesses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is alive in a worker when its backward pass begins."""

    architecture: Architecture
    passes: tuple[Pass, ...]
    tokens: int
    """Of each text, padding included."""
    head: tuple[str, ...] = ()
    """See :class:`~fusionrec.training.task.Task`."""
    towers: int = 1
    """Models of the architecture, which make the passes by turns."""


class Traced(NamedTuple):
    """What a forward and a backward pass tell of a model."""

    parameters: int
    trained: int
    """Parameters that are trained."""
    largest: int
    """Parameters of the largest matrix that is trained."""
    activations: int
    """Bytes that the forward passes leave."""
    peak: int
    """Bytes of these and of the backward pass with gradients."""
    events: tuple[Event, ...] = ()
    """What both passes make and free, in this order."""
    packed: int = 0
    """Parameters that are kept in 4 bits."""
    written: int = 0
    """The most of them that are written out at once."""


class LiveBytes(TorchDispatchMode):
    """While active: the bytes of the tensors that torch's operators make, and their peak.

    ``events`` tells in which order; see :mod:`fusionrec.training.heap`.
    """

    def __init__(self, *known: torch.Tensor) -> None:
        """Leave ``known`` tensors, and their views, out."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.events: list[Event] = []
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it made."""
        made = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():  # not in a backward pass
            self.events.append(Event(None))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = None
        number = len(self.events)
        weakref.finalize(storage, self._gone, number, size)
        self.events.append(Event(number, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, number: int, size: int) -> None:
        self.events.append(Event(number))
        self.live -= size


@lru_cache(maxsize=128)
def traced(
    folder: Path, _: bytes, load: Load, config: TrainingConfig, dtype: torch.dtype, device: str
) -> Traced:
    """What passes through the model take; the content of its config is a part of the key."""
    described = load_pretrained(transformers.AutoConfig.from_pretrained, folder)
    if load.architecture is Architecture.CLASSIFIER:
        described.num_labels = 1
    with FakeTensorMode(), torch.device(device), _made_in(dtype):
        kind: Any = getattr(transformers, load.architecture)
        models = [
            load_pretrained(lambda _, **__: kind.from_config(described, dtype=dtype), folder)
            for _ in range(load.towers)
        ]
        model = torch.nn.ModuleList(models) if load.towers > 1 else models[0]
        if config.activation_checkpointing:
            checkpoint_activations(model)
        # Made in their dtype: fake weights cannot be converted afterwards.
        model = with_adapters(model, load, config).train()
        counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
        layers = quantization.adapted_layers(model) if config.method is Method.QLORA else []
        packed = [layer.get_base_layer().weight.numel() for layer in layers]
        forward, live = _trace(model, load)
        return Traced(
            sum(count for count, _ in counts),
            sum(count for count, on in counts if on),
            max(count for count, on in counts if on),
            forward,
            live.peak,
            tuple(live.events),
            packed=sum(packed),
            written=max(packed, default=0),
        )


@contextlib.contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """New weights are of ``dtype`` and stay so: torch cannot convert or move fake ones."""
    before, to = torch.get_default_dtype(), torch.nn.Module.to
    torch.set_default_dtype(dtype)
    torch.nn.Module.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.nn.Module.to = to  # type: ignore[method-assign]


def _trace(model: Any, load: Load) -> tuple[int, LiveBytes]:
    """(bytes that the forward passes leave, these and what the backward pass makes)."""
    whole = getattr(model, "get_base_model", lambda: model)()  # inside of adapters
    outputs = []
    with LiveBytes(*model.parameters(), *model.buffers()) as live:
        for number, (rows, reads, share) in enumerate(load.passes):
            shape = (rows, load.tokens)
            ids, mask = (torch.ones(shape, dtype=torch.long) for _ in range(2))
            if reads is Reads.HIDDEN:
                tower = whole[number % load.towers] if load.towers > 1 else whole
                states = tower.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
                outputs.append(states.float().mean(dim=1))
            elif reads is Reads.TOKENS:
                inputs = {"input_ids": ids, "attention_mask": mask}
                if load.architecture is Architecture.CAUSAL_LM:
                    outputs.append(causal_loss(model, inputs, ids))
                else:
                    places = torch.ones(math.ceil(share * rows * load.tokens), dtype=torch.long)
                    found = guesses(model, inputs, (places % rows, places % load.tokens))
                    outputs.append(cross_entropy(found.logits[0].float(), places))
                    del found
            else:
                last = {"logits_to_keep": 1} if load.architecture is Architecture.CAUSAL_LM else {}
                outputs.append(model(input_ids=ids, attention_mask=mask, **last).logits.float())
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        forward = live.live
        torch.autograd.backward(loss)
    return forward, live
