"""The settings nearest to those asked for that fit: nearest change the result least.

First come those that change nothing in it, fewest at a time, and cost time only: activation
checkpointing, a higher ZeRO stage, offloading from a GPU, and the encoder's GradCache. Then smaller
batches, as many more of them a step: the same gradient up to rounding, where examples of a batch
are not compared with each other. Then LoRA, its weights in 4 bits, shorter texts, and at last, of
what is compared in its batch, smaller batches after all.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias

from fusionrec.training.config import Method, TrainingConfig
from fusionrec.training.tasks import TaskSettings

Fits: TypeAlias = Callable[[TaskSettings, TrainingConfig], bool]

_SHORTEST = 16
"""Tokens of a text that are worth reading."""


class Setting(NamedTuple):
    """What a run would be told instead."""

    task: TaskSettings
    training: TrainingConfig
    flags: tuple[str, ...] = ()
    """That are to be given as well."""

    def with_task(self, flag: str, **update: Any) -> Setting:
        """The same with another setting of the task."""
        return Setting(self.task.model_copy(update=update), self.training, (*self.flags, flag))

    def with_training(self, flag: str, **update: Any) -> Setting:
        """The same with another setting of the engine."""
        return Setting(self.task, self.training.model_copy(update=update), (*self.flags, flag))


def nearest(asked: Setting, fits: Fits, *, num_workers: int, on_gpu: bool) -> Setting | None:
    """The nearest setting that fits; None where there is none.

    Args:
        asked: What does not fit.
        fits: Whether a worker has the memory; the less there is of a batch, the less it takes.
        num_workers: That can share weights, gradients and states.
        on_gpu: Whether there is something to offload from.
    """

    def largest(sizes: Sequence[int], of: Callable[[int], Setting]) -> Setting | None:
        """Of the first of descending ``sizes`` that fits."""

        def fit(size: int) -> bool:
            return fits(of(size).task, of(size).training)

        if not sizes or not fit(sizes[-1]):
            return None
        return of(sizes[bisect_left(sizes, True, key=fit)])

    def smaller(base: Setting) -> Setting | None:
        batch, times = base.training.batch_size, base.training.accumulation

        def of(size: int) -> Setting:
            more = times * (batch // size)
            flag = f"--batch-size {size} --accumulation {more}"
            return base.with_training(flag, batch_size=size, accumulation=more)

        return largest([n for n in range(batch // 2, 0, -1) if batch % n == 0], of)

    def chunked(base: Setting) -> Setting | None:
        most = getattr(base.task, "grad_cache", None) or base.training.batch_size
        sizes = [2**power for power in reversed(range(most.bit_length())) if 2**power < most]
        return largest(sizes, lambda n: base.with_task(f"--grad-cache {n}", grad_cache=n))

    caches = hasattr(asked.task, "grad_cache")
    tried = []
    for changed in _lossy(asked):
        exact = sorted(_exact(changed, num_workers, on_gpu=on_gpu), key=lambda s: len(s.flags))
        tried += exact
        # GradCache is a flag more.
        steps = [(len(each.flags), False, each) for each in exact]
        steps += [(len(each.flags) + 1, True, each) for each in exact if caches]
        for _, chunks, each in sorted(steps, key=lambda step: step[:2]):
            found = chunked(each) if chunks else each
            if found is not None and (chunks or fits(each.task, each.training)):
                return found
        if not asked.task.compares_batch:
            found = next(filter(None, map(smaller, exact)), None)
            if found is not None:
                return found
    if asked.task.compares_batch:
        return next(filter(None, map(smaller, tried)), None)
    return None


def _lossy(asked: Setting) -> Iterator[Setting]:
    """What changes the result, from nothing to more."""
    yield asked
    method, packed = asked.training.method, importlib.util.find_spec("bitsandbytes") is not None
    adapted = [asked]
    if method in (Method.FULL, Method.DORA):
        adapted.append(asked.with_training("--method lora", method=Method.LORA))
        yield adapted[-1]
    if method is not Method.QLORA and asked.training.zero_stage < 3 and packed:
        yield asked.with_training("--method qlora", method=Method.QLORA)
    for base, parts in product(adapted, (2, 4)):
        tokens = asked.task.max_tokens // parts
        if tokens >= _SHORTEST:
            yield base.with_task(f"--max-tokens {tokens}", max_tokens=tokens)


def _exact(base: Setting, num_workers: int, *, on_gpu: bool) -> Iterator[Setting]:
    """The setting, and with what only takes more time: the cheaper first."""
    config = base.training
    level = config.offload_optimizer + config.offload_parameters
    levels = range(level, 3 if on_gpu else level + 1)
    stages = range(config.zero_stage, 3 if config.method is Method.QLORA else 4)
    again = (False,) if config.activation_checkpointing else (False, True)
    for offloaded, stage, checkpointed in product(levels, stages, again):
        shards = stage > config.zero_stage
        if offloaded == 2 and stage < 3:
            continue  # weights are offloaded by ZeRO 3 only
        if shards and num_workers == 1 and offloaded < 2:
            continue
        found = base
        if checkpointed:
            found = found.with_training("--activation-checkpointing", activation_checkpointing=True)
        if shards:
            found = found.with_training(f"--zero-stage {stage}", zero_stage=stage)
        if offloaded > level and not config.offload_optimizer:
            found = found.with_training("--offload-optimizer", offload_optimizer=True)
        if offloaded > level and offloaded == 2 and not config.offload_parameters:
            found = found.with_training("--offload-parameters", offload_parameters=True)
        yield found
