"""The parts of the ranking benchmark, on problems with known answers."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.harness import recbole, rivals
from benchmarks.harness.ablation import Ablation
from benchmarks.harness.audit import Systems, audit, with_ties_reversed, works
from benchmarks.harness.fits import fit_each
from benchmarks.harness.memory import alone, peak_mib
from benchmarks.harness.ranking import MODELS, peer
from benchmarks.ranking import RankingBenchmark, fit_config, measure
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.dataset import Dataset, DatasetInfo, Events
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, Protocol, split
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError, ServingError
from fusionrec.evaluation.metrics import METRICS, ndcg
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.evaluation.significance import BootstrapConfig
from fusionrec.fusion.candidates import Candidates
from fusionrec.fusion.features import ItemStatistics
from fusionrec.fusion.lambdarank import LambdaRank, LambdaRankConfig
from fusionrec.fusion.model import Fusion, Segment
from fusionrec.language.encoder import Encoder
from fusionrec.sources.popularity import Popularity
from fusionrec.sources.protocol import TrainingData
from fusionrec.sources.sequential.config import SASRecConfig
from jobs.fit import FitConfig, fit


def dataset(
    users: list[int], items: list[int], times: list[int], titles: tuple[str, ...] = ()
) -> Any:
    events = Events(
        users=np.array(users, np.int32),
        items=np.array(items, np.int32),
        timestamps=np.array(times, np.int64),
        values=np.full(len(users), np.nan, np.float32),
        user_ids=tuple(map(str, range(max(users) + 1))),
    )
    info = DatasetInfo(
        name="paper",
        format="table",
        fingerprint="0" * 64,
        num_interactions=len(users),
        num_users=len(events.user_ids),
        num_items=max(items) + 1,
    )
    table = catalogue(titles or ("",) * info.num_items).to_table()
    return SimpleNamespace(
        events=events, info=info, items=table, catalogue=Catalogue.from_table(table)
    )


def catalogue(titles: tuple[str, ...], texts: tuple[str, ...] = ()) -> Catalogue:
    count = len(titles)
    return Catalogue(
        item_ids=tuple(map(str, range(count))),
        titles=titles,
        texts=texts or ("",) * count,
        categories=((),) * count,
        domains=("",) * count,
    )


def test_the_audit_counts_ties_repetitions_and_cold_items():
    data = dataset(
        users=[0, 0, 0, 1, 1, 1, 2, 2, 2],
        items=[0, 1, 2, 0, 1, 0, 1, 0, 3],
        times=[1, 2, 2, 1, 2, 3, 5, 6, 7],
    )
    found = audit(data, split(data))
    assert found.tied_events == pytest.approx(2 / 9)
    assert found.tied_targets == pytest.approx(1 / 3)  # user 0
    assert found.repeated_targets == pytest.approx(1 / 3)  # user 1
    assert found.cold_targets == pytest.approx(2 / 3)  # items 2 and 3
    assert found.cold_held_out == 1


def test_the_audit_counts_works_with_two_ids_and_what_is_no_target():
    """Of twenty events the newest two are the test window."""
    data = dataset(
        users=[*([0] * 15), 1, 1, 1, 1, 1],
        items=[*([2] * 15), 0, 3, 3, 1, 1],
        times=list(range(20)),
        titles=("Heat", " heat", "Ran", "Ikiru"),
    )
    found = audit(data, split(data, Protocol.GLOBAL_TIME))
    assert (found.met_before, found.met_again) == (0, 1)
    assert found.twin_items == 0.5
    assert found.twin_targets == found.twins_met == 1
    again = dataset([0] * 20, [*range(18), 0, 18], list(range(20)))
    found = audit(again, split(again, Protocol.GLOBAL_TIME))
    assert (found.met_before, found.met_again) == (1, 0)
    assert found.twin_items == 0  # nothing is known of any


def test_works_are_told_apart_by_their_year():
    table = catalogue(("Heat", "Heat", "heat", "", ""), ("", "", "a", "A  b", "a b")).to_table()
    table = table.append_column("year", pa.array([1986, 1995, 1995, 1995, 1995]))
    data: Any = SimpleNamespace(items=table, catalogue=Catalogue.from_table(table))
    assert works(data).tolist() == [0, 1, 1, 3, 3]


def test_reversed_ties_change_targets_and_nothing_else():
    data = dataset(users=[0, 0, 0, 0], items=[0, 1, 2, 3], times=[1, 2, 3, 3])
    turned = with_ties_reversed(data, Protocol.LEAVE_ONE_OUT)
    assert split(data).test.targets.items.tolist() == [3]
    assert turned.test.targets.items.tolist() == [2]
    assert turned.test.histories.items.tolist() == [0, 1, 3]
    assert turned.train.items.tolist() == split(data).train.items.tolist()


def test_peers_find_what_goes_together_and_recommend_nothing_twice(synthetic: Dataset):
    parts = split(synthetic)
    before = parts.train.items.copy(), parts.test.histories.items.copy()
    for name in MODELS:
        found, took = peer(name, parts, seed=0)
        assert found.seen_items == 0, found.name
        assert took.seconds > 0
        ndcg = METRICS["ndcg"](found.ranks, 10).mean()
        assert ndcg > 10 / parts.num_items, found.name  # chance finds k of I
    assert np.array_equal(parts.train.items, before[0])  # nobody has put them in another order
    assert np.array_equal(parts.test.histories.items, before[1])


def test_memory_is_that_of_the_work_alone():
    ours = peak_mib()
    theirs = alone(_holding, 64)
    assert theirs[1] - theirs[0] > 60
    assert peak_mib() - ours < 60  # it was not here


def _holding(mib: int) -> tuple[float, float]:
    before = peak_mib()
    held = np.ones(mib << 20, dtype=np.uint8)
    return before, peak_mib() + 0 * float(held[0])


def test_sources_are_fitted_one_by_one_with_the_settings_that_are_given(
    synthetic: Dataset, tmp_path: Path
):
    path = tmp_path / "winner.yaml"
    path.write_text("sources: [bm25]\npopularity: {half_life_days: 9}\ndataset: elsewhere")
    config = RankingBenchmark(data=tmp_path, settings=path, sources=("popularity",))
    settings = fit_config(config, tmp_path, Protocol.LEAVE_ONE_OUT)
    settings = settings.model_copy(update={"dataset": synthetic.directory})
    [(name, took)] = fit_each(settings).items()
    assert name == "popularity"
    assert 0 < took.before_mib <= took.peak_mib
    place = tmp_path / "leave-one-out" / "pipeline" / "sources" / "popularity"
    assert Popularity.load(place).config.half_life_days == 9
    path.write_text("popularity: {half_life: 9}")
    with pytest.raises(ConfigError, match=r"popularity.half_life is unknown"):
        fit_config(config, tmp_path, Protocol.LEAVE_ONE_OUT)


def test_what_ties_and_cold_targets_do_is_told_of_every_source_and_of_the_served_list(
    synthetic: Dataset, tiny_encoder: Path, tmp_path: Path
):
    config = FitConfig(dataset=synthetic.directory, pipeline=tmp_path, sources=("semantic",))
    encoder = Encoder.load(tiny_encoder)
    encoder.save(tmp_path / "encoder")
    np.save(tmp_path / "vectors.npy", encoder.encode(item_texts(synthetic.catalogue)))
    config = config.model_copy(update={"sources": ("item-knn", "semantic")})
    fit(config)
    Fusion.uniform(("item-knn",), np.ones(1)).save(tmp_path / "fusion.json")  # semantic is off
    systems, parts = Systems.load(tmp_path), split(synthetic)
    assert [source.name for source in systems.served.sources] == ["item-knn"]
    found = systems.ndcg(parts)
    assert list(found) == ["item-knn", "semantic", "fused"]
    assert all(0 < missed <= ndcg < 1 for ndcg, missed in found.values())
    assert systems.fitted_again(synthetic, parts, config).ndcg(parts) == found
    cold = systems.ndcg(replace(parts, train=parts.train.take([])))
    assert cold == {name: (ndcg, 0) for name, (ndcg, _) in found.items()}


@pytest.mark.slow
@pytest.mark.ray
def test_the_whole_benchmark_from_raw_files(
    ray_cluster: Any, synthetic: Dataset, tiny_encoder: Path, tmp_path: Path
):
    raw = tmp_path / "raw"
    raw.mkdir()
    pq.write_table(synthetic.interactions(), raw / "interactions.parquet")
    pq.write_table(synthetic.items, raw / "items.parquet")
    settings = tmp_path / "settings.yaml"
    settings.write_text("sasrec: {width: 8, num_heads: 1, num_blocks: 1, epochs: 1}")
    sources = ("item-knn", "sasrec", "bm25", "semantic")
    config = RankingBenchmark(
        data=raw,
        out=tmp_path / "out",
        protocols=(Protocol.GLOBAL_TIME,),
        encoder=str(tiny_encoder),
        sources=sources,
        settings=settings,
        trials=4,
        draws=100,
        recbole_minutes=0,
    )
    report = measure(config).read_text(encoding="utf-8")
    systems, _, rest = report.partition("### What each source adds")
    left_out, _, audited = rest.partition("### Audit")
    assert "to the report 0.0 minutes" not in systems
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in systems.splitlines()}
    for name in (*sources, "fused, linear", "fused, lambdarank", "implicit ALS"):
        *_, fit_s, fit_mib, _, _ = rows[name].removesuffix(" |").split(" | ")
        assert float(fit_s) >= 0, name
        assert float(fit_mib.replace(",", "")) > 50, name
    turned_off, _, rows_left_out = left_out.partition("| left out")
    for name in (*sources, "the language model", "it and bm25"):
        assert f"| {name} | " in rows_left_out or f"{name} (" in turned_off, name
    assert "whose vectors are read by" in left_out
    assert "are no targets since their user had met the item" in audited
    assert "| system | NDCG@10 | with cold targets missed |" in audited
    for name in (*sources, "fused"):
        assert f"| {name} | 0." in audited, name


def test_a_rival_that_fails_is_told_and_costs_no_result(
    synthetic: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*_: object) -> None:
        raise BrokenProcessPool

    def failed(*_: object) -> None:
        raise ServingError("RecBole's model failed: a log says why")

    monkeypatch.setattr(rivals, "alone", killed)
    monkeypatch.setattr(recbole, "recbole_peer", failed)
    monkeypatch.setattr(recbole, "FOLDER", tmp_path)
    parts = split(synthetic)
    data = TrainingData(synthetic.catalogue, parts.train, has_timestamps=True)
    found, told = rivals.measured(parts, data, SASRecConfig(), tmp_path, 1, 0)
    assert not found
    assert sum("ended early" in sentence for sentence in told) == len(MODELS)
    assert sum("a log says why" in sentence for sentence in told) == len(recbole.MODELS)


@pytest.mark.slow
def test_recbole_learns_from_the_same_events_and_finds_what_goes_together(
    synthetic: Dataset, tmp_path: Path
):
    if not recbole.FOLDER.is_dir():
        pytest.skip(recbole.MISSING)
    parts = split(synthetic)
    found = {
        name: recbole.recbole_peer(name, parts, tmp_path, minutes=1e-6, seed=0)
        for name in recbole.MODELS
    }
    assert len(found["SASRec"].epochs_s) == 1
    for name, least in (("EASE", 10), ("SASRec", 2)):
        measured = found[name].measured
        assert measured.seen_items == 0
        assert METRICS["ndcg"](measured.ranks, 10).mean() > least / parts.num_items, name


def test_epochs_are_told_over_the_same_events(synthetic: Dataset):
    parts = split(synthetic)
    data = TrainingData(synthetic.catalogue, parts.train, has_timestamps=True)
    told = recbole.epochs_told((1e6, 2e6, 3e6), data, SASRecConfig(width=8))
    assert f"over {len(parts.train.items):,} training events (ours without the up to 2% " in told
    assert "takes RecBole 2000000.0 [" in told
    assert told.endswith("0.000 of it. At most 0.1: held.\n")
    assert recbole.epochs_told((1e-6,), data, SASRecConfig(width=8)).endswith("missed.\n")


def problem(cases: int = 60) -> tuple[Any, Any, Any, Any]:
    """The first source knows the target, the second knows it of short histories, the third not."""
    generator = np.random.default_rng(0)
    items = np.tile(np.arange(20, dtype=np.int32), (cases, 1))
    targets, lengths = generator.integers(0, 20, cases), np.repeat([1, 2], cases // 2)
    scores = generator.random((3, cases, 20), dtype=np.float32)
    scores[0, np.arange(cases), targets] += 1
    scores[1, np.arange(cases // 2), targets[: cases // 2]] += 1
    found = Candidates(items, scores, lengths)
    histories = Histories.of([[0] * length for length in lengths])
    part = Cases(np.arange(cases), histories, Histories.of([[target] for target in targets]))
    sources = ("knows", "short", "noise")
    pipeline: Any = SimpleNamespace(
        item_counts=np.ones(20, np.int64),
        learned=None,
        fusion=Fusion(
            sources=sources,
            scales=dict.fromkeys(sources, 1.0),
            segments=tuple(
                Segment(max_events=longest, weights=dict(zip(sources, weights, strict=True)))
                for longest, weights in ((1, (0.5, 0.5, 0)), (None, (1, 0, 0.25)))
            ),
        ),
        embed=lambda histories: histories,
        candidates=lambda histories: found.take(np.arange(len(histories))),
    )
    return pipeline, SimpleNamespace(validation=part, test=part), scores, targets


def test_what_is_lost_without_a_source():
    pipeline, parts, scores, targets = problem()
    sources, cases = pipeline.fusion.sources, len(targets)
    ablation = Ablation(pipeline, parts, BootstrapConfig(draws=200))
    left_out = ablation.without_each({name: (name,) for name in sources})
    assert [each.name for each in left_out] == list(sources)
    # Those served, of which each half of the cases has one: (0.75, 0.25, 0.125).
    assert [each.weight for each in left_out] == pytest.approx([1, 1 / 3, 1 / 6])
    knows, short, noise = (each.lost for each in left_out)
    served = [0.5 * scores[0, :30] + 0.5 * scores[1, :30], scores[0, 30:] + 0.25 * scores[2, 30:]]
    rank = (np.concatenate(served) > np.concatenate(served)[np.arange(cases), targets, None]).sum(1)
    gains = np.where(rank < 10, 1 / np.log2(rank + 2), 0)
    assert [each.mean_a for each in (knows, short, noise)] == pytest.approx([gains.mean()] * 3)
    assert knows.difference.low > 0.2  # half of the cases have no other that knows
    assert short.difference.mean == pytest.approx(0, abs=0.01)
    assert noise.difference.mean <= 0


def test_trees_are_grown_anew_without_what_is_left_out():
    pipeline, parts, _, _ = problem(240)
    fusion, part = pipeline.fusion, parts.test
    items = ItemStatistics(pipeline.item_counts, None)
    newest = np.zeros(len(part), dtype=np.int64)
    found = pipeline.candidates(part.histories)
    pipeline.learned = LambdaRank.fit(
        fusion, found, part.targets, newest, items, LambdaRankConfig(depth=20), seed=0
    )
    ablation = Ablation(pipeline, parts, BootstrapConfig(draws=200))
    groups = {"noise": ("noise",), "both": ("knows", "short")}
    noise, both = ablation.without_each(groups)
    lists = pipeline.learned.fuse(found, newest, pipeline.item_counts == 0)
    served = ndcg(list_ranks(lists.items, lists.scores, part.targets), 10).mean()
    assert noise.lost.mean_a == both.lost.mean_a == pytest.approx(served)
    assert (noise.weight, both.weight) == (pytest.approx(1 / 6), None)
    assert both.lost.difference.low > 0.3  # noise alone is left
    assert abs(noise.lost.difference.mean) < 0.1
    pipeline.config = SimpleNamespace(sources=("short", "noise"))
    others = SimpleNamespace(**{**vars(pipeline), "candidates": _of(found, [1, 2])})
    [instead] = ablation.instead(others, {"a model": ("short", "noise")})
    [alone_] = ablation.without_each({"knows": ("knows",)})
    assert instead.lost.mean_b == alone_.lost.mean_b  # the same scores in their place


def _of(found: Candidates, sources: list[int]) -> Any:
    scores = found.scores[sources]
    return lambda histories: Candidates(
        found.items[: len(histories)], scores[:, : len(histories)], histories.lengths
    )
