"""The page in headless Chromium: what it does.

Every test also fails on an error of the browser's console, and on a request to any other host
(``visit`` in conftest.py).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Locator, Page, expect

if TYPE_CHECKING:
    from tests.serve_apps.web.conftest import LocalEndpoint, Visit, Visitor


def terms(page: Page, card: int) -> dict[str, float]:
    """The table of a card's terms, the last line being the score."""
    rows = page.locator(".card").nth(card).locator(".terms tbody tr")
    cells = rows.evaluate_all("rows => rows.map(r => [...r.children].map(c => c.textContent))")
    return {name: float(adds) for name, _, _, adds in cells}


def slide(page: Page, term: str, value: float) -> None:
    """Put a slider somewhere, as a drag would."""
    page.get_by_label(term, exact=True).fill(str(value))


def found(page: Page) -> Locator:
    return page.get_by_role("listbox", name="Titles found").get_by_role("option")


def find(page: Page, words: str) -> None:
    """Add the first title with some words to the history."""
    field = page.get_by_role("combobox", name="Add a title to the history")
    field.fill(words)
    found(page).first.wait_for()
    field.press("ArrowDown")
    field.press("Enter")


def history_mode(visitor: Visitor) -> Page:
    page = visitor.load()
    page.get_by_label("History or wish").check(force=True)
    visitor.settle()
    return page


def test_it_loads_with_the_list_of_some_user(
    visit: Visit, address: str, endpoint: LocalEndpoint, two_bundles: list[str]
):
    visitor = visit(address)
    page = visitor.load()
    expect(page).to_have_title("FusionRec")
    (request,) = endpoint.asked
    assert request.user_id is not None
    chosen = page.locator("#sample button[aria-pressed=true]")
    expect(chosen).to_have_attribute("data-user", request.user_id)
    expect(page.get_by_role("status").filter(has_text="items for user")).to_be_visible()
    cards = page.get_by_role("list", name="List A").get_by_role("listitem")
    assert cards.count() == 10
    expect(cards.first.get_by_role("heading")).not_to_be_empty()
    expect(cards.first.locator(".chip")).not_to_be_empty()
    stages = page.locator(".column").first.locator(".timing th[scope=row]").all_inner_texts()
    assert stages[:3] == ["queue", "embed", "retrieve"]
    facts = page.get_by_label("State of the endpoint")
    expect(facts).to_contain_text(two_bundles[0][:12])
    expect(facts).to_contain_text("Embedder 1/2")
    visitor.picture("page")


def test_the_bars_and_the_tables_add_up_to_the_score(
    visit: Visit, address: str, endpoint: LocalEndpoint
):
    page = visit(address).load()
    shown = page.locator(".card").evaluate_all(
        "cards => cards.map(c => [Number(c.querySelector('.score').textContent),"
        " Object.fromEntries([...c.querySelectorAll('.bar span')].map("
        "  s => [s.dataset.term, parseFloat(s.style.width)]))])"
    )
    tables = [terms(page, card) for card in range(len(shown))]
    scores = [table.pop("Score") for table in tables]
    highest, lowest = (
        pick(sum(pick(value, 0) for value in table.values()) for table in tables)
        for pick in (max, min)
    )
    for table, total, (score, widths) in zip(tables, scores, shown, strict=True):
        assert total == score
        assert sum(table.values()) == pytest.approx(score, abs=0.003)
        assert set(table) == set(widths)
        for name, value in table.items():
            assert widths[name] * (highest - lowest) / 100 == pytest.approx(abs(value), abs=0.003)
    label = page.locator(".card .bar").first.get_attribute("aria-label")
    assert label == ", ".join(
        f"{name} {value:.3f}" for name, value in terms(page, 0).items() if name != "Score"
    )


def test_sliders_rerank_at_once_and_send_nothing(
    visit: Visit, address: str, endpoint: LocalEndpoint
):
    visitor = visit(address)
    page = visitor.load()
    served = visitor.ids()
    sent = len(endpoint.asked)
    slide(page, "bm25", 0.2)
    slide(page, "popularity", 2)
    shown = visitor.ids()
    assert shown != served
    (answer,) = page.evaluate(
        "question => fetch('v1/recommend', {method: 'POST', body: JSON.stringify(question),"
        " headers: {'content-type': 'application/json'}}).then(async r => [await r.json()])",
        {"user_id": endpoint.asked[0].user_id, "k": 100, "explain": True},
    )
    factors = {"bm25": 0.2, "popularity": 2.0}

    def score(item: dict) -> float:
        return sum(value * factors.get(name, 1) for name, value in item["terms"].items())

    expected = sorted(answer["items"], key=score, reverse=True)[:10]
    assert shown == [item["item_id"] for item in expected]
    assert len(endpoint.asked) == sent + 1  # the one just above
    assert terms(page, 0)["Score"] == pytest.approx(score(expected[0]), abs=0.001)
    expect(page.get_by_role("status").filter(has_text="Re-ranked")).to_be_visible()
    visitor.picture("weights")
    page.get_by_role("button", name="Reset").click()
    assert visitor.ids() == served
    page.get_by_label("Items", exact=True).select_option("20")
    assert visitor.ids()[:10] == served
    assert len(visitor.ids()) == 20


