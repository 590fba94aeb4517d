"""How much text one backward pass of each task has been through: what its memory depends on.

Every text counts as long as ``max_tokens``; the batches of a run are padded to their own longest
one and mostly take less.
"""

from __future__ import annotations

from typing import Any

from fusionrec.language.models import read_json, resolve
from fusionrec.training.memory import Architecture, Load, Pass, Reads
from fusionrec.training.objectives.settings import HEAD


def load_of(task: str, settings: Any, batch_size: int, num_negatives: int) -> Load:
    """The largest batch of a worker.

    Args:
        task: As ``jobs.finetune --task`` calls it.
        settings: Of that task.
        batch_size: Examples of a forward pass.
        num_negatives: Of an example, where it has any.
    """
    pairs = batch_size * (1 + num_negatives)
    kind = Architecture.CLASSIFIER
    head: tuple[str, ...] = HEAD
    if task == "encoder":
        kind, head = Architecture.BACKBONE, ()
        # GradCache computes without, then holds one chunk at a time.
        towers = [batch_size, batch_size * (1 + settings.mined_negatives)]
        chunk = settings.grad_cache
        if chunk is not None:
            towers = [min(chunk, max(towers))]
        passes = [Pass(rows, Reads.HIDDEN) for rows in towers]
    elif task == "decoder":
        kind, head = Architecture.CAUSAL_LM, ()
        rows = batch_size if settings.prompt == "letters" else pairs
        passes = [Pass(rows, Reads.ANSWER)]
    elif task == "pretraining":
        kind, head = _language_model(settings), ()
        share = settings.mask_share if kind is Architecture.MASKED_LM else 1.0
        passes = [Pass(batch_size, Reads.TOKENS, share)]
    elif task == "distillation" and settings.student == "encoder":
        kind, head = Architecture.BACKBONE, ()
        passes = [Pass(batch_size, Reads.HIDDEN), Pass(pairs, Reads.HIDDEN)]
    elif task == "multi-task":
        parts = [load_of(p, settings.of(p), batch_size, num_negatives) for p in settings.objectives]
        # One transformer; of the heads only that of the vocabulary is large.
        kinds = [part.architecture for part in parts]
        speaking = (Architecture.MASKED_LM, Architecture.CAUSAL_LM)
        kind = next((k for k in kinds if k in speaking), kinds[0])
        hidden = {Reads.HIDDEN, Reads.ANSWER}
        passes = [
            each._replace(reads=Reads.HIDDEN) if each.reads in hidden else each
            for part in parts
            for each in part.passes
        ]
        head = tuple({name for part in parts for name in part.head})
    else:
        passes = [Pass(batch_size if task == "rating" else pairs, Reads.ANSWER)]
    return Load(
        architecture=kind,
        passes=tuple(passes),
        tokens=settings.max_tokens,
        head=head,
        towers=settings.towers if task == "encoder" else 1,
    )


def _language_model(settings: Any) -> Architecture:
    """Masked where the tokenizer has a mask, as the task decides."""
    folder = resolve(settings.encoder, settings.revision)
    known = read_json(folder / "tokenizer_config.json")
    known = read_json(folder / "special_tokens_map.json") | known
    return Architecture.MASKED_LM if known.get("mask_token") else Architecture.CAUSAL_LM
