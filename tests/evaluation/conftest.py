from dataclasses import dataclass, field

import numpy as np
import pytest

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.dataset import DatasetInfo
from fusionrec.data.histories import Histories
from fusionrec.data.splits import Cases
from fusionrec.sources.protocol import Ranked


@dataclass
class TableSource:
    """Scores an item by a number that is looked up: the same for every history."""

    name: str
    by_item: np.ndarray

    def score(self, _histories, candidates):
        return np.where(candidates >= 0, self.by_item[candidates], 0).astype(np.float32)

    def top(self, histories, k):
        items = np.full((len(histories), k), -1, np.int32)
        scores = np.zeros((len(histories), k), np.float32)
        for b in range(len(histories)):
            own = self.by_item.astype(np.float32).copy()
            own[histories.row(b)] = 0
            best = np.argsort(-own, kind="stable")[:k]
            best = best[own[best] > 0]
            items[b, : len(best)], scores[b, : len(best)] = best, own[best]
        return Ranked(items, scores)


@dataclass
class FakeLists:
    items: np.ndarray
    scores: np.ndarray
    terms: np.ndarray
    term_names: tuple[str, ...]

    def take(self, order):
        return FakeLists(
            np.take_along_axis(self.items, order, 1),
            np.take_along_axis(self.scores, order, 1),
            np.take_along_axis(self.terms, order[:, None], 2),
            self.term_names,
        )


@dataclass
class FakePipeline:
    """The sum of its sources over their united top items; the reranker likes even items."""

    sources: list
    weights: tuple[float, ...]
    reranker: object | None = None
    asked: list = field(default_factory=list)

    def embed(self, histories):
        return histories

    def retrieve(self, histories):
        self.asked.append(len(histories))
        tops = [source.top(histories, 20).items for source in self.sources]
        width = sum(top.shape[1] for top in tops)
        items = np.full((len(histories), width), -1, np.int32)
        for b, row in enumerate(np.concatenate(tops, 1)):
            distinct = np.unique(row[row >= 0])
            items[b, : len(distinct)] = distinct
        pairs = zip(self.sources, self.weights, strict=True)
        terms = np.stack([w * s.score(histories, items) for s, w in pairs], 1).astype(np.float32)
        lists = FakeLists(items, terms.sum(1), terms, tuple(s.name for s in self.sources))
        keys = np.where(items >= 0, -lists.scores, np.inf)
        return lists.take(np.argsort(keys, axis=1, kind="stable"))

    def rerank(self, _histories, fused):
        extra = np.where((fused.items >= 0) & (fused.items % 2 == 0), 0.25, 0).astype(np.float32)
        terms = np.concatenate([fused.terms, extra[:, None]], 1)
        lists = FakeLists(fused.items, fused.scores + extra, terms, (*fused.term_names, "reranker"))
        keys = np.where(fused.items >= 0, -lists.scores, np.inf)
        return lists.take(np.argsort(keys, axis=1, kind="stable"))


NUM_ITEMS = 60


@pytest.fixture
def catalogue():
    return Catalogue(
        item_ids=tuple(f"i{code}" for code in range(NUM_ITEMS)),
        titles=tuple(f"Item {code}" for code in range(NUM_ITEMS)),
        texts=("",) * NUM_ITEMS,
        categories=tuple(
            ((f"c{code % 3}", f"d{code % 2}") if code else ()) for code in range(NUM_ITEMS)
        ),
        domains=("",) * NUM_ITEMS,
    )


@pytest.fixture
def item_counts():
    counts = np.arange(NUM_ITEMS, 0, -1, dtype=np.int64) ** 2
    counts[-5:] = 0
    return counts


@pytest.fixture
def cases(item_counts):
    """300 cases with one to three targets, mostly popular ones; some without a history."""
    rng = np.random.default_rng(11)
    chance = (item_counts + 1) / (item_counts + 1).sum()
    rows = [rng.choice(NUM_ITEMS, 12, replace=False, p=chance) for _ in range(300)]
    targets = [row[: 1 + b % 3] for b, row in enumerate(rows)]
    histories = [row[3 : 3 + b % 9] for b, row in enumerate(rows)]
    return Cases(np.arange(300), Histories.of(histories), Histories.of(targets))


@pytest.fixture
def pipeline(item_counts):
    rng = np.random.default_rng(2)
    return FakePipeline(
        [
            TableSource("popular", item_counts / item_counts.max()),
            TableSource("chance", rng.random(NUM_ITEMS)),
        ],
        (1.0, 0.1),
        reranker=object(),
    )


@pytest.fixture
def dataset_info():
    return DatasetInfo(
        name="shop <&> co",
        format="table",
        fingerprint="ab" * 32,
        num_interactions=5000,
        num_users=300,
        num_items=NUM_ITEMS,
    )
