"""The report of ``benchmarks.distillation``: what was found, as Markdown.

Shape legend: B cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.encoders import OPTIONS
from benchmarks.harness.heads import Heads, Model, Reading, kept, weighed
from benchmarks.harness.orders import Ordered
from benchmarks.harness.reranking import by_length
from benchmarks.harness.tables import table
from fusionrec.evaluation.ranks import RealArray
from fusionrec.evaluation.significance import (
    BootstrapConfig,
    Comparison,
    bootstrap_means,
    compare,
    estimate,
)
from fusionrec.fusion.model import Fusion
from fusionrec.language.precision import Precision
from jobs.optimise import Choice
from jobs.prune import Pruning

TEACHER = "teacher"
CROSS_ENCODERS = "small, before", "small, without teacher", "small, margin-MSE", "small, KL"
ENCODERS = "encoder, before", "encoder, without teacher", "encoder, KL"
SMALLER = "teacher, int8", "pruned", "pruned, taught again", "pruned, taught again, int8"
MODELS = {
    TEACHER: Model(Path("teacher"), "reranker"),
    "small, before": Model(Path("untaught"), "reranker"),
    "small, without teacher": Model(Path("student"), "reranker"),
    "small, margin-MSE": Model(Path("student-margin-mse"), "reranker"),
    "small, KL": Model(Path("student-kl"), "reranker"),
    "encoder, before": Model(Path("small"), "encoder"),
    "encoder, without teacher": Model(Path("encoder"), "encoder"),
    "encoder, KL": Model(Path("encoder-kl"), "encoder"),
    "teacher, int8": Model(Path("teacher"), "reranker", Precision.INT8),
    "pruned": Model(Path("pruned"), "reranker"),
    "pruned, taught again": Model(Path("healed"), "reranker"),
    "pruned, taught again, int8": Model(Path("healed"), "reranker", Precision.INT8),
}
"""All that read lists, in folders of the runs that leave them."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All that the steps left."""

    heads: tuple[Heads, Heads]
    """Of validation and test."""
    fusion: Fusion
    readings: Mapping[str, tuple[Reading, Reading]]
    """By model, of validation and test."""
    pruning: Pruning
    chosen: Sequence[Sequence[Any]]
    """By ``jobs.optimise``: model, NDCG and ms in float32, in int8, and what is served."""
    orders: Sequence[Ordered]
    options: Mapping[str, Sequence[tuple[int, Sequence[float], Sequence[float]]]]
    """By option: dimensions, NDCG of each validation and of each test case."""
    sizes: Mapping[str, Mapping[str, float]]
    """By model: its ``weights``, and ``mib`` on disk."""
    seconds: Mapping[str, float]
    """By step."""
    bootstrap: BootstrapConfig
    seed: int
    k: int

    def alone(self, name: str) -> tuple[RealArray, RealArray]:
        """[B] NDCG of the model's order alone, of each part."""
        validation, test = (
            heads.alone(reading.scores, self.k)
            for heads, reading in zip(self.heads, self.readings[name], strict=True)
        )
        return validation, test

    def both(self, name: str) -> RealArray:
        """The same of both parts in a row: nothing of the order alone was chosen on either."""
        return np.concatenate(self.alone(name))

    def compared(self, names: tuple[str, str], values: Sequence[RealArray]) -> Comparison:
        """The first against the second."""
        return compare("ndcg", names, np.stack(values, axis=1), self.bootstrap)

    def told(self, values: RealArray) -> str:
        """``mean [low, high]``."""
        draws = bootstrap_means(values[:, None], self.bootstrap)[:, 0]
        found = estimate(values.mean(), draws, self.bootstrap.level)
        return f"{found.mean:.4f} [{found.low:.4f}, {found.high:.4f}]"


def report(found: Findings) -> str:
    """All sections."""
    return "\n".join(
        (
            _lists(found),
            _kept(found),
            _compressed(found),
            _by_length(found),
            _orders(found),
            _encoders(found),
            _seconds(found),
        )
    )


