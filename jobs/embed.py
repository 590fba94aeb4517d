"""Encode a pipeline's catalogue: ``python -m jobs.embed --pipeline DIR``.

Reads ``catalogue.parquet`` and leaves ``encoder/`` and ``vectors.npy`` (float32 [I, D], in the
catalogue's order) in the pipeline directory. Ray Data streams the items through a pool of encoders;
on a cluster the directory must be on storage that all nodes see.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
import torch
from pydantic import Field

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.text import item_texts
from fusionrec.errors import DataError
from fusionrec.language.encoder import ITEM_TOWER, Encoder, has_two_towers
from fusionrec.language.models import DEFAULT_MODEL, resolve
from fusionrec.progress import bar
from jobs import cluster
from jobs.entry import run

_BLOCK = 256
"""Items a task encodes: enough for batches of similar length, few enough for a moving bar."""


class EmbedConfig(JobConfig):
    """Settings of ``jobs.embed``."""

    pipeline: Path
    """Pipeline directory with catalogue.parquet."""
    encoder: str = DEFAULT_MODEL
    """package:NAME, a folder that jobs.finetune left, or a name on the hub."""
    revision: str | None = None
    """Commit of a hub model, 40 hexadecimal digits."""
    history_items: int | None = Field(default=None, ge=1)
    """Newest items that make the text of a history; by default the encoder's own."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Tokens read of a text; by default the encoder's own."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep the first so many of a vector: for encoders fine-tuned with the same --dimensions; by
    default the encoder's own."""
    batch_size: int = Field(default=64, ge=1)
    """Texts in one pass of the model."""
    num_workers: int = Field(default=1, ge=1)
    """Encoders at work side by side."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each encoder; by default this machine's CPUs shared out among them."""


def embed(config: EmbedConfig) -> npt.NDArray[np.float32]:
    """Write the encoder and the vectors; returns the vectors, memory-mapped.

    Until both are whole, those of an earlier run stay.

    Raises:
        DataError: the directory has no catalogue, or the catalogue has no text.
        ModelError: the encoder cannot be had, or has fewer dimensions.
    """
    catalogue = _catalogue(config.pipeline)
    source = resolve(config.encoder, config.revision)
    encoder = _encoder(config, items=False)
    new_encoder = config.pipeline / ".encoder.partial"
    new_vectors = config.pipeline / ".vectors.npy.partial"
    shutil.rmtree(new_encoder, ignore_errors=True)
    try:
        encoder.save(new_encoder)
        if has_two_towers(source):
            _encoder(config, items=True).save(new_encoder / ITEM_TOWER)
        dimension = encoder.dimension
        del encoder  # the workers load their own
        _encode(item_texts(catalogue), dimension, new_encoder, new_vectors, config)
        forget_measurements(config.pipeline)  # before: they must never stand beside another model
        shutil.rmtree(config.pipeline / "encoder", ignore_errors=True)
        new_encoder.rename(config.pipeline / "encoder")
        new_vectors.replace(config.pipeline / "vectors.npy")
    finally:
        shutil.rmtree(new_encoder, ignore_errors=True)
        new_vectors.unlink(missing_ok=True)
    vectors: npt.NDArray[np.float32] = np.load(config.pipeline / "vectors.npy", mmap_mode="r")
    return vectors


def _encoder(config: EmbedConfig, *, items: bool) -> Encoder:
    """One of the towers, where there are two, with the settings of the job."""
    encoder = Encoder.load(config.encoder, revision=config.revision, device="cpu", items=items)
    names = ("history_items", "max_tokens", "dimensions")
    changes = {name: getattr(config, name) for name in names}
    settings = encoder.config.model_copy(update={k: v for k, v in changes.items() if v is not None})
    return Encoder(encoder.model, encoder.tokenizer, settings)


def _catalogue(pipeline: Path) -> Catalogue:
    path = pipeline / "catalogue.parquet"
    if not path.is_file():
        raise DataError(
            f"--pipeline {pipeline} has no catalogue.parquet; make it with "
            f"`python -m jobs.fit --dataset DIR --pipeline {pipeline} --prepare`"
        )
    catalogue = Catalogue.load(path)
    if not catalogue.has_text:
        raise DataError(
            f"no item of {path} has a title or a description for an encoder to read; "
            "go on without jobs.embed"
        )
    return catalogue


def _encode(
    texts: list[str], dimension: int, encoder: Path, out: Path, config: EmbedConfig
) -> None:
    """Encode ``texts`` on Ray into the array file ``out``."""
    # Neighbours of similar length, longest first, so that no long block is left to the end.
    order = sorted(range(len(texts)), key=lambda code: -len(texts[code]))
    blocks = [
        pa.table({"code": part, "text": [texts[code] for code in part]})
        for part in (order[start : start + _BLOCK] for start in range(0, len(order), _BLOCK))
    ]
    shape = (len(texts), dimension)
    vectors = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
    with cluster.start(), bar("Encode the catalogue", len(texts)) as advance:
        cluster.quiet_data()
        encoded = _map_encoder(ray.data.from_arrow(blocks), encoder, config)
        for batch in encoded.iter_batches(batch_size=None, batch_format="numpy"):
            vectors[batch["code"]] = batch["vector"]
            advance(len(batch["code"]))
    vectors.flush()


def _map_encoder(texts: ray.data.Dataset, encoder: Path, config: EmbedConfig) -> ray.data.Dataset:
    """``texts`` with their vectors, lazily."""
    threads = config.threads or max(1, (os.cpu_count() or 1) // config.num_workers)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    # Nodes of a cluster come and go, and Ray Data restarts encoders without end. On one machine,
    # what a worker died of (memory, as a rule) would kill the next one too: stop and say so.
    restarts: dict[str, Any] = {} if os.environ.get("RAY_ADDRESS") else {"max_restarts": 0}
    with warnings.catch_warnings():
        # The argument goes away in Ray 2.64; no other says it in 2.60.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        return texts.map_batches(
            _Embedder,
            fn_constructor_args=(str(encoder.resolve()), threads, config.batch_size),
            batch_size=_BLOCK,
            compute=ray.data.ActorPoolStrategy(size=config.num_workers),
            num_cpus=1,
            num_gpus=1 if resources.get("GPU") else 0,
            **restarts,
        )


class _Embedder:
    """An encoder in a worker process."""

    def __init__(self, folder: str, threads: int, batch_size: int) -> None:
        torch.set_num_threads(threads)  # Ray gives a worker as many as its CPUs, here one
        self.encoder = Encoder.load(folder, items=True)
        self.batch_size = batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        vectors = self.encoder.encode([str(text) for text in batch["text"]], self.batch_size)
        return {"code": batch["code"], "vector": vectors}


def main() -> None:
    """Entry point."""
    config = parse(EmbedConfig)
    vectors = embed(config)
    print(f"{config.pipeline / 'vectors.npy'}: {vectors.shape[0]} × {vectors.shape[1]}")


if __name__ == "__main__":
    run(main)
