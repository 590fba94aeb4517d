"""Set the rules of a pipeline: what may be recommended at all, to anybody.

Leaves ``rules.json`` in the pipeline directory, checked against its catalogue; without any rule it
removes it. The rules hold in every answer and travel with the bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fusionrec.bundles.gate import forget_measurements
from fusionrec.config import JobConfig, parse
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.fusion.rules import RULES, RulesConfig, build_rules
from fusionrec.serving.pipeline import read_config
from jobs.entry import run


class RulesJob(JobConfig, RulesConfig):  # type: ignore[misc]
    """Set what a pipeline may recommend; these rules replace those that it has."""

    pipeline: Path
    """Pipeline directory, as jobs.fit left it; rules.json goes there."""


def set_rules(config: RulesJob) -> tuple[int, int]:
    """Check, write; returns the number of items that may be recommended, and of all.

    Raises:
        BundleError: the directory is not a pipeline's.
        ConfigError: a rule names what the catalogue does not have, asks for a time that is not
            known, or all of them leave nothing to recommend.
    """
    directory = config.pipeline
    read_config(directory)
    counts = np.load(directory / "item_counts.npy", allow_pickle=False)
    rules = RulesConfig(**config.model_dump(include=set(RulesConfig.model_fields)))
    found = build_rules(
        rules,
        directory / "catalogue.parquet",
        counts,
        Releases.load(directory / RELEASES),
        "the rules",
    )
    if rules.changes:
        beside = directory / f".{RULES}"
        beside.write_text(rules.model_dump_json(indent=2), encoding="utf-8")
        beside.replace(directory / RULES)
    else:
        (directory / RULES).unlink(missing_ok=True)
    forget_measurements(directory)
    return len(found.popular), len(counts)


def main() -> None:
    """Parse, set, report."""
    config = parse(RulesJob)
    permitted, every = set_rules(config)
    sys.stdout.write(f"{permitted:,} of {every:,} items may be recommended\n")


if __name__ == "__main__":
    run(main)
