"""The benchmark of distillation: its parts, and all of it with untrained models."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import distillation
from benchmarks.distillation import Bench, DistillationBenchmark
from benchmarks.harness.command import _flag
from benchmarks.harness.encoders import shortened
from benchmarks.harness.heads import Heads, kept, weighed
from fusionrec.config import parse
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases
from fusionrec.data.text import item_texts
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.fusion.model import Fused, Fusion, Segment
from fusionrec.language.decoder import DecoderReranker
from fusionrec.language.encoder import Encoder
from fusionrec.language.reranker import Reranker
from fusionrec.serving.pipeline import Pipeline
from jobs.embed import EmbedConfig
from jobs.finetune import FinetuneConfig
from jobs.prune import PruneConfig, prune
from tuning.fusion import FusionCampaign

SECOND = 1 / np.log2(3)


@pytest.fixture
def heads() -> Heads:
    """Four lists of three, two of which are read; the targets are second, first, third and none."""
    items = np.tile(np.arange(3, dtype=np.int32), (4, 1))
    terms = np.tile(np.array([3.0, 2.0, 1.0], dtype=np.float32), (4, 1, 1))
    fused = Fused(items, terms[:, 0], terms, ("popularity",))

    def score(histories: Histories, candidates: np.ndarray) -> np.ndarray:
        assert len(histories) == len(candidates)
        return np.tile(np.array([0.0, 1.0], dtype=np.float32), (len(candidates), 1))

    pipeline = SimpleNamespace(
        config=SimpleNamespace(rerank_top=2),
        recommend=lambda histories, rerank: fused,  # noqa: ARG005 - a pipeline's signature
        rerank_scores=score,
        reranker=None,
    )
    histories = Histories.of([[5]] * 4)
    return Heads(pipeline, Cases(np.arange(4), histories, Histories.of([[1], [0], [2], [7]])))


def test_only_lists_that_hold_a_target_are_read(heads):
    assert heads.hits.tolist() == [0, 1]
    reading = heads.read("a model")
    assert reading.scores.tolist() == [[0, 1], [0, 1], [0, 0], [0, 0]]
    assert reading.ms > 0
    assert heads.fused(10).tolist() == pytest.approx([SECOND, 1, 0, 0])
    assert heads.alone(reading.scores, 10).tolist() == pytest.approx([1, SECOND, 0, 0])
    # Who says the same of all candidates leaves them as they are fused.
    assert heads.alone(np.zeros((4, 2)), 10).tolist() == heads.fused(10).tolist()
    score, histories, candidates = heads.shown(1)
    assert candidates.tolist() == [[0, 1]]
    assert score(histories, candidates).tolist() == [[0, 1]]


def test_beside_the_fusion_what_was_not_read_keeps_its_rank(heads):
    lists = heads.lists(heads.read("a model").scores)
    weight = {"popularity": 1.0}
    fusion = Fusion(sources=("popularity",), scales=weight, segments=(Segment(weights=weight),))
    found = weighed(fusion, lists, lists, seed=0, k=10)
    assert found.gates == {"all": 0.0}
    assert found.gated.tolist() == pytest.approx([SECOND, 1, 0.5, 0])
    assert found.best.mean() == found.gated.mean()  # one is won, one lost


def test_the_share_of_the_teachers_gain():
    untouched = np.full(40, 0.1)
    teacher, student = untouched + 0.4, untouched + 0.3
    config = BootstrapConfig(draws=100)
    found = kept(student, teacher, untouched, config)
    assert found is not None
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, 0.75, 0.75))
    assert kept(student, untouched, untouched, config) is None
    noise = untouched + np.tile([0.3, -0.29], 20)
    assert kept(student, noise, untouched, config) is None


def test_the_beginning_of_a_vector_is_a_vector():
    found = shortened(np.array([[3.0, 4.0, 9.0], [0.0, 0.0, 1.0]], dtype=np.float32), 2)
    assert found == pytest.approx(np.array([[0.6, 0.8], [0, 0]]))


def jobs_without_training(tiny: Path) -> tuple[list[str], object]:
    """A ``run_job`` whose runs leave untrained models, and what it was asked."""
    asked: list[str] = []

    def run_job(module: str, **settings: object) -> None:
        words = [word for name, value in settings.items() for word in _flag(name, value)]
        if module == "jobs.prune":
            asked.append(f"prune {settings['model']}")
            prune(parse(PruneConfig, words))
        elif module == "jobs.embed":
            asked.append("embed")
            place = parse(EmbedConfig, words).pipeline
            encoder = Encoder.load(tiny)
            encoder.save(place / "encoder")
            texts = item_texts(Catalogue.load(place / "catalogue.parquet"))
            np.save(place / "vectors.npy", encoder.encode(texts))
        else:
            config = parse(FinetuneConfig, words)
            task, _ = config.resolved()  # a flag that is not read is a warning
            config.check(task)
            asked.append(config.out.name)
            kind = config.student if config.task == "distillation" else config.task
            model = config.out / "model"
            if kind == "decoder":
                DecoderReranker.load(config.encoder).save(model)
            elif kind == "encoder":
                Encoder.load(config.encoder).save(model)
            else:
                Reranker.load(config.encoder, seed=len(asked)).save(model)
                place = config.need("pipeline") / "reranker"
                shutil.rmtree(place, ignore_errors=True)
                shutil.copytree(model, place)

    return asked, run_job


@pytest.fixture
def raw(synthetic, tmp_path) -> Path:
    """The synthetic data as MovieLens has them."""
    folder = tmp_path / "raw"
    folder.mkdir()
    events = synthetic.interactions(["user_id", "item_id", "timestamp"]).to_pandas()
    code = synthetic.catalogue.code_of
    users = {user: number for number, user in enumerate(events["user_id"].unique(), 1)}
    rows = [
        f"{users[user]},{code[item] + 1},4.0,{int(time)}"
        for user, item, time in zip(
            events["user_id"], events["item_id"], events["timestamp"], strict=True
        )
    ]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    titles = [
        f'{number},"{title}",Drama'.replace('""', '"')
        for number, title in enumerate(synthetic.catalogue.titles, 1)
    ]
    (folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *titles]))
    return folder


def equal_weights(config: FusionCampaign) -> None:
    """In place of a campaign."""
    Pipeline.load(config.pipeline).fusion.save(config.pipeline / "fusion.json")


def test_the_whole_report(raw, tiny_encoder, tmp_path, monkeypatch):
    config = DistillationBenchmark(
        data=raw,
        out=tmp_path / "out",
        encoder=str(tiny_encoder),
        student_layers=1,
        pruned_layers=1,
        dimensions=(16, 8),
        decoder_width=16,
        ordered=3,
        max_cases=20,
        trials=4,
        draws=100,
    )
    asked, run_job = jobs_without_training(tiny_encoder)
    monkeypatch.setattr(distillation, "run_job", run_job)
    monkeypatch.setattr(distillation, "campaign", equal_weights)
    assert Bench(config.model_copy(update={"minutes": 1e-9})).run() is None
    assert asked == []  # no time for any step; the same command goes on
    path = Bench(config).run()
    assert path is not None
    assert asked == [
        "embed",
        "first",
        "prune encoder",
        "prune encoder",
        "teacher",
        "student",
        "student-margin-mse",
        "student-kl",
        "encoder",
        "encoder-kl",
        "prune reranker",
        "healed",
        "decoder",
        "option-one-tower",
        "option-two-towers",
        "option-matryoshka",
        "option-mined",
    ]
    text = path.read_text()
    for title in ("Lists", "Order of the candidates", "Options of the encoder", "What it took"):
        assert f"## {title}" in text
    rows = re.findall(r"^\| (small, KL|teacher, int8) \| (.*) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == {"small, KL", "teacher, int8"}
    alone = re.findall(r"^\| encoder, (?:before|KL) \|.*?\| (\d\.\d{4}) \[", text, re.MULTILINE)
    assert len(set(alone)) == 1  # the same model, since nothing is trained
    assert Bench(config).run() == path
    assert len(asked) == 17  # nothing was left to do
    # With other settings everything is made anew.
    Bench(config.model_copy(update={"seed": 1}))
    assert not list((tmp_path / "out" / "raw" / "steps").iterdir())
