"""The report of a campaign: data, and one HTML page made from it and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from fusionrec.config import Config
from fusionrec.data.dataset import DatasetInfo
from fusionrec.data.splits import Protocol
from fusionrec.evaluation.render import off_sentence
from fusionrec.evaluation.significance import BootstrapConfig, Comparison
from fusionrec.pages import page
from tuning import charts
from tuning.front import Front
from tuning.history import SearchHistory
from tuning.journal import write_json
from tuning.sources import Winner


class CampaignReport(Config):
    """Everything that a campaign found."""

    dataset: DatasetInfo
    protocol: Protocol
    k: int
    seed: int
    stages: tuple[str, ...]
    equal_before: bool
    """Whether the pipeline had no weights before, so that all sources got the same."""
    test: Comparison
    """Tuned against before on the test cases, of which the campaign knew nothing."""
    validation: Comparison
    """The same on the validation cases, on which everything was chosen."""
    bootstrap: BootstrapConfig
    winners: tuple[Winner, ...]
    """What came of each source."""
    settings: dict[str, Any]
    """Source → the settings that it has now."""
    normalisation: str
    weights: dict[str, dict[str, float]]
    """Segment → term → weight, as tuned."""
    off: dict[str, float | None]
    """Sources that are not always asked → the share of the samples of the validation cases in which
    the search gave it no weight; None where no search turned it off."""
    fallback: str | None
    """The one of them that is asked where the others propose too few."""
    learned: bool
    """Whether trees order the top of the weighted lists again."""
    searches: tuple[SearchHistory, ...]
    front: Front | None
    commands: tuple[str, ...]
    """What reproduces the winner, line by line."""

    @property
    def num_trials(self) -> int:
        """Trials of all searches that came to a value."""
        return sum(len(search.trials) for search in self.searches)

    @property
    def seconds(self) -> float:
        """What the trials took, one after another."""
        return sum(search.trials[-1].at_s for search in self.searches if search.trials)


def write(report: CampaignReport, directory: Path) -> None:
    """Write ``report.json`` and ``report.html`` into ``directory``."""
    write_json(directory / "report.json", report.model_dump(mode="json"))
    (directory / "report.html").write_text(html(report), encoding="utf-8")


def html(report: CampaignReport) -> str:
    """One self-contained page."""
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    searches = [
        (
            search,
            Markup(charts.progress_chart(search)),  # noqa: S704 - charts escape their text
            Markup(charts.parallel_chart(search)),  # noqa: S704
            Markup(charts.importance_chart(search)) if search.importance else None,  # noqa: S704
        )
        for search in report.searches
        if search.trials
    ]
    front = report.front
    return page(
        template,
        report=report,
        searches=searches,
        changes=_changes(report.winners),
        off=off_sentence(report.off, report.fallback),
        terms=list(dict.fromkeys(term for row in report.weights.values() for term in row)),
        front_chart=Markup(charts.front_chart(front)) if front else None,  # noqa: S704
        metrics=list(front.start.values) if front else [],
    )


def _changes(winners: tuple[Winner, ...]) -> list[tuple[str, str, Any, Any]]:
    """Source, setting, value before and value now, of every setting that changed."""
    rows = []
    for winner in winners:
        for name in winner.changed:
            old, new = winner.before, winner.after
            for part in name.split("."):
                old, new = old[part], new[part]
            rows.append((winner.name, name, _short(old), _short(new)))
    return rows


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
