"""The choice of a precision, on a real pipeline directory with tiny models and clocks that lie."""

import json
import shutil

import pytest
import torch

from fusionrec.bundles.gate import judge, write_cases
from fusionrec.bundles.store import BundleStore
from fusionrec.data.splits import split
from fusionrec.data.text import item_texts
from fusionrec.errors import ConfigError
from fusionrec.evaluation.evaluate import measure
from fusionrec.evaluation.metrics import METRICS
from fusionrec.language import rankers
from fusionrec.language.encoder import Encoder
from fusionrec.language.precision import InferenceConfig, Precision, read_inference
from fusionrec.language.quantized import Int8FeedForward, watched
from fusionrec.serving.pipeline import Pipeline
from jobs import optimise as job
from jobs.optimise import OptimiseConfig, Served, optimise

BF16, FP32, INT8 = Precision.BF16, Precision.FP32, Precision.INT8


@pytest.fixture
def config(fitted, synthetic, tmp_path, monkeypatch) -> OptimiseConfig:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    place = shutil.copytree(fitted, tmp_path / "pipeline")
    return OptimiseConfig(
        pipeline=place, dataset=synthetic.directory, max_cases=40, precision="bf16"
    )


def scripted(monkeypatch: pytest.MonkeyPatch, *found: Served) -> list[tuple[Precision, Precision]]:
    """Measurements as given, in order; returns what was loaded during each."""
    loaded, results = [], iter(found)

    def next_result(pipeline: Pipeline, *_: object) -> Served:
        loaded.append((pipeline.encoder.precision, pipeline.reranker.precision))
        return next(results)

    monkeypatch.setattr(job, "measure", next_result)
    return loaded


def test_what_is_measured_is_written_and_let_through(config, tmp_path):
    """Nothing is scripted: which precision is faster here is the machine's business."""
    write_cases(config.pipeline, ["of another precision"], [0.5])
    choices = optimise(config.model_copy(update={"precision": None}))
    assert [choice.model for choice in choices] == ["encoder", "reranker"]
    assert all(choice.fp32_s > 0 for choice in choices)
    for choice in choices:
        assert [each.measured.precision for each in choice.tried] == [BF16, INT8]
        assert all(each.seconds > 0 for each in choice.tried)
    chosen = {choice.model: choice.precision for choice in choices}
    chosen |= {f"{choice.model}_peaks": choice.peaks for choice in choices}
    assert read_inference(config.pipeline) == InferenceConfig(**chosen)
    assert not (config.pipeline / "validation.parquet").exists()
    kept = json.loads((config.pipeline / "metrics.json").read_text())["inference"]
    assert kept["encoder"].keys() == {"num_cases", "precision", "fp32", "faster"}
    assert kept["encoder"]["num_cases"] == 40
    assert kept["encoder"]["fp32"] == kept["reranker"]["fp32"] > 0
    store = BundleStore(tmp_path / "bundles")
    manifest = store.add(config.pipeline)
    assert manifest.metrics["inference"] == kept
    assert judge(store, manifest).passed


def test_ndcg_is_that_of_the_served_list(config, synthetic):
    pipeline, parts = Pipeline.load(config.pipeline), split(synthetic)
    served = measure(pipeline, parts.validation, parts.item_counts, 10)[-1]
    expected = METRICS["ndcg"](served.ranks, 10).mean()
    assert job.measure(pipeline, parts.validation, "x").ndcg == pytest.approx(expected)


def test_faster_and_as_good_is_kept(config, monkeypatch):
    before = Served(0.4, 0.02, 0.2)
    after = (Served(0.401, 0.005, 0.2), Served(0.3981, 0.005, 0.05))
    loaded = scripted(monkeypatch, before, *after)
    optimise(config)
    assert loaded == [(FP32, FP32), (BF16, FP32), (BF16, BF16)]
    assert read_inference(config.pipeline) == InferenceConfig(encoder=BF16, reranker=BF16)
    pipeline = Pipeline.load(config.pipeline)
    assert (pipeline.encoder.precision, pipeline.reranker.precision) == (BF16, BF16)


