"""The report of ``benchmarks.serving``: samples become tables, claims and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.harness.machine import today
from benchmarks.harness.material import PLAIN, RERANKED
from benchmarks.harness.tables import spread, table

if TYPE_CHECKING:
    from benchmarks.serving import ServingBenchmark


CLAIMED = 32
"""Connections that throughput is claimed at."""
TOLD_MS = 0.1
"""CPU milliseconds a request from which a kind of process is named."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One system at one number of connections in one repetition."""

    kind: str
    """Of the bundle."""
    letter: str
    system: str
    connections: int
    repetition: int
    rate: float
    """Answers in a second at saturation."""
    offered: float
    """Requests in a second of the open loop."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    """Of the open loop, from the moment that a request was due; of (a), of a batch."""
    cpu_ms_by: dict[str, float]
    """CPU time of the system's processes for a request, at saturation, by their kind."""
    generator_us: float
    """CPU time of the load generator for a request of the open loop."""
    failed: int
    """Requests without status 200."""
    degraded: int
    """Answers without a stage."""
    rss_mib: float
    """Resident memory of all of the system's processes."""
    idle: float = 0.0
    """CPU that the system takes while nobody asks, in cores; 0 of (a)."""

    @property
    def cpu_ms(self) -> float:
        """That of all of its processes."""
        return sum(self.cpu_ms_by.values())


@dataclass(frozen=True, slots=True)
class Claim:
    """A ratio that a configuration of the endpoint is held to, over the repetitions."""

    system: str
    text: str
    ratios: tuple[float, ...]
    bound: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the median ratio is on the right side."""
        middle = median(self.ratios)
        return middle >= self.bound if self.at_least else middle <= self.bound


class Samples:
    """Samples by what they are of."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.all = samples
        self.kinds = tuple(dict.fromkeys(s.kind for s in samples))
        self.connections = tuple(sorted({s.connections for s in samples}))

    def systems(self, kind: str, letters: str = "abcd") -> list[str]:
        """In the order of a round."""
        found = (s for s in self.all if s.kind == kind and s.letter in letters)
        return list(dict.fromkeys(s.system for s in found))

    def of(self, kind: str, system: str, connections: int) -> list[Sample]:
        """One cell, by repetition."""
        wanted = (kind, system, connections)
        return [s for s in self.all if (s.kind, s.system, s.connections) == wanted]

    def best(
        self, kind: str, letters: str, connections: int, value: Callable[[Sample], float]
    ) -> list[float]:
        """The values of the system with the highest median among ``letters``; none if not there."""
        cells = [
            [value(sample) for sample in self.of(kind, system, connections)]
            for system in self.systems(kind, letters)
        ]
        return max((cell for cell in cells if cell), key=median, default=[])


def claims(samples: Samples) -> list[Claim]:
    """What each configuration of the endpoint is held to, as far as the samples tell."""
    systems = dict.fromkeys(s.system for s in samples.all if s.letter == "d")
    return [claim for system in systems for claim in _claims(samples, system)]


def _claims(samples: Samples, system: str) -> Iterator[Claim]:
    def ours(kind: str, connections: int, value: Callable[[Sample], float]) -> list[float]:
        return [value(sample) for sample in samples.of(kind, system, connections)]

    def rates(kind: str, letter: str) -> list[float]:
        return samples.best(kind, letter, CLAIMED, lambda sample: sample.rate)

    # The best is the shortest: the highest of the negated.
    p50 = [-ms for ms in samples.best(PLAIN, "a", 1, lambda sample: -sample.p50_ms)]
    plain, reranked = (
        ours(kind, CLAIMED, lambda sample: sample.rate) for kind in (PLAIN, RERANKED)
    )
    mine = ours(PLAIN, 1, lambda sample: sample.p50_ms)
    at = f"{CLAIMED} connections: requests/s to"
    for text, above, below, bound, at_least in (
        (f"plain, {at} best (b)", plain, rates(PLAIN, "b"), 1.0, True),
        (f"plain, {at} best (c)", plain, rates(PLAIN, "c"), 3.0, True),
        ("plain, 1 connection: p50 to bare", mine, p50, 2.0, False),
        (f"reranked, {at} bare on all cores", reranked, rates(RERANKED, "a"), 0.9, True),
    ):
        ratios = tuple(a / b for a, b in zip(above, below, strict=False))
        if ratios:
            yield Claim(system, text, ratios, bound, at_least)


