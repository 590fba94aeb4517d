"""The pages that people read, made from a report and nothing else: Markdown, and one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from fusionrec.evaluation import charts
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.orders import OrderSensitivity
from fusionrec.evaluation.report import PRIMARY, Report
from fusionrec.evaluation.significance import Comparison, Estimate
from fusionrec.pages import number, p_value, page

TITLES = {
    "ndcg": "NDCG",
    "hr": "HR",
    "mrr": "MRR",
    "map": "MAP",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
}
"""How the metrics are written; every metric has a title."""
assert TITLES.keys() == METRICS.keys()


def write(report: Report, directory: Path) -> None:
    """Write ``report.json``, ``report.md`` and ``report.html`` into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    report.save(directory / "report.json")
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")
    (directory / "report.html").write_text(html(report), encoding="utf-8")


def html(report: Report) -> str:
    """One self-contained page."""
    template = files("fusionrec.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    return page(
        template,
        report=report,
        systems=charts.ordered(report),
        headline=report.comparison(report.served.name, report.best_source.name),
        primary=PRIMARY,
        titles=TITLES,
        orders=report.orders and orders_sentence(report.orders),
        off=off_sentence(report.off, report.fallback),
        compared=_compared(report),
        terms=list(dict.fromkeys(term for row in report.weights.values() for term in row)),
        metric_chart=Markup(charts.metric_chart(report)),  # noqa: S704 - charts escape their text
        curve_chart=Markup(charts.curve_chart(report)),  # noqa: S704
        slice_chart=Markup(charts.slice_chart(report)),  # noqa: S704
    )


def markdown(report: Report) -> str:
    """The same as GitHub-flavoured Markdown: tables, no charts."""
    k, systems = report.config.k, charts.ordered(report)
    level = f"{report.config.bootstrap.level:.0%}"
    headline = report.comparison(report.served.name, report.best_source.name)
    lines = [f"# Evaluation on {report.dataset.name}", ""]
    lines += [
        f"{report.protocol}, {report.part} part, {report.num_cases:,} cases, "
        f"{report.num_targets:,} targets, {report.dataset.num_items:,} items, full ranking, "
        f"mean rank of ties. In brackets: {level} bootstrap intervals.",
        "",
    ]
    if headline is not None:
        lines += [sentence(headline, k), ""]
    head = ["system", *(f"{TITLES[m]}@{k}" for m in METRICS), "ranked", "seconds"]
    rows = [
        [
            system.name,
            *(_interval(system.metrics[m]) for m in METRICS),
            f"{system.ranked:.1%}",
            f"{system.seconds:.1f}",
        ]
        for system in systems
    ]
    lines += _table(head, rows)
    lines += ["", "## Compared", ""]
    head = ["metric", "a", "b", "a − b", "a / b", "p"]
    rows = [
        [
            f"{TITLES[c.metric]}@{k}",
            c.a,
            c.b,
            _interval(c.difference),
            "–" if c.ratio is None else _interval(c.ratio, 3),
            p_value(c.p_value).removeprefix("= "),
        ]
        for c in report.comparisons
        if c.metric in _compared(report)
    ]
    lines += _table(head, rows)
    lines += ["", f"## {TITLES[PRIMARY]}@{k} by slice", ""]
    rows = [
        [
            f"{part.group}: {part.name}",
            f"{part.num_cases:,}",
            *(_interval(system.slices[index]) for system in systems),
        ]
        for index, part in enumerate(report.slices)
    ]
    lines += _table(["slice", "cases", *(system.name for system in systems)], rows)
    lines += ["", f"## Beyond accuracy, lists of {k}", ""]
    head = ["system", "coverage", f"diversity ({report.diversity_over})", "novelty, bits", "Gini"]
    rows = [
        [system.name, *(number(value, 3) for value in system.beyond.values())] for system in systems
    ]
    lines += _table(head, rows)
    if report.weights:
        terms = list(dict.fromkeys(term for row in report.weights.values() for term in row))
        lines += ["", "## Weights of the fusion", ""]
        rows = [
            [segment, *(number(row.get(term), 3) for term in terms)]
            for segment, row in report.weights.items()
        ]
        lines += _table(["segment", *terms], rows)
    if report.off or report.fallback:
        lines += ["", off_sentence(report.off, report.fallback)]
    if report.orders is not None:
        lines += ["", "## The order of the candidates", "", orders_sentence(report.orders)]
    lines += [
        "",
        f"Data set fingerprint `{report.dataset.fingerprint}`. Bootstrap: "
        f"{report.config.bootstrap.draws} draws, seed {report.config.bootstrap.seed}. "
        f"{report.seconds:.1f} s.",
        "",
    ]
    return "\n".join(lines)


def sentence(found: Comparison, k: int) -> str:
    """What a comparison says, in words."""
    name = f"{TITLES[found.metric]}@{k}"
    ratio = "" if found.ratio is None else f" ({found.ratio.mean:.3f} ×)"
    verdict = "significant" if found.significant else "not significant"
    return (
        f"**{found.a}** has {name} {found.mean_a:.4f} against {found.mean_b:.4f} of "
        f"**{found.b}**{ratio}; the difference {_interval(found.difference)} is {verdict}, "
        f"p {p_value(found.p_value)}."
    )


def off_sentence(off: Mapping[str, float | None], fallback: str | None) -> str:
    """Which sources are not asked, and why: how the samples of the cases voted, where they did."""

    def told(name: str) -> str:
        share = off.get(name)
        return name if share is None else f"{name} ({share:.0%})"

    sentences = []
    names = [name for name in off if name != fallback]
    if names:
        verb = "is" if len(names) == 1 else "are"
        sentences.append(f"{', '.join(map(told, names))} {verb} off and not asked.")
    if fallback is not None:
        sentences.append(f"{told(fallback)} is asked only where the others propose too few.")
    if any(share is not None for share in off.values()):
        sentences.append(
            "In brackets: the share of the samples of the validation cases on which the best "
            "weight was 0."
        )
    return " ".join(sentences)


def orders_sentence(found: OrderSensitivity) -> str:
    """What other orders of the candidates do to the reranker, in words."""
    return (
        f"The reranker reads its candidates together. In {found.num_orders} orders of the same "
        f"ones, Kendall's tau between its rankings is {found.tau:.3f} and the first is the same in "
        f"{found.same_first:.1%} of the pairs of orders, over {found.num_cases:,} cases."
    )


def _compared(report: Report) -> tuple[str, ...]:
    """The metrics worth a row: with one target a case, the others repeat these."""
    single = report.num_targets == report.num_cases
    return ("ndcg", "hr", "mrr") if single else tuple(METRICS)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines]


def _interval(found: Estimate, digits: int = 4) -> str:
    return f"{found.mean:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
