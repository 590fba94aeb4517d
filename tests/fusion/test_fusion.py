from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness.candidates import made_up
from fusionrec.data.histories import Histories
from fusionrec.errors import ConfigError
from fusionrec.evaluation.metrics import METRICS
from fusionrec.evaluation.ranks import list_ranks
from fusionrec.fusion.candidates import Candidates, candidates, stack, union
from fusionrec.fusion.model import LAMBDARANK, Fusion, Segment, fuse
from fusionrec.fusion.normalisation import Normalisation, normalise, scales
from fusionrec.fusion.objective import Objective
from fusionrec.fusion.refine import (
    BAGGED,
    Setting,
    bagged,
    distrust,
    holds_out,
    polish,
    polished,
    segment_settings,
    trusted,
)
from fusionrec.fusion.rules import Rules
from fusionrec.sources.protocol import Ranked

ITEMS = np.array([[0, 2, 5], [1, 3, -1]], dtype=np.int32)
SCORES = np.array(
    [[[4.0, 2.0, 0.0], [1.0, 3.0, 0.0]], [[0.0, 10.0, 5.0], [2.0, 0.0, 0.0]]], dtype=np.float32
)
CANDIDATES = Candidates(ITEMS, SCORES, np.array([2, 9]))
WARM = np.zeros(6, dtype=bool)


def fusion(**changes):
    values = {
        "sources": ("a", "b"),
        "scales": {"a": 2.0, "b": 5.0},
        "segments": (
            Segment(max_events=4, weights={"a": 1.0, "b": 2.0}),
            Segment(weights={"a": 3.0, "b": 0.0}),
        ),
    }
    return Fusion(**{**values, **changes})


def test_union_is_sorted_distinct_and_padded():
    found = union([np.array([[5, 2], [1, -1]], np.int32), np.array([[2, 0], [3, 1]], np.int32)])
    np.testing.assert_array_equal(found, ITEMS)


def test_stack_pads_to_the_widest():
    narrow = Candidates(ITEMS[:, :2], SCORES[:, :, :2], CANDIDATES.lengths)
    found = stack([narrow, CANDIDATES])
    assert found.items.shape == (4, 3)
    assert found.items[0, 2] == -1
    assert found.scores.shape == (2, 4, 3)


def test_normalisations_have_known_answers():
    ones = np.ones(2, np.float32)
    assert scales(CANDIDATES).tolist() == pytest.approx([2.5, 17 / 3])
    found = normalise(CANDIDATES, Normalisation.MAX, ones)
    np.testing.assert_allclose(found[0], [[1, 0.5, 0], [1 / 3, 1, 0]])
    found = normalise(CANDIDATES, Normalisation.ZSCORE, ones)
    np.testing.assert_allclose(found[0, 0], [1.2247, 0, -1.2247], atol=1e-4)
    np.testing.assert_allclose(found[0, 1], [-1, 1, 0], atol=1e-6)
    found = normalise(CANDIDATES, Normalisation.LOG, ones)
    np.testing.assert_allclose(found[0, 0], np.log1p([4 / 3, 2 / 3, 0]), rtol=1e-6)
    found = normalise(CANDIDATES, Normalisation.SCALE, np.array([2, 5], np.float32))
    np.testing.assert_allclose(found[1, 0], [0, 2, 1])


@pytest.mark.parametrize("method", list(Normalisation))
def test_a_silent_source_stays_silent(method):
    silent = Candidates(ITEMS, np.zeros_like(SCORES), CANDIDATES.lengths)
    assert not normalise(silent, method, scales(silent)).any()


def test_the_segment_picks_the_weights_and_terms_sum_to_the_score():
    found = fuse(fusion(), CANDIDATES, WARM)
    assert found.items.tolist() == [[2, 0, 5], [3, 1, -1]]
    np.testing.assert_allclose(found.scores[0], [1 + 4, 2, 2])
    np.testing.assert_allclose(found.terms.sum(axis=1), found.scores)
    np.testing.assert_allclose(found.terms[1, 1], 0)


def test_cold_items_get_their_factor():
    segments = (Segment(weights={"a": 1.0, "b": 2.0}, cold_factor=0.5),)
    cold = WARM.copy()
    cold[2] = True
    found = fuse(fusion(segments=segments), CANDIDATES, cold)
    assert dict(zip(found.items[0].tolist(), found.scores[0].tolist(), strict=True))[2] == 2.5


def test_fusion_round_trips_and_says_what_is_wrong(tmp_path):
    path = tmp_path / "fusion.json"
    fusion().save(path)
    assert Fusion.load(path) == fusion()
    with pytest.raises(ConfigError, match=r"run `python -m tuning.fusion`"):
        Fusion.load(tmp_path / "none.json")
    path.write_text(path.read_text().replace('"a"', '"z"', 1))
    with pytest.raises(ConfigError, match=r"must name exactly"):
        Fusion.load(path)


