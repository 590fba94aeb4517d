"""Reads a page, to say whether it is whole and stands alone."""

import re
from html.parser import HTMLParser

VOID = ("meta", "rect", "path", "circle", "polyline", "br", "link", "img")


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.hosts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.hosts += [v for k, v in attrs if k in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, _attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(text: str) -> Page:
    """A page without an open tag, a script or another host, for light and dark."""
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert page.hosts == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    return page
