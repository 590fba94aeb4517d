"""What the page is made of, without a browser."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest

import serve_apps.web
from fusionrec.serving.schemas import Fallback
from serve_apps.api import build_api
from serve_apps.security import Door

FOLDER = Path(serve_apps.web.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".js", ".css", ".svg"))


def get(path: str, **headers: str) -> httpx.Response:
    api = build_api(None, Door())  # type: ignore[arg-type]

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/static/app.js", "text/javascript; charset=utf-8"),
        ("/static/style.css", "text/css; charset=utf-8"),
        ("/static/icon.svg", "image/svg+xml"),
    ],
)
def test_a_file_and_whether_a_browser_has_it_already(path: str, kind: str):
    answer = get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == kind
    assert answer.headers["cache-control"] == "no-cache"
    assert "'unsafe" not in answer.headers["content-security-policy"]
    tag = answer.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = get(path, **{"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert get(path, **{"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", ["nothing.js", "__init__.py", "..%2fapi.py", "index.html", ""])
def test_nothing_else_is_served(name: str):
    assert get(f"/static/{name}").status_code == 404


def test_every_file_that_is_named_is_there():
    named = set(re.findall(r'"static/([\w.]+)"', (FOLDER / "index.html").read_text()))
    for path in FILES:
        if path.suffix == ".js":
            named |= set(re.findall(r'from "\./([\w.]+)"', path.read_text()))
    assert named == {path.name for path in FILES}


def test_no_script_stands_in_the_page_and_no_host_is_named():
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", page) == []
    for path in [*FILES, FOLDER / "index.html"]:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not a place
        assert "//" not in re.sub(r"(^|\s)// .*", "", text), path
        assert "innerHTML" not in text


def test_every_element_that_the_scripts_look_for_is_in_the_page():
    page = (FOLDER / "index.html").read_text()
    ids = set(re.findall(r'\bid="([\w-]+)"', page))
    for path in FILES:
        assert set(re.findall(r'\$\("([\w-]+)"\)', path.read_text())) <= ids, path
    assert (
        set(re.findall(r'(?:for|aria-(?:labelledby|describedby|controls))="([^"]+)"', page)) <= ids
    )


def test_the_document_shows_the_pictures_that_are_taken():
    docs = Path(__file__).resolve().parents[3] / "docs"
    shown = set(re.findall(r"\(images/([\w-]+)\.png\)", (docs / "endpoint.md").read_text()))
    here = Path(__file__).parent
    tests = "".join((here / name).read_text() for name in ("test_page.py", "test_people.py"))
    assert shown == set(re.findall(r'\.picture\("([\w-]+)"\)', tests))
    assert shown == {path.stem for path in (docs / "images").iterdir()}
    assert max(path.stat().st_size for path in (docs / "images").iterdir()) < 200_000


def test_every_fallback_has_words():
    text = (FOLDER / "column.js").read_text()
    assert set(re.findall(r'^  (\w+): "popular items', text, flags=re.MULTILINE)) == set(Fallback)