def _lists(found: Findings) -> str:
    validation, test = found.heads
    fused = [heads.fused(found.k) for heads in found.heads]
    rows = [("fused order", "", "", "", found.told(fused[1]), found.told(np.concatenate(fused)))]
    columns = ["model", "million weights", "MiB", "ms a list", "alone, test", "alone, both parts"]
    told = [(*row, "", "", "") for row in rows]
    for name in MODELS:
        reading, size = found.readings[name], found.sizes[name]
        alone = found.alone(name)
        lists = [h.lists(r.scores) for h, r in zip(found.heads, reading, strict=True)]
        own = weighed(found.fusion, lists[0], lists[1], found.seed, found.k)
        base = lists[1].ndcg(0.0, found.k)
        gates = " / ".join(f"{weight:.2f}" for weight in own.gates.values())
        told.append(
            (
                name,
                f"{size['weights'] / 1e6:.1f}",
                f"{size['mib']:.0f}",
                f"{reading[1].ms:.1f}",
                found.told(alone[1]),
                found.told(np.concatenate(alone)),
                difference(found.compared(("reranked", "fused"), (own.best, base))),
                gates,
                difference(found.compared(("gated", "fused"), (own.gated, base))),
            )
        )
    columns += ["beside the fusion, test", "gate", "with the gate, test"]
    return (
        "## Lists\n\n"
        f"The fused lists of {len(validation.cases):,} validation and {len(test.cases):,} test "
        f"cases, of which {len(validation.hits):,} and {len(test.hits):,} hold a target within the "
        "places that are reranked; these were read, in bf16 where the machine has it, unless int8 "
        f"is said. *Alone*: NDCG@{found.k} [95%] of these places in the model's order, in which "
        "all lists count; a cross-encoder has a random head before, and so a random order. "
        "*Beside the fusion*: what its term adds to the fused list with the best single weight on "
        "validation; *gate*: the weights by segment that `tuning.reranking` gives it, which asks "
        "whether they hold on cases that did not choose, and what these add.\n\n"
        + table(columns, told)
    )


def served(choice: Choice) -> list[Any]:
    """What JSON keeps of it, for :attr:`Findings.chosen`."""
    measured, seconds = choice.best.measured, choice.best.seconds
    exact, faster = (measured.fp32, 1e3 * choice.fp32_s), (measured.faster, 1e3 * seconds)
    return [choice.model, *exact, *faster, str(choice.precision)]


def difference(found: Comparison) -> str:
    """``+mean [low, high]``."""
    own = found.difference
    return f"{own.mean:+.4f} [{own.low:+.4f}, {own.high:+.4f}]"


def _kept(found: Findings) -> str:
    fused = np.concatenate([heads.fused(found.k) for heads in found.heads])
    teacher = found.both(TEACHER)
    against = found.compared((TEACHER, "fused"), (teacher, fused))
    beats = against.difference.low > 0
    lines = [
        f"Over both parts the teacher's order alone is worth {against.mean_a:.4f} and the fused "
        f"one {against.mean_b:.4f}: {difference(against)}, p = {against.p_value:.3f}. "
        + (
            "It gains over the fusion."
            if beats
            else "The teacher does not beat the fused order: what follows is its gain over models "
            "that have read no lists."
        )
    ]
    whole = found.compared((TEACHER, "small, before"), (teacher, found.both(CROSS_ENCODERS[0])))
    rows: list[tuple[str, ...]] = [(TEACHER, difference(whole), "100%", "", "", "1.0 ×")]
    for start, *students in (CROSS_ENCODERS, ENCODERS):
        untaught = found.both(start)
        plain = found.both(students[0])
        for name in students:
            own = found.both(name)
            share = kept(own, teacher, untaught, found.bootstrap)
            gain = found.compared((name, start), (own, untaught))
            cell = "" if share is None else f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"
            beside = found.compared((name, students[0]), (own, plain))
            rows.append(
                (
                    name,
                    difference(gain),
                    cell,
                    "" if name == students[0] else difference(beside),
                    "" if name == students[0] else f"{beside.p_value:.3f}",
                    f"{found.readings[TEACHER][1].ms / found.readings[name][1].ms:.1f} ×",
                )
            )
    columns = (
        "model",
        "over what it started from",
        "share of the teacher's gain",
        "over the same without teacher",
        "p",
        "lists/s of the teacher's",
    )
    return "### What is kept\n\n" + "\n\n".join(lines) + "\n\n" + table(columns, rows)