def keepers(held: Sequence[Claim]) -> list[str]:
    """The configurations that hold whatever any of them is held to."""
    texts = {claim.text for claim in held}
    kept = {name: {c.text for c in held if c.system == name and c.holds} for name in _names(held)}
    return [name for name, those in kept.items() if those == texts]


def _names(held: Sequence[Claim]) -> list[str]:
    return list(dict.fromkeys(claim.system for claim in held))


def _verdict(held: Sequence[Claim]) -> str:
    """The claims by configuration, and which of these holds all at once."""
    names, cells = _names(held), {(claim.text, claim.system): claim for claim in held}
    rows = []
    for text, at_least, bound in dict.fromkeys((c.text, c.at_least, c.bound) for c in held):
        row = [text, f"{'≥' if at_least else '≤'} {bound:g}"]
        for name in names:
            claim = cells.get((text, name))
            told = spread(claim.ratios, 2) if claim else ""
            row.append(told if claim is None or claim.holds else f"**{told}**")
        rows.append(row)
    kept = ", ".join(keepers(held)) or "none of them"
    return (
        table(("of (d)", "bound", *names), rows)
        + f"\nWhat misses is bold. All at once is held by: {kept}.\n"
    )


def write(
    folder: Path, every: Sequence[Sample], machine: str, config: ServingBenchmark
) -> tuple[Path, list[Claim]]:
    """Markdown, plot and raw samples under ``folder``; the Markdown's path and the claims."""
    samples = Samples(every)
    name = f"serving-{today()}"
    plot(samples, folder / f"{name}.svg")
    raw = [asdict(sample) for sample in every]
    (folder / f"{name}.json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    held = claims(samples)
    spent = max((sample.generator_us * sample.offered / 1e6 for sample in every), default=0.0)
    failed, degraded = (sum(getattr(s, what) for s in every) for what in ("failed", "degraded"))
    text = [
        f"# Serving, {today()}\n",
        machine + "\n",
        f"Rounds over all systems: {config.repetitions}; medians of the rounds, [lowest, highest]. "
        f"Closed loop: {config.duration_s:g} s. Open loop: {config.arrivals} arrivals at "
        f"{config.share:.0%} of what the system itself reached. The load generator took at most "
        f"{spent:.1%} of a core. Over all systems {failed} requests failed and "
        f"{degraded} answers were degraded.\n",
        "## Claims\n",
        _verdict(held),
        f"![requests per second and latency]({name}.svg)\n",
    ]
    for kind in samples.kinds:
        text += _section(samples, kind, config.share)
    path = folder / f"{name}.md"
    path.write_text("\n".join(text), encoding="utf-8")
    return path, held


def _section(samples: Samples, kind: str, share: float) -> list[str]:
    """The tables of one bundle."""
    columns = ("system", *(f"{n} connection{'s' * (n > 1)}" for n in samples.connections))

    def grid(value: Callable[[list[Sample]], str], letters: str = "abcd") -> str:
        return table(
            columns,
            [
                (
                    f"({_letter(samples, system)}) {system}",
                    *(value(samples.of(kind, system, n)) for n in samples.connections),
                )
                for system in samples.systems(kind, letters)
            ],
        )

    def latencies(cell: list[Sample]) -> str:
        fields = ("p50_ms", "p95_ms", "p99_ms")
        return " / ".join(f"{median(getattr(s, f) for s in cell):.1f}" for f in fields)

    def memory(system: str) -> str:
        return f"{max(s.rss_mib for s in samples.all if s.system == system):,.0f}"

    served = samples.systems(kind, "bcd")
    return [
        f"## {kind.capitalize()}\n",
        "Requests/s at saturation:\n",
        grid(lambda cell: spread([s.rate for s in cell], 1) if cell else ""),
        f"Latency p50 / p95 / p99 in ms at {share:.0%} of that, from the moment that a request was "
        "due; of (a), time of a batch:\n",
        grid(lambda cell: latencies(cell) if cell else ""),
        "CPU milliseconds a request at saturation, over all processes:\n",
        grid(lambda cell: spread([s.cpu_ms for s in cell], 1) if cell else ""),
        *_processes(samples, kind),
        "Resident memory, MiB (pages that processes share count in each): "
        + "; ".join(f"{system} {memory(system)}" for system in served)
        + ".\n",
    ]


def _processes(samples: Samples, kind: str) -> list[str]:
    """Where the CPU of what runs on Ray goes, at the connections that throughput is claimed at."""
    cells = {s: samples.of(kind, s, CLAIMED) for s in samples.systems(kind, "cd")}
    cells = {system: cell for system, cell in cells.items() if cell}
    every = [sample for cell in cells.values() for sample in cell]
    if not every:
        return []
    ms = {
        process: [median(s.cpu_ms_by.get(process, 0.0) for s in cell) for cell in cells.values()]
        for process in {process for sample in every for process in sample.cpu_ms_by}
    }
    told = sorted((each for each in ms if max(ms[each]) >= TOLD_MS), key=lambda e: (-max(ms[e]), e))
    rows = [(each, *(f"{cell:.2f}" for cell in ms[each])) for each in told]
    rest = [ms[each] for each in ms if each not in told] or [[0.0] * len(cells)]
    rows.append(("others", *(f"{sum(cell):.2f}" for cell in zip(*rest, strict=True))))
    idle = (f"{median(s.idle for s in cell):.1%}" for cell in cells.values())
    rows.append(("while nobody asks, of a core", *idle))
    return [
        f"Of these, by process, at {CLAIMED} connections:\n",
        table(("processes", *cells), rows),
    ]


def _letter(samples: Samples, system: str) -> str:
    return next(s.letter for s in samples.all if s.system == system)


def plot(samples: Samples, path: Path) -> None:
    """Requests/s and p50 over connections, a column a bundle; whiskers from lowest to highest."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "fusionrec"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(samples.kinds), figsize=(6 * len(samples.kinds), 8), squeeze=False, sharex=True
    )
    colours = {"a": "0.5", "b": "tab:blue", "c": "tab:orange", "d": "tab:green"}
    styles = ("-", "--", ":", "-.")
    for column, kind in enumerate(samples.kinds):
        for row, name in enumerate(("rate", "p50_ms")):
            axis = axes[row][column]
            seen: dict[str, int] = {}
            for system in samples.systems(kind):
                letter = _letter(samples, system)
                style = styles[seen.setdefault(letter, 0) % len(styles)]
                seen[letter] += 1
                x = [n for n in samples.connections if samples.of(kind, system, n)]
                cells = [[getattr(s, name) for s in samples.of(kind, system, n)] for n in x]
                middle = [median(cell) for cell in cells]
                low = [m - min(cell) for m, cell in zip(middle, cells, strict=True)]
                high = [max(cell) - m for m, cell in zip(middle, cells, strict=True)]
                axis.errorbar(
                    x,
                    middle,
                    (low, high),
                    color=colours[letter],
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    capsize=3,
                    label=f"({letter}) {system}",
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(samples.connections, [str(n) for n in samples.connections])
            axis.grid(alpha=0.3)
            if row == 0:
                axis.set_title(kind)
                axis.set_ylim(bottom=0)
                axis.set_ylabel("requests/s at saturation")
            else:
                axis.set_yscale("log")
                axis.set_ylabel("p50 at a share of that, ms")
                axis.set_xlabel("connections")
        axes[0][column].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