def test_a_history_is_found_ordered_and_emptied(
    visit: Visit, address: str, endpoint: LocalEndpoint, two_bundles: list[str]
):
    visitor = visit(address)
    page = history_mode(visitor)
    expect(page.locator(".badge").filter(has_text="nothing was asked for")).to_be_visible()
    catalogue = endpoint.services[two_bundles[0]].catalogue
    for code in (5, 9, 2):
        find(page, catalogue.item_ids[code])
    visitor.settle()
    ids = [catalogue.item_ids[code] for code in (5, 9, 2)]
    assert endpoint.asked[-1].history == ids
    visitor.picture("history")
    page.get_by_role("button", name=f"Make older {catalogue.titles[2]}", exact=True).click()
    visitor.settle()
    assert endpoint.asked[-1].history == [ids[0], ids[2], ids[1]]
    assert page.evaluate("document.activeElement.dataset.act") == "older"
    page.get_by_role("button", name=f"Remove {catalogue.titles[5]}", exact=True).click()
    visitor.settle()
    assert endpoint.asked[-1].history == [ids[2], ids[1]]
    page.get_by_role("button", name="Clear").click()
    visitor.settle()
    assert endpoint.asked[-1].history is None


def test_titles_are_searched_while_one_types(
    visit: Visit, address: str, endpoint: LocalEndpoint, two_bundles: list[str]
):
    visitor = visit(address)
    page = history_mode(visitor)
    title = endpoint.services[two_bundles[0]].catalogue.titles[0]
    field = page.get_by_role("combobox", name="Add a title to the history")
    field.press_sequentially(title[:4].upper())
    options = found(page)
    expect(options.first).to_be_visible()
    expect(field).to_have_attribute("aria-expanded", "true")
    field.press("ArrowDown")
    expect(options.first).to_have_attribute("aria-selected", "true")
    expect(field).to_have_attribute("aria-activedescendant", "found-0")
    field.press("Escape")
    expect(options).to_have_count(0)
    field.fill("no-such-word")
    expect(page.get_by_text("No title has these words")).to_be_visible()


def test_a_wish(visit: Visit, address: str, endpoint: LocalEndpoint):
    visitor = visit(address)
    page = history_mode(visitor)
    wish = page.get_by_label("A wish, in your own words")
    wish.fill("a quiet film about the sea")
    wish.press("Enter")
    expect(page.get_by_role("status").filter(has_text="for a wish")).to_be_visible()
    assert endpoint.asked[-1].text == "a quiet film about the sea"
    assert endpoint.asked[-1].history is None
    visitor.settle()
    visitor.picture("wish")


def test_like_and_skip_change_the_next_list(visit: Visit, address: str, endpoint: LocalEndpoint):
    visitor = visit(address)
    page = visitor.load()
    user, served = endpoint.asked[-1].user_id, visitor.ids()
    page.get_by_role("button", name=re.compile("^Skip ")).nth(1).click()
    visitor.settle()
    expect(page.get_by_text("1 item skipped")).to_be_visible()
    assert endpoint.asked[-1].user_id == user
    assert visitor.ids()[:9] == [served[0], *served[2:]]
    assert page.evaluate("document.activeElement.dataset.act") == "skip"
    page.get_by_role("button", name=re.compile("^Like ")).first.click()
    notice = page.get_by_text(f"Goes on from the history of user {user}")
    expect(notice).to_be_visible()
    visitor.settle()
    asked = endpoint.asked[-1]
    assert asked.user_id is None
    assert asked.history is not None
    known, times = endpoint.services[endpoint.held[0]].users.find(str(user))
    catalogue = endpoint.services[endpoint.held[0]].catalogue
    assert [event.item_id for event in asked.history] == [*catalogue.decode(known), served[0]]
    assert [event.timestamp for event in asked.history] == [*times.tolist(), int(times[-1])]
    assert asked.filters.exclude_items == [served[1]]
    assert not {served[0], served[1]} & set(visitor.ids())
    visitor.picture("liked")
    page.get_by_role("button", name="Bring back").click()
    visitor.settle()
    assert endpoint.asked[-1].filters is None


def test_two_bundles_are_compared(
    visit: Visit, address: str, endpoint: LocalEndpoint, two_bundles: list[str]
):
    visitor = visit(address, viewport={"width": 1360, "height": 860})
    page = visitor.load()
    page.get_by_label("Compare with").select_option(two_bundles[1])
    second = page.get_by_role("region", name="List B")
    second.locator(".card").first.wait_for()
    first_request, second_request = sorted(endpoint.asked[-2:], key=lambda r: r.bundle or "")
    assert (first_request.bundle, second_request.bundle) == (None, two_bundles[1])
    assert first_request.model_dump(exclude={"bundle"}) == second_request.model_dump(
        exclude={"bundle"}
    )
    here, there = visitor.ids("A"), visitor.ids("B")
    assert here != there
    remarks = second.locator(".card .remarks").all_inner_texts()
    for place, (item, remark) in enumerate(zip(there, remarks, strict=True)):
        if item in here:
            assert remark == f"#{here.index(item) + 1} in A", place
    visitor.picture("compare")
    slide(page, "bm25", 0)
    assert visitor.ids("B") != there  # the sliders are for both
    page.get_by_label("Compare with").select_option("nothing")
    expect(second).to_be_hidden()


def test_a_degraded_answer_and_a_fallback_say_so(
    visit: Visit, address: str, endpoint: LocalEndpoint
):
    endpoint.down = {"embed", "rerank"}
    endpoint.next = "f" * 32
    visitor = visit(address, color_scheme="dark")
    page = visitor.load()
    badges = page.locator(".badges").first
    expect(badges).to_contain_text("degraded: without embed")
    expect(page.get_by_label("State of the endpoint")).to_contain_text("rerank is down")
    expect(page.get_by_label("State of the endpoint")).to_contain_text("loading ffffffffffff…")
    visitor.picture("degraded-dark")
    page.get_by_label("User id").fill("nobody")
    page.get_by_label("User id").press("Enter")
    expect(badges).to_contain_text("popular items: the bundle does not know this user")
