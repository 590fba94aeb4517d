"""What holds in every answer also holds in one that was made without a stage."""

import asyncio
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fusionrec.bundles.store import BundleStore
from fusionrec.data.catalogue import Catalogue
from fusionrec.data.releases import RELEASES, Releases
from fusionrec.fusion.diversity import DIVERSITY, Diversity, DiversityConfig, ItemCategories
from fusionrec.fusion.rules import RULES, RulesConfig
from fusionrec.serving.pipeline import Pipeline
from fusionrec.serving.service import Service
from tests.serve_apps.rig import Rig

DAY = 86_400
MAX_AGE, MAX_PER_CATEGORY, K = 60, 3, 5
GONE = RuntimeError("killed")


@pytest.fixture(scope="module")
def ruled(bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    """The bundle of all stages with every kind of rule; each day one item came out."""
    place = tmp_path_factory.mktemp("ruled") / "pipeline"
    shutil.copytree(bundles.current(), place, ignore=shutil.ignore_patterns("manifest.json"))
    catalogue = Catalogue.load(place / "catalogue.parquet")
    counts = np.load(place / "item_counts.npy")
    Releases(np.arange(len(catalogue)) * DAY, (len(catalogue) - 1) * DAY).save(place / RELEASES)
    rules = RulesConfig(
        allow=tuple(item for code, item in enumerate(catalogue.item_ids) if code % 7),
        deny=tuple(catalogue.item_ids[code] for code in np.argsort(-counts)[:5]),
        deny_categories=(catalogue.categories[0][0],),
        max_age_days=MAX_AGE,
    )
    (place / RULES).write_text(rules.model_dump_json())
    config = DiversityConfig(max_per_category=MAX_PER_CATEGORY)
    Diversity(config, ItemCategories.of(catalogue.categories), counts).save(place / DIVERSITY)
    store = BundleStore(tmp_path_factory.mktemp("ruled-bundles"))
    store.promote(store.add(place).id, "test")
    return store


@pytest.fixture(scope="module")
def pipeline(ruled: BundleStore) -> Pipeline:
    return Pipeline.load(ruled.current())


@pytest.fixture(scope="module")
def service(ruled: BundleStore) -> Service:
    return Service.load(ruled.current())


@pytest.fixture(scope="module")
def permitted(ruled: BundleStore, service: Service) -> set[str]:
    rules = RulesConfig.model_validate_json((ruled.current() / RULES).read_bytes())
    newest = len(service.catalogue) - 1
    return {
        item
        for code, item in enumerate(service.catalogue.item_ids)
        if item in rules.allow
        and item not in rules.deny
        and not set(rules.deny_categories) & set(service.catalogue.categories[code])
        and newest - code <= MAX_AGE
    }


def seen(service: Service, body: dict[str, Any]) -> set[str]:
    """What the request says of items that it does not want again."""
    known = service.users.find(body.get("user_id", "")) or ((), ())
    excluded = body.get("filters", {}).get("exclude_items", [])
    codes = {service.catalogue.item_ids[code] for code in known[0]}
    return codes | {*body.get("history", []), *excluded}


@pytest.mark.parametrize("embed_in_retriever", [False, True])
@pytest.mark.parametrize("gone", [(), ("embed",), ("rerank",), ("embed", "rerank")])
def test_rules_hold_and_nothing_comes_again(
    ruled: BundleStore,
    pipeline: Pipeline,
    service: Service,
    permitted: set[str],
    gone: tuple[str, ...],
    embed_in_retriever: bool,
):
    rig = Rig(
        ruled,
        pipeline=pipeline,
        embed_in_retriever=embed_in_retriever,
        stage_timeout_s=60,
        timeout_s=60,
    )
    if "embed" in gone:
        rig.embedder.failure, rig.embeds = GONE, False
    if "rerank" in gone:
        rig.reranker.failure = GONE
    liked = sorted(permitted)
    bodies: list[dict[str, Any]] = [{"user_id": user} for user in list(service.users.rows)[:8]]
    bodies += [
        {"user_id": "nobody"},
        {"history": liked[:4]},
        {"text": "a film of love and war"},
        {"history": liked[4:8], "filters": {"exclude_items": liked[8:10]}},
    ]

    async def main() -> list[dict[str, Any]]:
        return await asyncio.gather(*(rig.recommend(**body, k=K, explain=True) for body in bodies))

    answers = asyncio.run(main())
    assert {stage for answer in answers for stage in answer["degraded"]} == set(gone)
    for body, answer in zip(bodies, answers, strict=True):
        items = [item["item_id"] for item in answer["items"]]
        assert len(set(items)) == K
        assert set(items) <= permitted - seen(service, body)
        categories = Counter(name for item in answer["items"] for name in item["categories"])
        assert max(categories.values()) <= MAX_PER_CATEGORY
