"""MovieLens as GroupLens ships it: latest, 20M–32M (CSV), 1M, 10M (``::``), 100K (``u.data``).

Where ``tmdb_movies.csv`` lies beside ``links.csv``, overview, tagline and keywords of a film become
its text. ``tags.csv`` is left out: tags are what users did at some time, so as a property of a film
they would tell a model about events that it is asked to predict.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import pyarrow as pa

from fusionrec.data.readers import delimited, text
from fusionrec.data.readers.mapping import require
from fusionrec.data.readers.protocol import WRONG_FIELDS, Options, Refused, Rows
from fusionrec.errors import DataError

# fmt: off
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
# fmt: on
RATING = ("user_id", "item_id", "value", "timestamp")
_YEAR = re.compile(r"\((\d{4})\)\s*$")
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class MovieLensReader:
    """Ratings and films of one of the three layouts."""

    format: ClassVar[str] = "movielens"
    folder: Path
    layout: str
    batch_bytes: int
    has_timestamps: bool = True
    timestamp_unit: str = "s"
    values_may_miss: bool = False

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the ratings of a layout are there, with the films that belong to them."""
        pairs = (("ratings.csv", "movies.csv"), ("ratings.dat", "movies.dat"), ("u.data", "u.item"))
        return any((folder / a).is_file() and (folder / b).is_file() for a, b in pairs)

    @classmethod
    def open(cls, folder: Path, options: Options) -> Self:
        """Find the layout and check the columns."""
        layouts = {"ratings.csv": "csv", "ratings.dat": "::", "u.data": "100k"}
        there = [layout for name, layout in layouts.items() if (folder / name).is_file()]
        if not there:
            raise DataError(
                f"{folder} is not MovieLens: it has none of {', '.join(layouts)}; "
                "give the folder that holds one of them"
            )
        if there[0] == "csv":
            path = folder / "ratings.csv"
            require(path, delimited.header(path), ("userId", "movieId", "rating", "timestamp"))
        return cls(folder, there[0], options.batch_bytes)

    def interactions(self) -> Iterator[Rows]:
        """The ratings."""
        if self.layout == "csv":
            batches = delimited.read(self.folder / "ratings.csv", batch_bytes=self.batch_bytes)
            names = {"userId": "user_id", "movieId": "item_id", "rating": "value"}
        elif self.layout == "100k":
            batches, names = self._tabs("u.data", RATING, "\t"), {}
        else:
            batches, names = _double_colons(self.folder / "ratings.dat", RATING), {}
        for rows in batches:
            columns = {names.get(n, n): rows.table.column(n) for n in rows.table.column_names}
            columns = {name: columns[name] for name in RATING}
            columns["event"] = _repeat("rating", rows)
            columns["domain"] = _repeat("films", rows)
            yield rows.with_table(pa.table(columns))

    def items(self) -> Iterator[Rows] | None:
        """The films; all of them, rated or not."""
        name = {"csv": "movies.csv", "::": "movies.dat", "100k": "u.item"}[self.layout]
        if not (self.folder / name).is_file():
            return None
        return self._films() if self.layout == "csv" else self._old_films(name)

    def _films(self) -> Iterator[Rows]:
        path = self.folder / "movies.csv"
        require(path, delimited.header(path), ("movieId", "title", "genres"))
        texts: dict[str, str] = {}
        if (self.folder / "links.csv").is_file() and (self.folder / "tmdb_movies.csv").is_file():
            texts = yield from self._tmdb()
        for rows in delimited.read(path, batch_bytes=self.batch_bytes):
            ids = rows.table.column("movieId")
            titles, genres = rows.table.column("title"), rows.table.column("genres").to_pylist()
            categories = [[g for g in row.split("|") if g and g[0] != "("] for row in genres]
            yield _items(rows, ids, titles, categories, [texts.get(i, "") for i in ids.to_pylist()])

    def _tmdb(self) -> Generator[Rows, None, dict[str, str]]:
        """Film id → text; yields only what had to be refused of the two files."""
        links, films = self.folder / "links.csv", self.folder / "tmdb_movies.csv"
        require(links, delimited.header(links), ("movieId", "tmdbId"))
        require(films, delimited.header(films), ("id", "overview", "tagline", "keywords"))
        text_of: dict[str, str] = {}
        for rows in delimited.read(films, columns=["id", "overview", "tagline", "keywords"]):
            yield rows.with_table(rows.table.slice(0, 0))
            for film in rows.table.to_pylist():
                parts = (film["overview"], film["tagline"], _names(film["keywords"]))
                text_of[film["id"]] = " ".join(part.strip() for part in parts if part.strip())
        texts: dict[str, str] = {}
        for rows in delimited.read(links, columns=["movieId", "tmdbId"]):
            yield rows.with_table(rows.table.slice(0, 0))
            pairs = zip(*(rows.table.column(i).to_pylist() for i in (0, 1)), strict=True)
            texts |= {movie: text_of[tmdb] for movie, tmdb in pairs if tmdb in text_of}
        return texts

    def _old_films(self, name: str) -> Iterator[Rows]:
        path = self.folder / name
        split: Callable[[dict[str, str]], list[str]]
        if self.layout == "100k":
            genres = self._genres()
            plain = ("item_id", "title", "released", "video", "url")
            batches = self._tabs(name, (*plain, *genres), "|")

            def split(film: dict[str, str]) -> list[str]:
                return [g for g in genres if film[g] == "1" and g != "unknown"]
        else:
            batches = _double_colons(path, ("item_id", "title", "genres"))

            def split(film: dict[str, str]) -> list[str]:
                return [g for g in film["genres"].split("|") if g and g[0] != "("]

        for rows in batches:
            films = rows.table.to_pylist()
            ids, titles = rows.table.column("item_id"), rows.table.column("title")
            yield _items(rows, ids, titles, [split(film) for film in films], [""] * len(films))

    def _genres(self) -> tuple[str, ...]:
        path = self.folder / "u.genre"
        if not path.is_file():
            return GENRES_100K
        return tuple(line.split("|")[0] for _, line, _ in text.lines(path))

    def _tabs(self, name: str, names: tuple[str, ...], delimiter: str) -> Iterator[Rows]:
        path = self.folder / name
        return delimited.read(
            path,
            names=names,
            delimiter=delimiter,
            quoted=False,
            encoding=_encoding(path),
            batch_bytes=self.batch_bytes,
        )