def weights(found):
    return [segment.weights for segment in found.segments]


def test_what_has_no_weight_anywhere_is_not_asked():
    segments = (
        Segment(max_events=4, weights={"popularity": 0.0, "b": 2.0, "c": 0.0, "d": 0.0}),
        Segment(weights={"popularity": 0.0, "b": 0.0, "c": 4.0, "d": 0.0}),
    )
    sources = ("popularity", "b", "c", "d")
    every = fusion(sources=sources, scales=dict.fromkeys(sources, 3.0), segments=segments)
    found = every.asked()
    assert found.sources == ("b", "c", "popularity")
    assert found.fallback == "popularity"  # people of whom nothing is known need it
    assert found.scales == dict.fromkeys(found.sources, 3.0)
    assert [each["popularity"] for each in weights(found)] == pytest.approx([2e-3, 4e-3])
    assert found.personal.sources == ("b", "c")
    assert found.personal.fallback is None
    assert found.asked() == found
    assert Fusion.model_validate_json(found.model_dump_json()) == found
    assert every.without(("b", "c", "d")).sources == ("popularity",)
    silent = Fusion.uniform(("a", "b"), np.ones(2, np.float32))
    silent = silent.model_copy(update={"segments": (Segment(weights={"a": 0.0, "b": 0.0}),)})
    assert silent.asked() == silent


@pytest.mark.parametrize("sources", [("a", "b"), ("popularity",)])
def test_the_fallback_is_one_of_several_sources(sources):
    of_sources = {"sources": sources, "scales": dict.fromkeys(sources, 1.0)}
    segments = (Segment(weights=dict.fromkeys(sources, 1.0)),)
    with pytest.raises(ValueError, match="must be one of several sources"):
        fusion(**of_sources, segments=segments, fallback="popularity")


def test_trees_keep_what_they_were_grown_over(tmp_path):
    assert Fusion.served(tmp_path) is None
    one = Fusion.uniform(("a", "b"), np.ones(2, np.float32))
    one = one.model_copy(update={"segments": (Segment(weights={"a": 1.0, "b": 0.0}),)})
    one.save(tmp_path / "fusion.json")
    assert Fusion.served(tmp_path) == one.of_sources(("a",))
    (tmp_path / LAMBDARANK).mkdir()
    assert Fusion.served(tmp_path) == one


class Proposing:
    """Proposes always the same items to histories that are not empty, or to all."""

    def __init__(self, name, items, everybody=False):
        self.name, self._items, self._everybody, self.asked = name, items, everybody, 0

    def ask(self, histories):
        self.asked += len(histories)
        knows = self._everybody | (histories.lengths > 0)
        items = np.where(knows[:, None], np.array(self._items, np.int32), -1)
        scores = np.where(items >= 0, np.float32(1), np.float32(0))
        return SimpleNamespace(
            top=lambda k: Ranked(items[:, :k].astype(np.int32), scores[:, :k]),
            score=lambda asked: np.isin(asked, self._items).astype(np.float32) * knows[:, None],
        )


def test_the_fallback_is_asked_only_where_the_others_propose_too_few():
    personal = Proposing("a", [1, 2])
    popular = Proposing("popularity", [7, 8], everybody=True)
    histories = Histories.of([[0], [], [0, 4]])
    found = candidates([personal, popular], histories, 2, fallback="popularity")
    assert popular.asked == 1
    assert found.items.tolist() == [[1, 2], [7, 8], [1, 2]]
    assert found.scores.tolist() == [[[1, 1], [0, 0], [1, 1]], [[0, 0], [1, 1], [0, 0]]]
    found = candidates([personal, popular], histories, 3, fallback="popularity")
    assert popular.asked == 4  # nobody is offered three
    assert found.items.tolist() == [[1, 2, 7, 8], [7, 8, -1, -1], [1, 2, 7, 8]]


def test_the_fallback_is_asked_where_rules_leave_too_few():
    personal = Proposing("a", [1, 2])
    popular = Proposing("popularity", [7, 8], everybody=True)
    rules = Rules.of(np.arange(9) >= 2, np.arange(9))
    histories = Histories.of([[0]])
    found = candidates([personal, popular], histories, 2, rules, fallback="popularity")
    assert found.items.tolist() == [[2, 7, 8]]
    assert found.scores[1].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("bounds", [(4, 4, None), (5, 4, None), (4, 5), (None, None)])
def test_segments_must_ascend(bounds):
    segments = tuple(Segment(max_events=b, weights={"a": 1, "b": 1}) for b in bounds)
    with pytest.raises(ValueError, match="ascend"):
        fusion(segments=segments)


