"""How much memory a fine-tuning run takes, from the model's ``config.json`` alone.

The model is built of fake tensors, which have shapes and no content, and one forward and backward
pass of the largest batch is traced through it; what is alive at once is counted tensor by tensor,
so that an architecture needs no formula of its own. What DeepSpeed holds besides is added up from
its ZeRO stage (Rajbhandari et al., 2020, arXiv:1910.02054, and what its implementation buffers).
No weights are read; tracing a model of a billion parameters takes seconds and no memory.

Bytes are of one worker: its device where it has one, its process otherwise; what is offloaded from
a device is counted apart. Not counted are what the libraries themselves take (half a GB of a
process, or a CUDA context) and what an allocator keeps for later.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from fusionrec.training.devices import Device, of_this_machine
from fusionrec.training.vocabulary import causal_loss, guesses
from fusionrec.training.weights import checkpoint_activations, use_bf16, with_adapters

_WHOLE = 4
"""Bytes of a float32: master weights, gradients and both moments of AdamW."""
_KEPT = 1.35
"""What a process takes of memory to what is alive in it at most: between its pieces, the allocator
keeps some in which nothing finds room. Measured; see tests/training/test_memory.py."""
_GATHERED = 10**9
"""Weights that ZeRO-3 keeps gathered at most: DeepSpeed's stage3_max_live_parameters."""
_BUCKET = 5 * 10**8
"""Gradients that are reduced at once: DeepSpeed's reduce_bucket_size. A device gives the buffer its
memory when it is made; a process gets it page by page, as far as there are gradients."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes of one worker, and parameters of the model."""

    parameters: int
    trained: int
    """Parameters that are trained."""
    weights: int
    """In the precision of the computation, with what ZeRO-3 gathers, and float32 masters
    where they are not the same."""
    gradients: int
    optimizer: int
    """Both moments of AdamW. Without a device, with all that would be offloaded from it."""
    host: int
    """What a worker with a device offloads to its machine's memory."""
    activations: int
    """What a forward pass keeps for the backward pass, and what the latter needs on its way."""
    peak: int
    """Less than the sum: gradients grow while activations go."""
    checkpoint: int
    """On disk, over all workers."""


class _Traced(NamedTuple):
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
    packed: int = 0
    """Parameters that are kept in 4 bits."""
    written: int = 0
    """The most of them that are written out at once."""


