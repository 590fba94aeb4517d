"""A student beside its teacher, on the lists of a real pipeline directory with tiny models."""

import types
from pathlib import Path

import numpy as np
import pytest

from fusionrec.data.splits import split
from fusionrec.evaluation.significance import BootstrapConfig, compare
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from fusionrec.serving.pipeline import Pipeline
from jobs import finished
from jobs.distilled import Distilled, Reader, distillation_report


@pytest.fixture
def report(fitted, synthetic):
    def make(model: Path, kind: str) -> Distilled:
        teacher = fitted / "reranker"
        return distillation_report(model, kind, teacher, fitted, synthetic, seed=0)

    return make


def test_a_copy_keeps_the_order(report, fitted):
    found = report(fitted / "reranker", "reranker")
    assert found.list_length == 5
    assert found.student.gain.mean_a == found.teacher.gain.mean_a
    assert found.student.gain.mean_b == found.teacher.gain.mean_b > 0
    model = Reranker.load(fitted / "reranker").model
    assert found.student.parameters == sum(p.numel() for p in model.parameters())
    assert found.student.ms_a_list > 0


def test_only_lists_that_hold_a_target_are_read(report, fitted, synthetic, monkeypatch):
    read = []
    score = Reranker.score

    def counted(self, histories, candidates, *rest):
        read.append(len(histories))
        return score(self, histories, candidates, *rest)

    monkeypatch.setattr(Reranker, "score", counted)
    found = report(fitted / "reranker", "reranker")
    pipeline = Pipeline.load(fitted)
    cases = split(synthetic).validation
    items = pipeline.recommend(cases.histories, rerank=False).items[:, :5]
    held = (items == cases.targets.items[:, None]).any(axis=1).sum()
    assert read == [1, held, 1, held]  # each model first warms up
    assert held < found.teacher.gain.num_cases == len(cases)


def test_an_encoder_may_be_the_student(report, fitted, monkeypatch):
    """All candidates are as near: the fused order stands."""
    width = np.load(fitted / "vectors.npy").shape[1]

    def encode(_, texts):
        return np.ones((len(texts), width), dtype=np.float32)

    monkeypatch.setattr(Encoder, "encode", encode)
    gain = report(fitted / "encoder", "encoder").student.gain
    assert gain.mean_a == gain.mean_b


def reader(gains: list[float]) -> Reader:
    values = np.stack([np.array(gains) + 0.5, np.full(len(gains), 0.5)], axis=1)
    gain = compare("ndcg", ("model", "fused"), values, BootstrapConfig(draws=100))
    return Reader(parameters=1, ms_a_list=2.0, gain=gain)


def test_what_is_kept():
    found = Distilled(list_length=5, teacher=reader([0.2] * 9), student=reader([0.15] * 9))
    assert found.kept == pytest.approx(0.75)
    assert "teacher's 0.7000 (2.0 ms a list)" in found.sentence
    assert found.sentence.endswith("75% of the teacher's gain is kept.")
    nothing = found.model_copy(update={"teacher": reader([0.2, -0.2])})
    assert nothing.kept is None
    assert nothing.sentence.endswith("the teacher gains nothing that could be kept.")


def test_the_run_tells_it(fitted, synthetic, tmp_path, monkeypatch, capfd):
    """Before the student takes the place that the teacher may have."""
    config = types.SimpleNamespace(
        task="distillation",
        trained={"distillation": Path()},
        student="reranker",
        dataset=synthetic.directory,
        out=tmp_path,
        seed=0,
        need=lambda name: {"teacher": fitted / "reranker", "pipeline": fitted}[name],
    )
    told, installed = tmp_path / "distillation.json", []
    monkeypatch.setattr(finished, "install", lambda *_: installed.append(told.is_file()))
    finished.use(config, fitted / "reranker")
    assert installed == [True]
    found = Distilled.model_validate_json(told.read_bytes())
    assert found.sentence in capfd.readouterr().err.replace("\n", " ")
