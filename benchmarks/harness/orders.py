"""A decoder that reads whole lists, made small and random where no trained one is at hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.heads import Heads
from benchmarks.harness.training import write_llama
from fusionrec.config import Config
from fusionrec.evaluation.orders import OrderSensitivity, order_sensitivity
from fusionrec.language.decoder import LETTERS, DecoderReranker

PROMPT_TOKENS = 512


class Ordered(Config):
    """A decoder on test lists."""

    name: str
    sensitivity: OrderSensitivity | None
    """Null where it says the same of all candidates."""
    ndcg: float
    """Of its order alone, the candidates shown as they are fused."""
    ms: float
    """Milliseconds of a list."""


def write_decoder(folder: Path, texts: list[str], width: int) -> None:
    """A random Llama of four layers, with a tokenizer of ``texts`` that has every letter."""
    answers = [f"\nAnswer: {letter}" for letter in LETTERS] * 50
    size = {"hidden_size": width, "num_hidden_layers": 4, "intermediate_size": 3 * width}
    write_llama(folder, [*texts, *answers], size | {"max_position_embeddings": PROMPT_TOKENS})


def ordered(untrained: Path, trained: Path, heads: Heads, count: int, k: int) -> list[Ordered]:
    """Both decoders, and the trained one with four orders averaged, on the same ``count`` lists."""
    plain = DecoderReranker.load(trained)
    several = plain.config.model_copy(update={"orders": 4})
    decoders = {
        "untrained": DecoderReranker.load(untrained, config=plain.config),
        "trained": plain,
        "trained, mean of four orders": DecoderReranker.load(trained, config=several),
    }
    found = []
    for name, decoder in decoders.items():
        reading = heads.read(decoder)  # leaves it in the pipeline, which score asks
        score, histories, items = heads.shown(count)
        told = order_sensitivity(score, histories, items)
        ndcg = float(heads.alone(reading.scores, k).mean())
        found.append(Ordered(name=name, sensitivity=told, ndcg=ndcg, ms=reading.ms))
    return found
