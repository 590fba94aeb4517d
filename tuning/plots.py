"""The picture of a campaign: best value over trials, and the weights of each segment."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import optuna
from matplotlib.figure import Figure

from fusionrec.fusion.model import Fusion


def plot_campaign(study: optuna.Study, fusion: Fusion, path: Path) -> None:
    """Write an SVG: value of each trial and the best so far; weights per segment as bars."""
    trials = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    values = np.array([trial.value for trial in trials], dtype=float)
    table = fusion.table()
    with mpl.rc_context({"svg.hashsalt": "fusionrec", "font.size": 9}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        over_time, weights = figure.subplots(1, 2)
        over_time.plot(values, ".", color="0.7", label="trial")
        over_time.plot(np.maximum.accumulate(values), color="C0", label="best so far")
        over_time.set(xlabel="trial", ylabel="validation NDCG", title="Search")
        over_time.legend()
        terms = list(next(iter(table.values())))
        width = 0.8 / len(table)
        for index, (segment, row) in enumerate(table.items()):
            places = np.arange(len(terms)) + index * width
            weights.bar(places, [row[term] for term in terms], width, label=segment)
        weights.set_xticks(np.arange(len(terms)) + 0.4 - width / 2, terms, rotation=30, ha="right")
        weights.set_title("Weights per segment")
        weights.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})
