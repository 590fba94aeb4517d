"""How much text one backward pass of each task has been through: what its memory depends on.

Every text counts as long as ``max_tokens``; the batches of a run are padded to their own longest
one and mostly take less.
"""

from __future__ import annotations

from typing import Any

from fusionrec.language.models import read_json, resolve
from fusionrec.training import pieces
from fusionrec.training.objectives.pretraining import PretrainingTask
from fusionrec.training.objectives.settings import HEAD
from fusionrec.training.traced import Architecture, Load, Pass, Reads


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
        letters = settings.prompt == "letters"
        passes = _cut(batch_size if letters else pairs, batch_size if letters else 2 * batch_size)
    elif task == "pretraining":
        kind, head = _language_model(settings), PretrainingTask.head
        share = settings.mask_share if kind is Architecture.MASKED_LM else 1.0
        passes = [Pass(batch_size, Reads.TOKENS, share)]
    elif task == "distillation" and settings.student == "encoder":
        kind, head = Architecture.BACKBONE, ()
        passes = _cut(batch_size, batch_size, Reads.HIDDEN)
        passes += _cut(pairs, 2 * batch_size, Reads.HIDDEN)
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
    elif task == "rating":
        passes = _cut(batch_size, batch_size)
    else:
        passes = _cut(pairs, 2 * batch_size)
    return Load(
        architecture=kind,
        passes=tuple(passes),
        tokens=settings.max_tokens,
        head=head,
        towers=settings.towers if task == "encoder" else 1,
    )


def _cut(rows: int, at_least: int, reads: Reads = Reads.ANSWER) -> list[Pass]:
    """A pass for each piece of a batch; see :mod:`fusionrec.training.pieces`."""
    return [Pass(size, reads) for size in pieces.sizes(rows, at_least)]


def _language_model(settings: Any) -> Architecture:
    """Masked where the tokenizer has a mask, as the task decides."""
    folder = resolve(settings.encoder, settings.revision)
    known = read_json(folder / "tokenizer_config.json")
    known = read_json(folder / "special_tokens_map.json") | known
    return Architecture.MASKED_LM if known.get("mask_token") else Architecture.CAUSAL_LM
