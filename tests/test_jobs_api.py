"""A submitted job finds the library through ``runtime_env.yaml`` where nothing is installed.

The head runs on an interpreter of its own that sees the dependencies but not this project: a bare
environment whose one ``.pth`` file names the site-packages of the environment under test. Python
does not follow the ``.pth`` files found there, so the editable install stays invisible.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import numpy as np
import pytest
import yaml

from fusionrec.evaluation.report import Report
from serve_apps.ingress import free_ports
from tuning.report import CampaignReport

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """An interpreter with the dependencies and without the project."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    paths = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    [own] = folder.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(sorted(paths)) + "\n")
    code = "import ray, torch; import fusionrec"
    found = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "No module named 'fusionrec'" in found.stderr
    return python


@pytest.fixture(scope="module")
def head(bare_python):
    """Address of the dashboard of a head of our own, started with ``ray start --head``."""
    gcs, dashboard, client, agent, agent_grpc = free_ports(5)  # other heads may be up
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # socket paths must be short
    command = [bare_python, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--dashboard-agent-grpc-port={agent_grpc}", "--num-cpus=2"]
    command += ["--object-store-memory=200000000", f"--temp-dir={temporary}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment["PATH"] = f"{bare_python.parent}{os.pathsep}{environment['PATH']}"
    log = Path(temporary) / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=temporary,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.send_signal(signal.SIGTERM)  # with --block, Ray ends what it started
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(temporary, ignore_errors=True)


def test_documented_command_brings_the_library_to_driver_and_worker(head):
    code = (
        "import ray, fusionrec, jobs; ray.init(log_to_driver=False);"
        "where = ray.remote(lambda: __import__('fusionrec').__file__);"
        "print('FOUND', fusionrec.__file__, ray.get(where.remote()), jobs.__file__)"
    )
    command = [Path(sys.executable).parent / "ray", "job", "submit", "--address", head]
    command += ["--working-dir", ".", "--runtime-env", "runtime_env.yaml", "--"]
    done = subprocess.run(
        [*command, "python", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    driver, worker, entry_points = re.search(r"FOUND (\S+) (\S+) (\S+)", done.stdout).groups()
    assert "/py_modules_files/" in driver
    assert "/py_modules_files/" in worker
    assert "/working_dir_files/" in entry_points


@pytest.fixture
def submit(head, monkeypatch):
    """Runs an entry point through the Jobs API; returns its log once it has succeeded."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    monkeypatch.chdir(ROOT)  # the path of the library in the file is relative
    runtime_env = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    client = JobSubmissionClient(head)

    def run(entrypoint: str) -> str:
        job = client.submit_job(
            entrypoint=entrypoint, runtime_env={"working_dir": ".", **runtime_env}
        )
        deadline = time.monotonic() + 240
        while not (status := client.get_job_status(job)).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs(job)
            time.sleep(0.5)
        log = client.get_job_logs(job)
        assert status == JobStatus.SUCCEEDED, log
        return log

    return run


def test_jobs_leave_their_results(submit, tmp_path, synthetic):
    pipeline, report = tmp_path / "pipeline", tmp_path / "report"
    given = f"--dataset {synthetic.directory} --pipeline {pipeline}"
    submit(f"python -m jobs.fit {given}")
    log = submit(f"python -m jobs.evaluate {given} --out {report}")
    result = Report.model_validate_json((report / "report.json").read_bytes())
    assert result.dataset == synthetic.info
    assert result.served.metrics["ndcg"].mean > 0
    assert f"{result.served.metrics['ndcg'].mean:.4f}" in log


def test_a_campaign_is_a_job(submit, tmp_path, synthetic):
    given = f"--dataset {synthetic.directory} --pipeline {tmp_path / 'pipeline'}"
    submit(f"python -m jobs.fit {given} --sources popularity,transitions,bm25")
    out = tmp_path / "campaign"
    budget = "--sources.names bm25 --sources.trials 3 --fusion.trials 6 --pareto.trials 3"
    stages = "--stages sources,fusion,pareto"
    log = submit(f"python -m tuning.campaign {given} --out {out} {stages} {budget}")
    assert f"report: {out / 'report.html'}" in log
    found = CampaignReport.model_validate_json((out / "report.json").read_bytes())
    assert [len(search.trials) for search in found.searches] == [3, 6, 3]


def test_a_job_that_fails_says_why(submit, tmp_path):
    with pytest.raises(AssertionError, match="error: raw data /absent does not exist"):
        submit(f"python -m jobs.ingest --raw /absent --out {tmp_path}")


def test_a_job_whose_workers_need_the_library(submit, tmp_path, synthetic, tiny_encoder):
    synthetic.catalogue.save(tmp_path / "catalogue.parquet")
    submit(f"python -m jobs.embed --pipeline {tmp_path} --encoder {tiny_encoder}")
    vectors = np.load(tmp_path / "vectors.npy")
    assert vectors.shape == (len(synthetic.catalogue), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
