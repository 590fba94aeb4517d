"""RecBole's models on our split, in a process of its own: what they list goes to a file.

RecBole is not among our packages, since it wants old versions of some of them; ``make recbole``
puts it into a folder that this process has on its path. It has its own settings, loaders and loop,
but not torch's anomaly mode, which it turns on for all models on import and which slows it down.

Shape legend: B cases, N events of all training histories, C places of a list.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from pydantic import Field
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.utils import get_model, get_trainer, init_seed

from benchmarks.harness.memory import peak_mib
from fusionrec.config import JobConfig, parse
from fusionrec.data.histories import CodeArray, FloatArray, Histories
from jobs.entry import run

NAME = "events"
BLOCK = 512
"""Cases that are asked together."""


class RecBoleConfig(JobConfig):
    """Fit one model of RecBole, ask it the test cases."""

    model: Literal["SASRec", "EASE"]
    """Which one, with RecBole's own settings."""
    material: Path
    """Training histories and what is asked: arrays train_items, asked_items and so on."""
    out: Path
    """Folder; the lists go to lists.npz in it."""
    depth: int = Field(default=100, ge=1)
    """C, the length of the lists."""
    minutes: float = Field(default=10.0, gt=0)
    """SASRec begins epochs for so long."""
    threads: int = Field(default=1, ge=1)
    """Of torch and of numpy's algebra."""
    seed: int = Field(default=0, ge=0)
    """Of everything."""


def fitted(config: RecBoleConfig, train: Histories) -> tuple[Any, Any, list[float]]:
    """The model, its data set, and the seconds of each epoch (of the whole fit for EASE)."""
    folder = config.out / NAME
    folder.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(train.items)) - train.offsets[train.rows]
    rows = np.stack([train.rows, train.items, order], axis=1)
    head = "user_id:token\titem_id:token\ttimestamp:float"
    np.savetxt(folder / f"{NAME}.inter", rows, "%d", delimiter="\t", header=head, comments="")
    for name, kind in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        setattr(np, name, kind)  # what RecBole calls them; numpy 2 does not
    theirs: Any = Config(
        model=config.model,
        dataset=NAME,
        config_dict={
            "data_path": str(config.out.resolve()),
            "checkpoint_dir": str(config.out.resolve()),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "eval_args": {
                "split": {"RS": [1.0, 0.0, 0.0]},  # all of it is training data
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            **({"train_neg_sample_args": None} if config.model == "SASRec" else {}),
            "use_gpu": False,
            "state": "ERROR",
            "seed": config.seed,
        },
    )
    init_seed(theirs["seed"], theirs["reproducibility"])
    dataset = create_dataset(theirs)
    known, _, _ = dataset.build()
    torch.autograd.set_detect_anomaly(False)
    began = time.perf_counter()
    model = get_model(theirs["model"])(theirs, known).to(theirs["device"])
    if config.model == "EASE":
        return model, dataset, [time.perf_counter() - began]
    loader = get_dataloader(theirs, "train")(theirs, known, None, shuffle=True)
    trainer = get_trainer(theirs["MODEL_TYPE"], theirs["model"])(theirs, model)
    spent: list[float] = []
    while sum(spent) < 60 * config.minutes:
        trainer.start_epoch, trainer.epochs = len(spent), len(spent) + 1
        began = time.perf_counter()
        trainer.fit(loader, verbose=False, saved=False)
        spent.append(time.perf_counter() - began)
    return model.eval(), dataset, spent


def listed(
    model: Any, dataset: Any, asked: Histories, depth: int
) -> tuple[CodeArray, FloatArray, float]:
    """[B, C] items and scores without those of the histories, and the seconds they took."""
    # Theirs are numbered from 1 in another order; what was never trained on has no number.
    tokens = dataset.field2id_token[dataset.iid_field]
    codes = np.array([-1, *map(int, tokens[1:])], dtype=np.int32)
    number_of = np.zeros(max(int(asked.items.max()), int(codes.max())) + 1, dtype=np.int64)
    number_of[codes[1:]] = np.arange(1, len(codes))
    began = time.perf_counter()
    numbers, sequential = number_of[asked.items], hasattr(model, "ITEM_SEQ")
    if not sequential:
        ones = np.ones(len(numbers), dtype=np.float32)
        shape = (len(asked), len(codes))
        model.interaction_matrix = sp.csr_matrix((ones, (asked.rows, numbers)), shape=shape)
    items, scores = [], []
    for start in range(0, len(asked), BLOCK):
        stop = min(start + BLOCK, len(asked))
        bounds = asked.offsets[start + 1 : stop] - asked.offsets[start]
        of_block = np.split(numbers[asked.offsets[start] : asked.offsets[stop]], bounds)
        if sequential:
            length = model.max_seq_length
            newest = [row[row > 0][-length:] for row in of_block]
            padded = np.stack([np.pad(row, (0, length - len(row))) for row in newest])
            question = {
                model.ITEM_SEQ: torch.from_numpy(padded),
                model.ITEM_SEQ_LEN: torch.tensor([max(len(row), 1) for row in newest]),
            }
        else:
            question = {model.USER_ID: torch.arange(start, stop)}
        with torch.no_grad():
            found = model.full_sort_predict(Interaction(question)).reshape(stop - start, -1)
        found[:, 0] = -torch.inf
        for row, seen in enumerate(of_block):
            found[row, torch.from_numpy(seen)] = -torch.inf
        best = found.topk(min(depth, found.shape[1]))
        places = codes[best.indices.numpy()]
        items.append(np.where(torch.isinf(best.values).numpy(), -1, places).astype(np.int32))
        scores.append(best.values.numpy().astype(np.float32))
    return np.concatenate(items), np.concatenate(scores), time.perf_counter() - began


def main() -> None:
    """Parse, fit, ask, write."""
    config = parse(RecBoleConfig)
    torch.set_num_threads(config.threads)
    with np.load(config.material, allow_pickle=False) as arrays:
        train, asked = (
            Histories(*(arrays[f"{name}_{part}"] for part in ("items", "timestamps", "offsets")))
            for name in ("train", "asked")
        )
    config.out.mkdir(parents=True, exist_ok=True)
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    os.chdir(config.out)  # where it leaves its logs
    before_mib = peak_mib()
    model, dataset, spent = fitted(config.model_copy(update={"out": Path()}), train)
    fitted_mib = peak_mib()
    items, scores, seconds = listed(model, dataset, asked, config.depth)
    np.savez(
        "lists.npz",
        items=items,
        scores=scores,
        spent_s=spent,
        seconds=seconds,
        before_mib=before_mib,
        peak_mib=fitted_mib,
    )


if __name__ == "__main__":
    run(main)
