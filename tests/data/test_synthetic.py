"""The synthetic data set keeps what its docstring promises, and its oracle is the best possible.

The bounds are loose: they hold for every seed tried, and say in which order things must come.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse as sp
from pydantic import ValidationError

from fusionrec.data.dataset import Dataset
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases, Protocol, Split, split
from fusionrec.data.synthetic import Oracle, SyntheticConfig, generate
from fusionrec.data.synthetic.words import DOMAINS, TOPICS
from fusionrec.data.synthetic.world import TOPIC_COLUMNS
from fusionrec.errors import DataError

SMALL = SyntheticConfig(num_users=60, num_items=80, seed=3)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The data set of the quickstart."""
    return generate(SyntheticConfig(), tmp_path_factory.mktemp("default") / "dataset")


@pytest.fixture(scope="module")
def halves(default: Dataset) -> Split:
    return split(default)


@pytest.fixture(scope="module")
def truth(default: Dataset, halves: Split) -> npt.NDArray[np.float32]:
    return Oracle.load(default.directory).scores(halves.test, halves.user_ids)


def matrix(histories: Histories, num_items: int) -> sp.csr_matrix:
    ones = np.ones(len(histories.items), dtype=np.float64)
    return sp.csr_matrix((ones, histories.items, histories.offsets), (len(histories), num_items))


def first_targets(cases: Cases) -> npt.NDArray[np.int32]:
    return cases.targets.items[cases.targets.offsets[:-1]]


def ndcg(scores: npt.NDArray, cases: Cases) -> npt.NDArray[np.float64]:
    """[B] NDCG@10 over all items but the history's, with the mean rank of ties."""
    scores = scores.astype(np.float64)
    scores[cases.histories.rows, cases.histories.items] = -np.inf
    own = scores[np.arange(len(cases)), first_targets(cases)][:, None]
    ranks = 1 + (scores > own).sum(axis=1) + ((scores == own).sum(axis=1) - 1) / 2
    return np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)


def by_words(dataset: Dataset, histories: Histories) -> npt.NDArray[np.float64]:
    """[B, I] cosine of the words of an item with those of the five newest items: TF-IDF."""
    catalogue = dataset.catalogue
    documents = [
        f"{title} {text}".lower().replace(".", " ").replace(",", " ").split()
        for title, text in zip(catalogue.titles, catalogue.texts, strict=True)
    ]
    code_of = {word: code for code, word in enumerate(sorted({w for d in documents for w in d}))}
    rows = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    columns = [code_of[word] for document in documents for word in document]
    counts = sp.csr_matrix((np.ones(len(columns)), (rows, columns)), (len(documents), len(code_of)))
    weights = np.log(len(documents) / np.asarray((counts > 0).sum(axis=0)).ravel())
    vectors = np.asarray((counts @ sp.diags(weights)).todense())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(matrix(histories.newest(5), len(documents)) @ vectors @ vectors.T)


def test_the_same_configuration_gives_the_same_files(tmp_path: Path) -> None:
    one, two = (generate(SMALL, tmp_path / name) for name in ("one", "two"))
    assert one.info == two.info
    names = sorted(p.relative_to(one.directory) for p in one.directory.rglob("*") if p.is_file())
    assert Path("oracle.npz") in names
    for name in names:
        assert (one.directory / name).read_bytes() == (two.directory / name).read_bytes(), name


def test_another_seed_gives_another_data_set(tmp_path: Path) -> None:
    one = generate(SMALL, tmp_path / "one").info.fingerprint
    two = generate(SMALL.model_copy(update={"seed": 4}), tmp_path / "two").info.fingerprint
    assert one != two


def test_configuration_round_trips_and_refuses_what_it_does_not_know() -> None:
    assert SyntheticConfig.model_validate_json(SMALL.model_dump_json()) == SMALL
    with pytest.raises(ValidationError, match="extra"):
        SyntheticConfig(users=3)
    with pytest.raises(ValidationError, match="noise"):
        SyntheticConfig(noise=1.5)


@pytest.mark.parametrize(("users", "items"), [(2, 50), (300, 50), (5, 400)])
def test_extreme_sizes_work(tmp_path: Path, users: int, items: int) -> None:
    dataset = generate(
        SyntheticConfig(num_users=users, num_items=items, median_events=100), tmp_path / "dataset"
    )
    assert dataset.info.num_users == users
    assert len(split(dataset).test) == users


