import numpy as np
import pytest

from fusionrec.fusion.exposure import capped_prices, exposures


def ranked(values):
    """Lists of all items by [B, I] values, as the auction is given them."""

    def fill(prices):
        scores = values - prices
        order = np.argsort(-scores, axis=1, kind="stable")
        return order.astype(np.int32), np.take_along_axis(scores, order, axis=1)

    return fill


def test_an_item_pays_what_lets_the_fewest_lists_go():
    # Item 0 is best in all; the lists would give it up for 1 at 0.1, 0.2, 0.3, 0.4.
    values = np.array([[1.0, 0.9, 0], [1.0, 0.8, 0], [1.0, 0.7, 0], [1.0, 0.6, 0]])
    prices = capped_prices(ranked(values), 3, max_exposure=0.5, k=1)
    assert prices == pytest.approx([0.2, 0, 0], abs=0.004)
    items, _ = ranked(values)(prices)
    assert items[:, 0].tolist() == [1, 1, 0, 0]
    assert capped_prices(ranked(values), 3, max_exposure=1.0, k=1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("max_exposure", [0.1, 0.3])
def test_no_item_is_in_more_than_its_share(max_exposure):
    generator = np.random.default_rng(0)
    values = generator.random((200, 60)) + np.linspace(2, 0, 60)
    prices = capped_prices(ranked(values), 60, max_exposure, k=5)
    before, after = (exposures(ranked(values)(p)[0], 5, 60) for p in (0 * prices, prices))
    assert before.max() > 100
    assert after.max() <= max_exposure * 200
    assert not prices[after < max_exposure * 200 - 10].any()  # who is not wanted pays nothing


def test_what_cannot_be_had_ends():
    values = np.array([[1.0, 0.5], [1.0, 0.5]])
    prices = capped_prices(ranked(values), 2, max_exposure=0.5, k=2)
    assert prices.tolist() == [0, 0]  # both lists need both items
