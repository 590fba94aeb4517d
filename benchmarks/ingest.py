"""Memory and speed of ``jobs.ingest`` on generated events.

``python -m benchmarks.ingest --events 10000000`` writes a CSV of that many events (and a few broken
rows), ingests it in a child process and prints events per second and the child's peak resident
memory, which must stay below 2 GiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_MIB = 2048


def generate(path: Path, events: int, seed: int) -> None:
    """Write ``events`` ratings of 200,000 users and 50,000 items, and one broken row in 10,000."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import csv

    rng = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(b"user_id,item_id,timestamp,value\n")
        for start in range(0, events, 1 << 18):
            size = min(1 << 18, events - start)
            table = pa.table(
                {
                    "user_id": rng.integers(0, 200_000, size),
                    "item_id": (50_000 * rng.random(size) ** 2).astype(np.int64),
                    # One second an event: no two rows are the same.
                    "timestamp": 1_400_000_000 + start + np.arange(size),
                    "value": rng.integers(1, 11, size) / 2,
                }
            )
            csv.write_csv(table, file, csv.WriteOptions(include_header=False))
            file.write(b"broken,row\n,1,1400000000,1\n" * (size // 20_000))


def main() -> None:
    """Generate, ingest, report; exit status 1 above the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000, help="number of events")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        path = raw / "events.csv"
        # A process of its own, so that this one stays small: a child inherits its parent's peak.
        generator = multiprocessing.get_context("spawn").Process(
            target=generate, args=(path, arguments.events, arguments.seed)
        )
        generator.start()
        generator.join()
        size_mb = path.stat().st_size / 1e6
        start = time.perf_counter()
        command = [sys.executable, "-m", "jobs.ingest", "--raw", str(raw), "--out", f"{folder}/out"]
        child = subprocess.Popen(command, cwd=Path(__file__).resolve().parent.parent)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    peak_mib = usage.ru_maxrss / 1024
    sys.stdout.write(
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}\n"
        f"{arguments.events:,} events, {size_mb:.0f} MB of CSV: {seconds:.1f} s, "
        f"{arguments.events / seconds:,.0f} events/s, peak memory {peak_mib:.0f} MiB "
        f"(limit {LIMIT_MIB})\n"
    )
    sys.exit(child.returncode or int(peak_mib > LIMIT_MIB))


if __name__ == "__main__":
    main()