def test_it_looks_like_a_log(default: Dataset, halves: Split) -> None:
    info, events = default.info, default.events
    assert (info.name, info.format, info.num_quarantined) == ("synthetic", "synthetic", 0)
    assert 1_000 <= info.num_users <= 1_500
    assert 1_500 <= info.num_items <= 2_500
    assert 25_000 <= info.num_interactions <= 40_000
    assert np.all(np.diff(events.timestamps) >= 0)
    full = halves.known.lengths + 1
    assert full.min() == 3
    assert np.mean(full <= 5) > 0.05
    assert np.mean(full >= 50) > 0.05
    pairs = events.users.astype(np.int64) * info.num_items + events.items
    assert len(np.unique(pairs)) == len(pairs), "an item is chosen once by a user"
    released = default.items.column("released").to_numpy()
    assert np.all(released[events.items] <= events.timestamps)
    same_user = np.diff(halves.known.rows) == 0
    assert np.all(np.diff(halves.known.timestamps)[same_user] > 0)
    popularity = np.sort(np.bincount(events.items, minlength=info.num_items))[::-1]
    assert popularity[: info.num_items // 10].sum() > 0.3 * popularity.sum()


def test_probabilities_are_probabilities(halves: Split, truth: npt.NDArray[np.float32]) -> None:
    np.testing.assert_allclose(truth.sum(axis=1), 1.0, rtol=1e-4)
    assert truth.min() >= 0
    histories = halves.test.histories
    assert np.all(truth[histories.rows, histories.items] == 0)
    assert np.all(truth[np.arange(len(truth)), first_targets(halves.test)] > 0)


@pytest.mark.parametrize("protocol", list(Protocol))
def test_the_oracle_is_calibrated(default: Dataset, protocol: Protocol) -> None:
    """Were the events drawn from other probabilities, E p(next) would not be E Σ p²."""
    parts = split(default, protocol)
    scores = Oracle.load(default.directory).scores(parts.test, parts.user_ids).astype(np.float64)
    got = scores[np.arange(len(scores)), first_targets(parts.test)]
    difference = got - (scores**2).sum(axis=1)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference))
    # The same for how surprising the events are: −log p against the entropy.
    logs = np.log(np.where(scores > 0, scores, 1.0))
    surprise = -np.log(got) + (scores * logs).sum(axis=1)
    assert abs(surprise.mean()) < 4 * surprise.std() / np.sqrt(len(surprise))


def test_what_models_can_reach(
    default: Dataset, halves: Split, truth: npt.NDArray[np.float32]
) -> None:
    """Chance < popularity < words < item-kNN, transitions << oracle."""
    test, train, num_items = halves.test, halves.train, halves.num_items
    interactions = matrix(train, num_items)
    together = np.asarray((interactions.T @ interactions).todense())
    norms = np.sqrt(np.maximum(np.diag(together), 1.0))
    cosine = together / np.outer(norms, norms)
    np.fill_diagonal(cosine, 0.0)
    steps = np.zeros((num_items, num_items))
    for lag in (1, 2, 3):
        same = train.rows[lag:] == train.rows[:-lag]
        np.add.at(steps, (train.items[:-lag][same], train.items[lag:][same]), 1 / lag)
    steps /= steps.sum(axis=1, keepdims=True) + 3
    histories = matrix(test.histories, num_items)
    reached = {
        "popularity": np.tile(halves.item_counts, (len(test), 1)),
        "words": by_words(default, test.histories),
        "knn": np.asarray(histories @ cosine),
        "transitions": np.asarray(matrix(test.histories.newest(3), num_items) @ steps),
        "oracle": truth,
    }
    score = {name: ndcg(scores, test).mean() for name, scores in reached.items()}
    chance = np.mean([1 / np.log2(rank + 1) for rank in range(1, 11)]) * 10 / num_items
    assert score["popularity"] > 2 * chance
    assert score["words"] > 1.5 * score["popularity"]
    assert score["knn"] > 3 * score["popularity"]
    assert score["transitions"] > 3 * score["popularity"]
    assert score["oracle"] > 1.5 * max(s for name, s in score.items() if name != "oracle")
    assert 0.2 < score["oracle"] < 0.5, "noise and chance keep even the oracle from certainty"


def test_cold_items_can_be_told_by_their_words_alone(
    default: Dataset, halves: Split, truth: npt.NDArray[np.float32]
) -> None:
    cold = halves.item_counts == 0
    assert 0.05 < cold.mean() < 0.2
    assert not np.isin(np.flatnonzero(cold), default.events.items).all(), "some never appear"
    of_cold = cold[first_targets(halves.test)]
    assert of_cold.mean() > 0.02
    cases = halves.test.take(np.flatnonzero(of_cold))
    ranks = (truth[of_cold] > truth[of_cold, first_targets(cases)][:, None]).sum(axis=1)
    assert np.median(ranks) < 100, "who knows the world ranks cold items as well as others"
    words = by_words(default, cases.histories)
    words[:, ~cold] = -np.inf
    better = (words > words[np.arange(len(cases)), first_targets(cases)][:, None]).sum(axis=1)
    assert (better < 0.1 * cold.sum()).mean() > 0.15, "chance would be a tenth"