def _compressed(found: Findings) -> str:
    gone = ", ".join(f"{each.layer} ({each.likeness:.3f})" for each in found.pruning.dropped)
    before, after = found.pruning.before, found.pruning.after
    assert before is not None
    assert after is not None
    taught = "was put" if found.pruning.kept else "was not put"
    text = (
        "### Pruning, teaching again, int8\n\n"
        f"`jobs.prune` dropped these layers of the teacher, each with the correlation of the "
        f"scores that was left: {gone}. Of the served list, with the best single weight on "
        f"validation, whatever the gate says, NDCG@10 went from {before.ndcg:.4f} to "
        f"{after.ndcg:.4f}, and the reranker's "
        f"time from {1e3 * before.rerank_s:.1f} to {1e3 * after.rerank_s:.1f} ms: it {taught} "
        "into the pipeline. Taught again by the whole one, over both parts its order is worth:\n\n"
    )
    rows = []
    teacher = found.both(TEACHER)
    for name in SMALLER:
        own = found.compared((name, TEACHER), (found.both(name), teacher))
        ratio = found.readings[TEACHER][1].ms / found.readings[name][1].ms
        rows.append(
            (name, f"{own.mean_a:.4f}", difference(own), f"{own.p_value:.3f}", f"{ratio:.2f} ×")
        )
    text += table(("model", f"NDCG@{found.k} alone", "to the teacher", "p", "lists/s"), rows)
    for model, exact, exact_ms, faster, faster_ms, served in found.chosen:
        text += (
            f"\n`jobs.optimise` measured the {model} in float32 at NDCG@10 {exact:.4f} and "
            f"{exact_ms:.1f} ms a history, in int8 at {faster:.4f} and {faster_ms:.1f} ms, and "
            f"serves it in {served}.\n"
        )
    return text


def _by_length(found: Findings) -> str:
    columns = ("history length", "cases", "fused", "reranked", "difference [95%]", "p")
    students = CROSS_ENCODERS[2:]
    best = max(students, key=lambda name: float(found.alone(name)[0].mean()))
    parts = ["### By the length of the history\n"]
    for name in (TEACHER, best):
        lists = [h.lists(r.scores) for h, r in zip(found.heads, found.readings[name], strict=True)]
        weight, rows = by_length(lists[0], lists[1], found.bootstrap, found.k)
        parts.append(
            f"{name[0].upper()}{name[1:]}, its weight {weight:.3f} everywhere, the best single one "
            f"on validation; test cases.\n\n{table(columns, rows)}"
        )
    return "\n".join(parts)


def _orders(found: Findings) -> str:
    rows = []
    for each in found.orders:
        own = each.sensitivity
        cells = ("", "") if own is None else (f"{own.tau:.3f}", f"{own.same_first:.0%}")
        rows.append((each.name, *cells, f"{each.ndcg:.4f}", f"{each.ms:.1f}"))
    cases = max((o.sensitivity.num_cases for o in found.orders if o.sensitivity), default=0)
    columns = ("decoder", "Kendall's tau", "same first", f"NDCG@{found.k} alone", "ms a list")
    return (
        "## Order of the candidates\n\n"
        f"A decoder that reads a list whole was shown {cases} test lists in four orders each, as "
        "they are fused and three at random; means over pairs of orders. In training the order is "
        "drawn anew at every visit. It is small and started at random, for no pretrained decoder "
        "was at hand: it shows what the order does, not what a decoder brings.\n\n"
        + table(columns, rows)
    )


def _encoders(found: Findings) -> str:
    names = ("untouched", *OPTIONS)
    plain = {size: (v, t) for size, v, t in found.options["one-tower"]}
    rows = []
    for name in names:
        for size, validation, test in found.options[name]:
            own = np.concatenate([validation, test])
            base = np.concatenate(plain[size])
            versus = found.compared((name, "one-tower"), (own, base))
            rows.append(
                (
                    name,
                    str(size),
                    found.told(np.array(test)),
                    found.told(own),
                    "" if name == "one-tower" else difference(versus),
                    "" if name == "one-tower" else f"{versus.p_value:.3f}",
                    f"{found.seconds[f'option-{name}']:.0f}",
                )
            )
    columns = (
        "encoder",
        "dimensions",
        f"NDCG@{found.k}, test",
        "both parts",
        "to one tower, as many dimensions",
        "p",
        "s",
    )
    return (
        "## Options of the encoder\n\n"
        "The semantic source alone over the whole catalogue, the small encoder trained on the same "
        "pairs each time. *s*: training, its start, and encoding the catalogue and the "
        "histories.\n\n" + table(columns, rows)
    )


def _seconds(found: Findings) -> str:
    rows = [(name, f"{seconds:.0f}") for name, seconds in found.seconds.items()]
    whole = sum(found.seconds.values()) / 60
    return (
        f"## What it took\n\n{whole:.1f} minutes in all, by step in seconds. A distillation holds "
        "asking the teacher and measuring both; each job its start.\n\n"
        + table(("step", "s"), rows)
    )
