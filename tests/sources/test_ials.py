"""iALS beside the package that learns its items."""

import numpy as np
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares

from fusionrec.data.catalogue import Catalogue
from fusionrec.data.histories import Histories
from fusionrec.sources.ials import IALS, IALSConfig
from fusionrec.sources.protocol import TrainingData


def test_a_history_is_folded_in_as_implicit_recalculates_a_user():
    """Of histories that training has not seen, in which every event weighs the same."""
    generator = np.random.default_rng(3)
    rows = [generator.choice(40, size, replace=False) for size in generator.integers(2, 9, 90)]
    empty = ("",) * 40
    catalogue = Catalogue(tuple(map(str, range(40))), empty, empty, ((),) * 40, empty)
    config = IALSConfig(factors=6, regularisation=0.7, alpha=5.0, recency=1.0)
    fitted = IALS(config).fit(TrainingData(catalogue, Histories.of(rows[:60])))
    unseen = Histories.of(rows[60:])
    found = fitted.ask(unseen)

    model = AlternatingLeastSquares(factors=6, regularization=0.7, alpha=1.0, num_threads=1)
    model.item_factors = np.asarray(fitted._index.vectors, dtype=np.float32)
    seen = sp.csr_matrix(
        (np.full(len(unseen.items), 1 + config.alpha, np.float32), unseen.items, unseen.offsets),
        shape=(len(unseen), 40),
    )
    expected = model.recalculate_user(np.arange(len(unseen)), seen)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found.queries, expected, rtol=1e-3, atol=1e-4)