def topics_of(world_items: npt.NDArray, events: npt.NDArray) -> npt.NDArray:
    total = world_items[events].sum(axis=0)
    return total / np.linalg.norm(total)


def test_tastes_cross_domains(default: Dataset, halves: Split) -> None:
    """A user's books are about the topics of the same user's films, not of another's."""
    topics = Oracle.load(default.directory).world.features[:, TOPIC_COLUMNS]
    domains = np.array([DOMAINS.index(domain) for domain in default.catalogue.domains])
    films, books = [], []
    for user in range(len(halves.known)):
        events = halves.known.row(user)
        film, book = events[domains[events] == 0], events[domains[events] == 1]
        if min(len(film), len(book)) >= 5:
            films.append(topics_of(topics, film))
            books.append(topics_of(topics, book))
    likeness = np.array(films) @ np.array(books).T
    assert len(films) > 100
    assert np.diag(likeness).mean() > likeness.mean() + 0.2


def test_tastes_drift(default: Dataset, halves: Split, tmp_path: Path) -> None:
    def steadiness(dataset: Dataset, histories: Histories) -> float:
        """Likeness of the topics of the first and the last quarter of long histories."""
        topics = Oracle.load(dataset.directory).world.features[:, TOPIC_COLUMNS]
        values = []
        for user in np.flatnonzero(histories.lengths >= 24):
            events = histories.row(user)
            quarter = len(events) // 4
            values.append(
                topics_of(topics, events[:quarter]) @ topics_of(topics, events[-quarter:])
            )
        return float(np.mean(values))

    still = generate(SyntheticConfig(drift=0.0), tmp_path / "still")
    assert steadiness(still, split(still).known) > steadiness(default, halves.known) + 0.1


def test_text_speaks_of_the_topics(default: Dataset) -> None:
    world = Oracle.load(default.directory).world
    catalogue = default.catalogue
    main = world.features[:, TOPIC_COLUMNS].argmax(axis=1)
    phrases = [
        {phrase.lower() for phrase in (*t.nouns, *t.matters, *t.acts, *t.sounds)} for t in TOPICS
    ]
    said = np.array(
        [
            [any(p in f"{title}. {text}".lower() for p in phrases[k]) for k in range(len(TOPICS))]
            for title, text in zip(catalogue.titles, catalogue.texts, strict=True)
        ]
    )
    assert said[np.arange(len(world)), main].mean() > 0.9
    assert said.sum(axis=1).mean() < 4, "and of few others"
    assert all(catalogue.titles)
    assert len(set(catalogue.titles)) > 0.98 * len(catalogue)
    assert 0.01 < np.mean([not text for text in catalogue.texts]) < 0.1
    assert set(catalogue.domains) == set(DOMAINS)


def test_ratings_and_reviews_reflect_the_fit(default: Dataset) -> None:
    world = Oracle.load(default.directory).world
    events = default.events
    number = {user_id: n for n, user_id in enumerate(Oracle.load(default.directory).user_ids)}
    users = np.array([number[events.user_ids[u]] for u in events.users])
    taste = world.tastes.mean(axis=1)[:, TOPIC_COLUMNS]
    fit = (taste[users] * world.features[events.items, TOPIC_COLUMNS]).sum(axis=1)
    assert np.corrcoef(fit, events.values)[0, 1] > 0.4
    assert set(np.unique(events.values)) == {1, 2, 3, 4, 5}
    reviews = default.interactions(["event", "value", "text"]).to_pylist()
    assert all((row["event"] == "review") == (row["text"] is not None) for row in reviews)
    glad = [row["value"] for row in reviews if row["text"] and "look no further" in row["text"]]
    sad = [row["value"] for row in reviews if row["text"] and "Not for me" in row["text"]]
    assert min(glad) >= 4
    assert max(sad) <= 2


def test_series_are_followed(default: Dataset, halves: Split) -> None:
    world = Oracle.load(default.directory).world
    history = halves.known
    inside = history.rows[1:] == history.rows[:-1]
    following = world.following[history.items[:-1][inside]]
    has_next = following >= 0
    taken = history.items[1:][inside][has_next] == following[has_next]
    assert 0.03 < taken.mean() < 0.5
    crossing = world.previous >= 0
    domains = np.array(default.catalogue.domains)
    assert (domains[crossing] != domains[world.previous[crossing]]).any()


def test_no_oracle_beside_other_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"oracle\.npz"):
        Oracle.load(tmp_path)
