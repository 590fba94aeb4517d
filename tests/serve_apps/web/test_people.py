"""The page in headless Chromium: for whom it works, and what it says when something does not."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Page, expect

from serve_apps.api import Unavailable
from serve_apps.batching import Overloaded

if TYPE_CHECKING:
    from tests.serve_apps.web.conftest import LocalEndpoint, Visit

REFUSED = re.compile(r"Failed to load resource: the server responded with a status of \d+")
CONTRASTS = """() => {
  const rgba = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    return parts.length === 3 ? [...parts, 1] : parts;
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => {
      c /= 255;
      return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    if (element.closest(":disabled, noscript, option, script")) continue;
    const [a, b] = [rgba(getComputedStyle(element).color), behind(element)].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([contrast, element.className, walker.currentNode.data.trim().slice(0, 40)]);
  }
  for (const mark of document.querySelectorAll(".bar span, .swatch, .when span")) {
    const [a, b] = [mark, mark.parentElement].map(behind).map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([contrast * 1.5, mark.className, "a mark: 3 is enough"]);
  }
  return found;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, a, summary")]
  .filter((e) => e.checkVisibility() && !(e.getAttribute("aria-label") || e.labels?.length ||
    e.textContent.trim()))
  .map((e) => e.outerHTML)"""


def sideways(page: Page) -> list[str]:
    """What sticks out of the window."""
    return page.evaluate(
        "() => [...document.body.querySelectorAll('*')].filter(e => e.checkVisibility() &&"
        " !e.closest('.unseen, .skip, .modes input, .terms[open], #known ol') &&"
        " e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )


def test_a_key_is_asked_for_and_kept_in_the_tab(
    visit: Visit, keyed_address: str, endpoint: LocalEndpoint, key: str
):
    visitor = visit(keyed_address)
    page = visitor.page
    page.goto(visitor.address)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("The endpoint asks for a key.")
    assert endpoint.asked == []
    page.get_by_label("Key", exact=True).fill("wrong")
    page.get_by_label("Key", exact=True).press("Enter")
    expect(dialog).to_contain_text("The endpoint does not know this key.")
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use key").click()
    page.locator(".card").first.wait_for()
    expect(dialog).to_be_hidden()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_label("State of the endpoint")).to_contain_text("Waiting 3")
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.reload()
    page.locator(".card").first.wait_for()
    visitor.forgive(REFUSED)
    assert not any(key in request.url for request in visitor.requests)


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (Overloaded(), "No answer now: too many requests; try again in 1 s."),
        (Unavailable(), "No answer now: a stage is down; try again in 1 s."),
    ],
)
def test_an_endpoint_that_is_busy_says_so_in_one_sentence(
    visit: Visit, address: str, endpoint: LocalEndpoint, refusal: Exception, sentence: str
):
    visitor = visit(address)
    page = visitor.load()
    endpoint.refusal = refusal
    page.locator("#sample button").first.click()
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    visitor.settle()
    assert len(visitor.ids()) == 10  # the last list stays
    endpoint.refusal = None
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    visitor.forgive(REFUSED)


def test_a_mistake_is_named_and_silence_too(visit: Visit, address: str, endpoint: LocalEndpoint):
    visitor = visit(address)
    page = visitor.load()
    page.evaluate("document.getElementById('user-id').removeAttribute('maxlength')")
    page.get_by_label("User id").fill("u" * 257)
    page.get_by_label("User id").press("Enter")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("No answer: user_id: String should have at most 256 characters.")
    page.context.set_offline(True)
    page.locator("#sample button").first.click()
    expect(alert).to_contain_text("The endpoint cannot be reached.")
    page.context.set_offline(False)
    visitor.forgive(REFUSED, re.compile("net::ERR_INTERNET_DISCONNECTED"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colours(
    visit: Visit, address: str, endpoint: LocalEndpoint, scheme: str
):
    endpoint.down = {"rerank"}
    visitor = visit(address, color_scheme=scheme)
    page = visitor.load()
    page.locator(".terms summary").first.click()
    page.get_by_label("bm25", exact=True).fill("0")
    page.get_by_label("History or wish").check(force=True)
    visitor.settle()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 60
    assert [each for each in found if each[0] < 4.5] == []
    assert page.evaluate(NAMELESS) == []


def test_colours_follow_the_system_until_one_is_chosen(
    visit: Visit, address: str, endpoint: LocalEndpoint
):
    page = visit(address, color_scheme="dark").load()

    def brightness() -> float:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765

    assert brightness() < 0.2
    page.get_by_label("Colours").select_option("Light")
    assert brightness() > 0.9
    page.reload()
    assert brightness() > 0.9
    page.get_by_label("Colours").select_option("System")
    assert brightness() < 0.2
    page.emulate_media(color_scheme="light")
    assert brightness() > 0.9


@pytest.mark.parametrize("width", [320, 390, 768, 1024])
def test_nothing_sticks_out_of_a_narrow_screen(
    visit: Visit, address: str, endpoint: LocalEndpoint, two_bundles: list[str], width: int
):
    endpoint.down = {"embed", "rerank"}
    visitor = visit(address, viewport={"width": width, "height": 800})
    page = visitor.load()
    page.locator(".terms summary").first.click()
    page.get_by_label("Compare with").select_option(two_bundles[1])
    page.get_by_role("region", name="List B").locator(".card").first.wait_for()
    page.get_by_label("bm25", exact=True).fill("0")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert sideways(page) == []
    page.get_by_role("button", name=re.compile("^Like ")).first.click()
    page.get_by_role("combobox", name="Add a title to the history").fill("a")
    page.get_by_role("listbox", name="Titles found").get_by_role("option").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert sideways(page) == []


def test_on_a_telephone(visit: Visit, address: str, endpoint: LocalEndpoint):
    visitor = visit(address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = visitor.load()
    page.get_by_role("link", name="Skip to the list").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".card").first).to_be_in_viewport()
    visitor.picture("narrow")


def test_everything_can_be_done_with_the_keyboard(
    visit: Visit, address: str, endpoint: LocalEndpoint
):
    visitor = visit(address)
    page = visitor.load()
    keyboard = page.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(80):
            keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                break
        else:
            pytest.fail(f"{selector} cannot be reached")
        assert page.evaluate(
            "() => { const e = document.activeElement;"
            " const o = getComputedStyle(e.matches('.modes input') ? e.nextElementSibling : e);"
            " return o.outlineStyle !== 'none' && parseFloat(o.outlineWidth) >= 2; }"
        ), f"focus on {selector} cannot be seen"

    keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab_to("#sample li:first-child button")
    keyboard.press("Enter")
    expect(page.locator("#sample button").first).to_have_attribute("aria-pressed", "true")
    visitor.settle()
    served = visitor.ids()
    tab_to("[data-term=bm25] input")
    keyboard.press("Home")
    expect(page.locator("[data-term=bm25] output")).to_have_text("× 0.00")
    assert visitor.ids() != served
    tab_to(".terms summary")
    keyboard.press("Enter")
    expect(page.locator(".terms table").first).to_be_visible()
    tab_to("[data-act=like]")
    liked = visitor.ids()[0]
    keyboard.press("Enter")
    expect(page.locator("#history li").first).to_have_attribute("data-id", liked)
    visitor.settle()
    expect(page.locator(".card [data-act=like]").first).to_be_focused()
    page.locator("input[name=mode]:checked").focus()
    keyboard.press("ArrowLeft")
    expect(page.get_by_label("User id")).to_be_visible()


def test_a_title_is_text_whatever_it_holds(visit: Visit, address: str, endpoint: LocalEndpoint):
    visitor = visit(address)
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    item = {"item_id": "x", "title": evil, "score": 1.0, "terms": {"<i>ease</i>": 1.0}}
    answer = {"items": [item], "bundle": "b", "timings_ms": {"total": 1}, "degraded": []}
    visitor.page.route("**/v1/recommend", lambda route: route.fulfill(json={**answer}))
    page = visitor.load()
    expect(page.locator(".card h3")).to_have_text(evil)
    assert page.locator("main :is(h3, label) :is(img, b, i)").count() == 0