@pytest.mark.parametrize("encoder", [Served(0.39, 0.005, 0.2), Served(0.4, 0.021, 0.2)])
def test_worse_or_slower_is_not_kept(config, monkeypatch, encoder):
    loaded = scripted(monkeypatch, Served(0.4, 0.02, 0.2), encoder, Served(0.4, 0.02, 0.1))
    first, second = optimise(config)
    assert (first.precision, second.precision) == (FP32, BF16)
    assert loaded == [(FP32, FP32), (BF16, FP32), (FP32, BF16)]
    assert read_inference(config.pipeline) == InferenceConfig(encoder=FP32, reranker=BF16)


FP32_TIMES = Served(0.4, 0.02, 0.2)


@pytest.mark.parametrize(
    ("bf16", "int8", "chosen", "told"),
    [
        ((0.4, 0.010), (0.399, 0.008), INT8, INT8),
        ((0.4, 0.008), (0.4, 0.010), BF16, BF16),
        ((0.4, 0.010), (0.39, 0.008), BF16, BF16),
        ((0.38, 0.010), (0.39, 0.008), FP32, INT8),
        ((0.4, 0.030), (0.39, 0.008), FP32, BF16),
    ],
)
def test_of_several_precisions_the_fastest_as_good_one(
    config, monkeypatch, bf16, int8, chosen, told
):
    encoder = [Served(ndcg, seconds, 0.2) for ndcg, seconds in (bf16, int8)]
    reranker = [Served(0.4, 0.02, 0.1), Served(0.1, 0.02, 0.05)]
    loaded = scripted(monkeypatch, FP32_TIMES, *encoder, *reranker)
    first, second = optimise(config.model_copy(update={"precision": None}))
    assert loaded == [
        *((FP32, FP32), (BF16, FP32), (INT8, FP32)),
        *((chosen, BF16), (chosen, INT8)),
    ]
    assert (first.precision, second.precision) == (chosen, BF16)
    assert read_inference(config.pipeline) == InferenceConfig(encoder=chosen, reranker=BF16)
    kept = json.loads((config.pipeline / "metrics.json").read_text())["inference"]
    assert kept["encoder"]["precision"] == told


def test_the_table(config, monkeypatch, capfd):
    scripted(monkeypatch, Served(0.4, 0.02, 0.2), Served(0.4, 0.00612, 0.2), Served(0.1, 0.02, 0.1))
    place, dataset = str(config.pipeline), str(config.dataset)
    flags = ["--pipeline", place, "--dataset", dataset, "--precision", "bf16"]
    monkeypatch.setattr("sys.argv", ["optimise", *flags])
    job.main()
    said = capfd.readouterr()
    rows = [line.strip("│ ").split("│") for line in said.err.splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["encoder", "fp32", "20.00", "0.4000"],
        ["encoder", "bf16", "6.12", "0.4000", "yes"],
        ["reranker", "fp32", "200.00", "0.4000", "yes"],
        ["reranker", "bf16", "100.00", "0.1000"],
    ]
    assert said.out == f"precision: {config.pipeline / 'inference.json'}\n"


def test_a_reranker_without_weight_is_not_measured(config, monkeypatch):
    fusion = Pipeline.load(config.pipeline).fusion
    segments = tuple(s.model_copy(update={"reranker": 0.0}) for s in fusion.segments)
    fusion.model_copy(update={"segments": segments}).save(config.pipeline / "fusion.json")
    scripted(monkeypatch, Served(0.4, 0.02, 0.0), Served(0.4, 0.01, 0.0))
    [choice] = optimise(config)
    assert choice.model == "encoder"
    assert read_inference(config.pipeline) == InferenceConfig(encoder=BF16)