def random_case(seed, num_cases=40, width=12, max_targets=3, num_items=30):
    generator = np.random.default_rng(seed)
    drawn = [generator.choice(num_items, width, replace=False) for _ in range(num_cases)]
    items = np.sort(np.stack(drawn), axis=1).astype(np.int32)
    items[::5, -3:] = -1
    scores = np.round(generator.random((3, num_cases, width)), 1).astype(np.float32)
    scores *= items >= 0
    targets = Histories.of(
        [
            generator.choice(num_items, generator.integers(1, max_targets + 1), replace=False)
            for _ in range(num_cases)
        ]
    )
    return Candidates(items, scores, generator.integers(0, 20, num_cases)), targets


def listed(candidates, method, weights, cold_factor):
    """The lists that the pipeline would make."""
    names = tuple("abc")
    model = Fusion(
        sources=names,
        normalisation=method,
        scales=dict(zip(names, map(float, scales(candidates)), strict=True)),
        segments=(
            Segment(
                weights=dict(zip(names, map(float, weights), strict=True)), cold_factor=cold_factor
            ),
        ),
    )
    return fuse(model, candidates, np.arange(candidates.items.max() + 1) % 7 == 0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(list(Normalisation)),
    st.sampled_from([1, 3, 60]),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([1, 10, 40]),
)
def test_objective_is_the_ndcg_of_the_fused_list(seed, method, max_targets, cold_factor, k):
    """Bit for bit, ties among targets and all weights 0 included; factors of 2 round nothing."""
    candidates, targets = random_case(
        seed, num_cases=20, width=120, max_targets=max_targets, num_items=150
    )
    generator = np.random.default_rng(seed + 1)
    weights = generator.random(3).astype(np.float32) * (generator.random(3) < 0.7)
    cold = np.arange(candidates.items.max() + 1) % 7 == 0
    objective = Objective.of(candidates, targets, method, scales(candidates), cold, k)
    lists = listed(candidates, method, weights, cold_factor)
    expected = METRICS["ndcg"](list_ranks(lists.items, lists.scores, targets), k)
    found = np.zeros(len(candidates), np.float32)
    found[objective.rows] = objective.gains(weights, cold_factor)
    assert np.array_equal(found, expected.astype(np.float32))
    assert objective.value(weights, cold_factor) == pytest.approx(expected.mean(), abs=1e-7)


def test_a_part_of_an_objective_is_the_objective_of_the_part():
    candidates, targets = random_case(1, num_cases=30, width=70, num_items=90)
    method, cold = Normalisation.ZSCORE, np.arange(90) % 7 == 0
    objective = Objective.of(candidates, targets, method, scales(candidates), cold)
    weights = np.array([0.3, 0, 0.8], np.float32)
    found = np.zeros(30, np.float32)
    found[objective.rows] = objective.gains(weights, 0.7)
    keep = np.arange(30) % 3 == 0
    part = objective.take(keep)
    assert np.array_equal(part.gains(weights, 0.7), found[part.rows])
    assert set(part.rows) == set(objective.rows) & set(np.flatnonzero(keep))
    assert part.take(~keep).gains(weights).shape == (0,)
    without = objective.of_sources(np.array([True, False, True]))
    assert np.array_equal(without.gains(weights[[0, 2]], 0.7), objective.gains(weights, 0.7))


def test_objective_counts_every_target_in_the_ideal():
    candidates = Candidates(
        np.array([[0, 1, 2]], np.int32), np.array([[[3.0, 2.0, 1.0]]], np.float32), np.array([1])
    )
    targets = Histories.of([[0, 2, 9]])
    objective = Objective.of(candidates, targets, Normalisation.SCALE, np.ones(1, np.float32), WARM)
    ideal = 1 + 1 / np.log2(3) + 1 / 2
    assert objective.value(np.ones(1, np.float32)) == pytest.approx((1 + 1 / 2) / ideal)


def test_objective_without_any_hit_is_zero():
    targets = Histories.of([[4], [4]])
    objective = Objective.of(CANDIDATES, targets, Normalisation.SCALE, np.ones(2, np.float32), WARM)
    assert objective.value(np.ones(2, np.float32)) == 0


def test_polish_never_loses_and_finds_the_useful_source():
    candidates, targets = random_case(3, num_cases=300, max_targets=1)
    hit = candidates.items == targets.items[targets.offsets[:-1]][:, None]
    candidates.scores[1] += 0.3 * hit
    objective = Objective.of(
        candidates, targets, Normalisation.SCALE, scales(candidates), np.zeros(30, bool)
    )
    start = Setting(np.ones(3, np.float32))
    best = polish(objective, start)
    assert objective.value(best.weights) > objective.value(start.weights)
    assert best.weights.argmax() == 1