class LiveBytes(TorchDispatchMode):
    """While active: the bytes of the tensors that torch's operators make, and their peak."""

    def __init__(self, *known: torch.Tensor) -> None:
        """Leave ``known`` tensors, and their views, out."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = None
        weakref.finalize(storage, self._gone, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, size: int) -> None:
        self.live -= size


def estimate(
    folder: Path,
    load: Load,
    config: TrainingConfig,
    *,
    num_workers: int,
    device: Device | None = None,
) -> Estimate:
    """Memory of one of ``num_workers`` workers that train the model of ``folder``.

    Args:
        folder: With ``config.json``; nothing else of it is read.
        load: The largest batch.
        config: Of the engine.
        num_workers: That share what ZeRO shards.
        device: Of a worker; by default this machine's.

    Raises:
        ModelError: the architecture is not known.
        ConfigError: it cannot compute its layers again, or not in 4 bits, and is told to.
    """
    device = device or of_this_machine(1)
    on_gpu = device.kind == "cuda"
    bf16 = use_bf16(config.precision, on_gpu=on_gpu, has=device.has_bf16)
    traced = _traced(
        folder,
        (folder / "config.json").read_bytes(),
        load,
        TrainingConfig(
            method=config.method,
            lora=config.lora,
            activation_checkpointing=config.activation_checkpointing,
        ),
        torch.bfloat16 if bf16 else torch.float32,
        # torch goes no backward pass through fake tensors of a device that it has no driver of.
        device.kind if torch.cuda.is_available() else "cpu",
    )
    if not on_gpu and not config.is_sparing:
        traced = traced._replace(peak=round(traced.peak * _KEPT))
    return _with_states(traced, config, bf16=bf16, shards=num_workers, device=device.kind)


@lru_cache(maxsize=128)
def _traced(
    folder: Path, _: bytes, load: Load, config: TrainingConfig, dtype: torch.dtype, device: str
) -> _Traced:
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
        forward, peak = _trace(model, load)
        return _Traced(
            sum(count for count, _ in counts),
            sum(count for count, on in counts if on),
            max(count for count, on in counts if on),
            forward,
            peak,
            packed=sum(packed),
            written=max(packed, default=0),
        )


def _with_states(
    traced: _Traced, config: TrainingConfig, *, bf16: bool, shards: int, device: str
) -> Estimate:
    """What is traced, with what DeepSpeed holds of it in each of ``shards`` workers."""
    parameters, trained = traced.parameters, traced.trained
    size = 2 if bf16 else _WHOLE
    share = -(-trained // shards)
    in_place = config.works_in_place(shards)
    masters = 0 if in_place and not bf16 else share * _WHOLE
    weights = (parameters - traced.packed) * size + round(traced.packed * quantization.BYTES)
    gathered = traced.written * size
    gradients, optimizer = trained * size, 2 * share * _WHOLE
    # Of several workers' gradients DeepSpeed sends copies, in a bucket. Then it copies its shard
    # out of the others, and once more into one piece for AdamW, which is fused and adds nothing.
    buckets = shards > 1 or config.zero_stage == 3  # as TrainingConfig.deepspeed has it
    bucket = (_BUCKET * size if device == "cuda" else trained * size) if buckets else 0
    stepping = 0 if in_place else 2 * share * _WHOLE
    reducing = 0
    if config.zero_stage == 3:
        if not config.offload_optimizer:
            bucket += share * size  # reduced gradients have a place of their own
        if shards > 1 or config.offload_parameters:
            gathered = min(parameters, _GATHERED) * size
            weights = -(-parameters // shards) * size
        if shards > 1:  # a bucket's gradients in the order of their shards, and gloo's copy of them
            reducing = min(trained, _BUCKET) * size * (2 if device == "cpu" else 1)
    held = 0 if config.accumulation == 1 else gradients  # of the passes before
    host = 0
    if config.offload_optimizer:
        # Gradients in float32 stay there. ZeRO 3 has those of the pass beside them; 1 and 2 have
        # new weights on their way back, what earlier passes left, and room for a gradient.
        passing = share * size
        if config.zero_stage < 3:
            passing += traced.largest * size + (share * size if held else 0)
            bucket += traced.largest * size
        host = masters + optimizer + share * _WHOLE + passing
        masters = optimizer = stepping = 0
    if config.offload_parameters:
        host += weights
        weights = 0
    # A worker without a device has its machine's memory only.
    optimizer, host = (optimizer + host, 0) if device == "cpu" else (optimizer, host)
    weights += masters
    peak = max(gathered + held + max(traced.peak, reducing), gradients + stepping)
    return Estimate(
        parameters=parameters,
        trained=trained,
        weights=weights + gathered,
        gradients=gradients + bucket,
        optimizer=optimizer,
        host=host,
        activations=traced.activations,
        peak=weights + optimizer + bucket + peak,
        checkpoint=(trained * size if config.zero_stage < 3 else 0) + 3 * trained * _WHOLE,
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


def _trace(model: Any, load: Load) -> tuple[int, int]:
    """(bytes that the forward passes leave, peak of these and the backward pass with gradients)."""
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
    return forward, live.peak


class PeakMemory:
    """The most memory that this process took since the object was made, beyond what it had then.

    Of the device where there is one. On systems without ``/proc`` it is 0.
    """

    def __init__(self) -> None:
        self._before = self._most = 0
        if not torch.cuda.is_available():
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                # What was freed before and kept for later would be taken again unseen.
                ctypes.CDLL(None).malloc_trim(0)
            self._before = _status("VmRSS")
        self._forget()

    def lap(self) -> int:
        """The most since the last lap."""
        if torch.cuda.is_available():
            found = torch.cuda.max_memory_allocated()
        else:
            found = max(0, _status("VmHWM") - self._before)
        self._forget()
        self._most = max(self._most, found)
        return found

    def bytes(self) -> int:
        """Until now."""
        return max(self.lap(), self._most)

    @staticmethod
    def _forget() -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        # Where that is not allowed, the peak is of the whole process's life.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    """Bytes that ``/proc/self/status`` tells of this process."""
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
