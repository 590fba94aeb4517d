import pytest

from fusionrec.errors import DataError

RATINGS = "userId,movieId,rating,timestamp\n7,10,4.5,964982703\n8,11,0.5,964982704\n"
MOVIES = (
    "movieId,title,genres\n"
    '10,"American President, The (1995)",Comedy|Drama\n'
    "11,Solaris (1972),(no genres listed)\n"
    "12,Untitled,Drama\n"
)
LINKS = "movieId,imdbId,tmdbId\n10,1,900\n11,2,\n12,3,901\n"
TMDB = (
    "id,keywords,overview,tagline,title\n"
    '900,"[{""id"": 1, ""name"": ""white house""}, {""id"": 2, ""name"": ""love""}]",'
    '"He said ""yes"",\nand she too.",Why not?,The American President\n'
    "901,[],,,Untitled\n"
)


def test_latest(raw, ingested):
    folder = raw({"ratings.csv": RATINGS, "movies.csv": MOVIES, "tags.csv": "userId,tag\n1,dull\n"})
    data = ingested(folder)
    assert data.info.format == "movielens"
    assert data.interactions().to_pylist() == [
        {
            "user_id": "7",
            "item_id": "10",
            "timestamp": 964982703,
            "event": "rating",
            "value": 4.5,
            "text": None,
            "domain": "films",
        },
        {
            "user_id": "8",
            "item_id": "11",
            "timestamp": 964982704,
            "event": "rating",
            "value": 0.5,
            "text": None,
            "domain": "films",
        },
    ]
    assert data.items.column_names == ["item_id", "title", "text", "categories", "domain", "year"]
    assert data.items.column("year").to_pylist() == [1995, 1972, None]
    assert data.catalogue.item_ids == ("10", "11", "12")
    assert data.catalogue.titles[0] == "American President, The (1995)"
    assert data.catalogue.categories == (("Comedy", "Drama"), (), ("Drama",))
    assert data.catalogue.texts == ("", "", "")


def test_latest_with_tmdb(raw, ingested):
    files = {"ratings.csv": RATINGS, "movies.csv": MOVIES}
    data = ingested(raw(files | {"links.csv": LINKS, "tmdb_movies.csv": TMDB}))
    assert data.catalogue.texts == (
        'He said "yes",\nand she too. Why not? white house, love',
        "",
        "",
    )
    assert "dull" not in "".join(data.catalogue.texts)


def test_tmdb_without_a_column(raw, ingested):
    files = {"ratings.csv": RATINGS, "movies.csv": MOVIES, "links.csv": LINKS}
    with pytest.raises(DataError, match=r"tmdb_movies.csv has no column 'overview'.*are id, title"):
        ingested(raw(files | {"tmdb_movies.csv": "id,title\n1,x\n"}))


def test_ratings_without_a_column(raw, ingested):
    folder = raw({"ratings.csv": "user,movieId,rating,timestamp\n1,1,1,1\n", "movies.csv": MOVIES})
    with pytest.raises(DataError, match=r"ratings.csv has no column 'userId'.* user, movieId"):
        ingested(folder)


def test_100k(raw, ingested):
    flags = ["0"] * 19
    flags[1] = flags[18] = "1"
    film = ["5", "Été (1994)", "01-Jan-1995", "", "http://x/?a|b".replace("|", "%7C"), *flags]
    folder = raw(
        {
            "u.data": "1\t5\t3\t881250949\n2\t5\t4\t881250950\n",
            "u.item": "|".join(film).encode("latin-1") + b"\n",
        }
    )
    data = ingested(folder)
    assert data.info.num_interactions == 2
    assert data.info.num_quarantined == 0
    assert data.catalogue.titles == ("Été (1994)",)
    assert data.catalogue.categories == (("Action", "Western"),)
    assert data.items.column("year").to_pylist() == [1994]


def test_1m(raw, ingested):
    folder = raw(
        {
            "ratings.dat": "1::3::5::978300760\n1::4::3::978300761\n1:4:3:9\n",
            "movies.dat": "3::Alien: Été (1979)::Horror|Sci-Fi\n4::B::Drama\n".encode("latin-1"),
        }
    )
    data = ingested(folder)
    assert data.info.num_interactions == 2
    assert data.catalogue.titles == ("Alien: Été (1979)", "B")
    assert data.catalogue.categories[0] == ("Horror", "Sci-Fi")
    (refused,) = data_quarantine(data)
    assert refused == ("ratings.dat:3", "wrong number of fields", "1:4:3:9")


def data_quarantine(data):
    import pyarrow.parquet as pq

    rows = pq.read_table(data.directory / "quarantine.parquet").to_pylist()
    return [tuple(row.values()) for row in rows]


def test_real(shared_data, ingested):
    data = ingested(shared_data / "ml-latest-small", max_bad_fraction=0.0)
    assert (data.info.num_users, data.info.num_items) == (610, 9_742)
    assert data.info.num_interactions == 100_836
    assert len(set(data.events.items.tolist())) == 9_724
    assert sum(map(bool, data.catalogue.texts)) == 2_586
    assert data.info.name == "ml-latest-small"