def test_bagging_follows_the_noise_of_few_cases_less_than_polishing_does():
    candidates, targets = random_case(7, num_cases=4000, max_targets=1)
    hit = candidates.items == targets.items[targets.offsets[:-1]][:, None]
    for source in (0, 1):
        candidates.scores[source] += 0.3 * hit
    objective = Objective.of(
        candidates, targets, Normalisation.SCALE, scales(candidates), np.zeros(30, bool)
    )
    start, held_out = Setting(np.ones(3, np.float32)), np.arange(4000) >= 1000
    others = objective.take(held_out)
    values = []
    for few in np.arange(1000).reshape(10, 100):
        chosen = objective.take(np.isin(np.arange(4000), few))
        settings = bagged(chosen, start, seed=0), polish(chosen, start)
        values.append([others.value(each.weights, each.cold_factor) for each in settings])
    by_bagging, by_polishing = np.mean(values, axis=0)
    assert by_bagging > by_polishing
    assert by_bagging > others.value(start.weights)


def test_bagging_tells_how_far_it_is_and_repeats_itself():
    candidates, targets = random_case(8, num_cases=50, max_targets=2)
    objective = Objective.of(
        candidates, targets, Normalisation.SCALE, scales(candidates), np.zeros(30, bool)
    )
    steps = []
    start = Setting(np.ones(3, np.float32))
    once = bagged(objective, start, 3, lambda: steps.append(None))
    assert len(steps) == BAGGED
    np.testing.assert_array_equal(once.weights, bagged(objective, start, 3).weights)


def test_the_mean_of_settings_does_not_depend_on_their_scale():
    mean = Setting.mean(
        [Setting(np.array([2, 1], np.float32), 1.0), Setting(np.array([0, 9], np.float32), 2.0)]
    )
    np.testing.assert_allclose(mean.weights, [0.5, 0.75])
    assert mean.cold_factor == 1.5


def test_segments_keep_the_common_weights_when_theirs_are_noise():
    candidates, targets = random_case(4, num_cases=200, max_targets=1)
    objective = Objective.of(
        candidates, targets, Normalisation.SCALE, scales(candidates), np.zeros(30, bool)
    )
    common = Setting(np.ones(3, np.float32))
    segment_of = np.arange(200) % 4
    settings_found = segment_settings(objective, common, segment_of, 4, seed=0)
    assert sum(found is common for found in settings_found) >= 3


def test_segments_take_their_own_weights_when_those_hold():
    candidates, targets = random_case(5, num_cases=600, max_targets=1)
    hit = candidates.items == targets.items[targets.offsets[:-1]][:, None]
    segment_of = (np.arange(600) < 300).astype(np.int64)
    candidates.scores[0] += 0.8 * hit * segment_of[:, None]
    candidates.scores[2] += 0.8 * hit * (1 - segment_of[:, None])
    objective = Objective.of(
        candidates, targets, Normalisation.SCALE, scales(candidates), np.zeros(30, bool)
    )
    common = Setting(np.ones(3, np.float32))
    other, first = segment_settings(objective, common, segment_of, 2, seed=0)
    assert first.weights.argmax() == 0
    assert other.weights.argmax() == 2


def test_one_case_is_not_enough_to_hold():
    gain = lambda _: lambda asked: np.ones(int(asked.sum()), np.float32)  # noqa: E731
    assert not holds_out(1, gain, np.ones(1, bool), seed=0)
    assert holds_out(10, gain, np.ones(10, bool), seed=0)


def test_samples_that_give_no_weight_vote_a_source_off():
    votes = [(0, 1, 0, 2)] * 2 + [(0, 1, 1, 2)] * 2 + [(0, 0, 1, 2)] * 1
    settings = [Setting(np.array(weights, np.float32)) for weights in votes]
    assert distrust(settings).tolist() == pytest.approx([1, 0.2, 0.4, 0])
    assert trusted(settings).tolist() == [False, True, False, True]
    none = [Setting(np.array([0, 0], np.float32))]
    assert trusted(none).tolist() == [True, False]  # one is asked


def test_noise_is_voted_off_that_the_mean_trusts():
    off = []
    for seed in range(6):
        material = made_up(200, 60, seed, num_sources=4)
        candidates = material.candidates
        candidates.scores[3] = np.random.default_rng(seed).pareto(2, candidates.items.shape)
        normalised = Normalisation.SCALE, scales(candidates)
        objective = Objective.of(candidates, material.targets, *normalised, material.cold)
        settings = polished(objective, Setting(np.ones(4, np.float32)), 0)
        assert Setting.mean(settings).weights[3] > 0
        keep = trusted(settings)
        assert keep[:3].all()
        off.append(not keep[3])
    assert np.mean(off) > 0.5  # of 200 cases a few suffice to speak for it