@pytest.mark.parametrize("asked", [False, True])
def test_int8_without_instructions_for_bf16_or_where_asked_for(
    config, monkeypatch, tmp_path, asked
):
    config = config.model_copy(update={"precision": "int8" if asked else None})
    if not asked:
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    loaded = scripted(
        monkeypatch, Served(0.4, 0.02, 0.2), Served(0.4, 0.01, 0.2), Served(0.39, 0.01, 0.1)
    )
    optimise(config)
    assert loaded == [(FP32, FP32), (INT8, FP32), (INT8, INT8)]
    assert read_inference(config.pipeline) == InferenceConfig(encoder=INT8, reranker=FP32)
    store = BundleStore(tmp_path / "bundles")
    assert judge(store, store.add(config.pipeline)).passed
    claim = InferenceConfig(encoder=INT8, reranker=INT8).model_dump_json()
    (config.pipeline / "inference.json").write_text(claim)
    refused = judge(store, store.add(config.pipeline))
    assert not refused.passed
    assert "int8 for the reranker, with which ndcg@10 is 0.3900" in refused.reason


def test_a_model_that_has_no_int8_stays(config, monkeypatch, capfd):
    """As decoders do."""
    load = rankers.load_reranker

    def without(*place, precision, frozen, peaks):
        del precision, peaks
        return load(*place, precision=FP32, frozen=frozen)

    monkeypatch.setattr(rankers, "load_reranker", without)
    scripted(monkeypatch, Served(0.4, 0.02, 0.2), Served(0.4, 0.01, 0.2))
    [choice] = optimise(config.model_copy(update={"precision": "int8"}))
    assert (choice.model, choice.precision) == ("encoder", INT8)
    assert "The reranker has no int8" in capfd.readouterr().err


def test_int8_is_measured_as_it_is_served(config):
    """Nothing is scripted."""
    choices = optimise(config.model_copy(update={"precision": "int8"}))
    for choice in choices:
        [tried] = choice.tried
        assert tried.measured.precision is INT8
        assert tried.measured.faster > 0.8 * tried.measured.fp32 > 0


def test_int8_is_served_with_the_peaks_that_were_seen(config, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    measured = job.measure
    results = iter([Served(0.4, 0.02, 0.2), Served(0.4, 0.01, 0.2), Served(0.4, 0.01, 0.3)])

    def measure_and_say(*given) -> Served:
        measured(*given)
        return next(results)

    monkeypatch.setattr(job, "measure", measure_and_say)
    optimise(config.model_copy(update={"precision": "int8"}))
    found = read_inference(config.pipeline)
    assert (found.encoder, found.reranker) == (INT8, FP32)
    pipeline = Pipeline.load(config.pipeline)
    layers = pipeline.encoder.model.encoder._layers
    assert {type(layer._feed_forward) for layer in layers} == {Int8FeedForward}
    assert len(found.encoder_peaks) == len(layers)
    assert found.reranker_peaks == ()
    exact = Encoder.load(config.pipeline / "encoder")
    with watched(exact.model) as peaks:
        exact.encode(item_texts(pipeline.catalogue))
    assert found.encoder_peaks == pytest.approx(peaks, rel=0.5)


def test_without_its_instructions_no_peaks_are_kept(config, monkeypatch):
    """A machine that has them would serve what was never measured."""
    scripted(monkeypatch, Served(0.4, 0.02, 0.2), Served(0.4, 0.01, 0.2), Served(0.4, 0.01, 0.1))
    optimise(config.model_copy(update={"precision": "int8"}))
    assert read_inference(config.pipeline) == InferenceConfig(encoder=INT8, reranker=INT8)


@pytest.mark.parametrize(
    ("peak", "kept"), [(24.656, 25.0), (7.1, 7.1), (7.11, 7.2), (0.3301, 0.34), (99.1, 100.0)]
)
def test_peaks_are_rounded_up(peak, kept):
    assert job._rounded_up(peak) == kept


def test_without_a_model_or_anything_faster_nothing_changes(config, monkeypatch, capfd):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert optimise(config.model_copy(update={"precision": "bf16"})) == []
    assert "has no bf16" in capfd.readouterr().err
    for model in ("encoder", "reranker"):
        shutil.rmtree(config.pipeline / model)
    assert optimise(config) == []
    assert "No language model is used" in capfd.readouterr().err
    assert not (config.pipeline / "inference.json").exists()
    assert not (config.pipeline / "metrics.json").exists()


def test_another_data_set_is_refused(config):
    path = config.pipeline / "pipeline.json"
    values = json.loads(path.read_text())
    values["dataset"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"is not what .* was fitted on"):
        optimise(config)
