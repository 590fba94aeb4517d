"""A pipeline directory of quick sources on the small synthetic data set."""

import pytest

from jobs.fit import FitConfig, fit


@pytest.fixture(scope="session")
def fitted(synthetic, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fitted") / "pipeline"
    sources = ("popularity", "item-knn", "transitions", "bm25")
    fit(FitConfig(dataset=synthetic.directory, pipeline=directory, sources=sources, candidates=30))
    return directory
