"""A fusion campaign on a Ray of two nodes with a CPU each; see ``test_two_nodes.py``.

Run as a module, in a process of its own: the tests' session has one Ray, and this needs another.
"""

import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from tuning import fusion
from tuning.fusion import FusionCampaign, FusionTrial, campaign

pipeline, dataset, out, notes = map(Path, sys.argv[1:])


class Noted(FusionTrial):
    """Notes on which node its batches are evaluated; the first waits for one on the other node.

    Of so few cases, all batches are evaluated before the second actor has started.
    """

    def step(self):
        with (notes / ray.get_runtime_context().get_node_id()).open("a") as file:
            file.write(f"{len(self._batch)}\n")
        deadline = time.monotonic() + 200
        while len(list(notes.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().step()


store = {"object_store_memory": 128 * 1024 * 1024}
cluster = Cluster(
    initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store}
)
try:
    cluster.add_node(num_cpus=1, **store)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    fusion.FusionTrial = Noted
    campaign(FusionCampaign(pipeline=pipeline, dataset=dataset, out=out, trials=200))
    ray.shutdown()
finally:
    cluster.shutdown()