def _items(
    rows: Rows,
    ids: pa.ChunkedArray,
    titles: pa.ChunkedArray,
    categories: list[list[str]],
    texts: list[str],
) -> Rows:
    years = [_YEAR.search(title) for title in titles.to_pylist()]
    columns = {
        "item_id": ids,
        "title": titles,
        "text": pa.array(texts, pa.string()),
        "categories": pa.array(categories, pa.list_(pa.string())),
        "domain": _repeat("films", rows),
        "year": pa.array([int(year[1]) if year else None for year in years], pa.int32()),
    }
    # Rows without films carry only what was refused of a file.
    return rows.with_table(pa.table(columns))


def _repeat(value: str, rows: Rows) -> pa.Array:
    return pa.repeat(pa.scalar(value), rows.table.num_rows)


def _names(keywords: str) -> str:
    """The names in TMDB's JSON list of keywords."""
    try:
        return ", ".join(keyword["name"] for keyword in json.loads(keywords or "[]"))
    except (ValueError, TypeError, KeyError):
        return ""


def _encoding(path: Path) -> str:
    """UTF-8, or Latin-1 for the old files whose titles are not UTF-8; ratings are ASCII."""
    if path.suffix == ".data" or path.name == "ratings.dat":
        return "utf-8"
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _double_colons(path: Path, names: tuple[str, ...]) -> Iterator[Rows]:
    """Rows of a file whose fields are separated by two colons."""
    lines: list[int] = []
    fields: list[list[str]] = []
    refused: list[Refused] = []
    progress = 0.0

    def batch() -> Rows:
        columns = list(zip(*fields, strict=True)) if fields else [()] * len(names)
        table = pa.table({n: pa.array(c, pa.string()) for n, c in zip(names, columns, strict=True)})
        return Rows(path.name, np.array(lines, dtype=np.int64), table, refused, progress)

    for number, line, share in text.lines(path, _encoding(path)):
        progress = share
        row = line.split("::")
        if len(row) == len(names):
            lines.append(number)
            fields.append(row)
        else:
            refused.append(Refused(number, WRONG_FIELDS, line))
        if len(lines) == _BATCH_ROWS:
            yield batch()
            lines, fields, refused = [], [], []
    yield batch()
