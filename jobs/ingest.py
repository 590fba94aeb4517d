"""``python -m jobs.ingest --raw FOLDER --out DIR``: raw files → a typed, validated data set."""

from __future__ import annotations

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from fusionrec.config import parse
from fusionrec.data.dataset import DatasetInfo
from fusionrec.data.ingest import IngestConfig, ingest
from jobs.entry import run


def main() -> None:
    """Parse, ingest, report."""
    config = parse(IngestConfig)
    report(config, ingest(config))


def report(config: IngestConfig, info: DatasetInfo) -> None:
    """Print what was kept and what was refused."""
    table = Table(title=f"{info.name} ({info.format}) → {config.out}")
    table.add_column("rows")
    table.add_column("count", justify="right")
    for name in ("users", "items", "interactions"):
        table.add_row(name, f"{getattr(info, f'num_{name}'):,}")
    refused = pq.read_table(config.out / "quarantine.parquet", columns=["reason"])
    counts = refused.group_by("reason").aggregate([("reason", "count")]).to_pylist()
    for row in sorted(counts, key=lambda row: -row["reason_count"]):
        table.add_row(f"quarantined: {row['reason']}", f"{row['reason_count']:,}", style="yellow")
    console = Console()
    console.print(table)
    if info.num_quarantined:
        console.print(f"quarantine: {config.out / 'quarantine.parquet'}", soft_wrap=True)
    console.print(f"fingerprint: {info.fingerprint}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
