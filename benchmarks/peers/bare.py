"""The bare pipeline: a loop over batches of requests, without HTTP, in one process or several.

What a serving system could reach if it cost nothing: the other systems do this and more. Each
worker takes the next ``batch`` requests as soon as it is done with the last.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

from pydantic import Field

from fusionrec.bundles.store import BundleStore
from fusionrec.config import JobConfig, parse
from jobs.entry import run

WARM_UP_BATCHES = 3


class BareConfig(JobConfig):
    """Measure the loop; one line of JSON comes out."""

    bundles: Path
    """Folder of bundles; the current one is used."""
    requests: Path
    """File of requests, one a line, each used at most once."""
    batch: int = Field(default=32, ge=1)
    """Requests that a worker takes at a time."""
    workers: int = Field(default=1, ge=1)
    """Processes."""
    threads: int = Field(default=1, ge=1)
    """Threads of the models in each process."""
    duration_s: float = Field(default=5.0, gt=0)
    """How long."""


def work(config: BareConfig, worker: int, begin: Barrier, out: Connection) -> None:
    """One worker: sends its times, seconds of CPU and the number of its requests."""
    import torch

    from fusionrec.serving.pipeline import Pipeline
    from fusionrec.serving.schemas import parse_request
    from fusionrec.serving.service import Service, recommend

    torch.set_num_threads(config.threads)
    bundle = BundleStore(config.bundles).current()
    service, pipeline = Service.load(bundle), Pipeline.load(bundle)
    lines = config.requests.read_bytes().splitlines()[worker :: config.workers]
    batches = [lines[at : at + config.batch] for at in range(0, len(lines), config.batch)]
    for batch in batches[:WARM_UP_BATCHES]:
        recommend(service, pipeline, [parse_request(line) for line in batch])
    begin.wait()
    cpu, start = time.process_time(), time.perf_counter()
    times, requests = [start], 0
    for batch in batches[WARM_UP_BATCHES:]:
        recommend(service, pipeline, [parse_request(line) for line in batch])
        requests += len(batch)
        times.append(time.perf_counter())
        if times[-1] - start > config.duration_s:
            break
    out.send((times, time.process_time() - cpu, requests))


def measure(config: BareConfig) -> dict[str, object]:
    """Requests/s of all workers, milliseconds of each batch, CPU milliseconds a request."""
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(config.workers)
    pipes, processes = [], []
    for worker in range(config.workers):
        receiver, sender = context.Pipe(duplex=False)
        # A daemon: when one of them fails, the others do not wait for it for ever.
        process = context.Process(target=work, args=(config, worker, begin, sender), daemon=True)
        process.start()
        sender.close()  # so that the end of the worker is seen
        pipes.append(receiver)
        processes.append(process)
    found = [receiver.recv() for receiver in pipes]
    for process in processes:
        process.join()
    requests = sum(n for _, _, n in found)
    rate = sum(n / (times[-1] - times[0]) for times, _, n in found)
    batch_ms = [
        (after - before) * 1e3 for times, _, _ in found for before, after in pairwise(times)
    ]
    cpu_ms = sum(cpu for _, cpu, _ in found) / requests * 1e3
    return {"rate": rate, "batch_ms": batch_ms, "cpu_ms": cpu_ms}


def main() -> None:
    """Parse, measure, print."""
    sys.stdout.write(json.dumps(measure(parse(BareConfig))) + "\n")


if __name__ == "__main__":
    run(main)
