"""Which replica of a stage gets the next call: the one with least to do.

Serve's own router takes one of those with the shortest queue at random, and calls that are sent in
the same turn of the event loop all see the queues as they were before: of two batches for two idle
replicas, both went to the same one half of the time, and the other one did nothing.

A call that failed goes to a replica that did not fail it: one that fails at once, for lack of a
bundle, say, has the shortest queue of all, and would get it again.

A batch that is alone goes to the replica that had the last one, whose weights are still in the
processor's caches: a single request is answered sooner than where the replicas take turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial

from ray.serve._private.common import ReplicaID, RequestMetadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve._private.request_router.replica_wrapper import RunningReplica

from serve_apps.delivery import Delivery

_SENDING_S = 0.01
"""Between the choice of a replica and its queue's being counted as longer; a turn or two of the
loop, and then for a moment the call counts twice."""
_CONSIDERED = 2
"""Replicas that may have to be asked how long their queue is, where that is not known."""


class LeastLoadedRouter(PowerOfTwoChoicesRequestRouter):
    """The shortest queue; of those, the one chosen longest ago, or last where a batch is alone."""

    def initialize_state(self, **_: object) -> None:
        """Called by Serve, once."""
        self._turn = 0
        self._chosen: dict[ReplicaID, int] = {}
        self._sending: Counter[ReplicaID] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: Sequence[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The candidates for one call, best first, each in case the one before is full."""
        near = self.apply_locality_routing(pending_request=pending_request)
        replicas = {r.replica_id: r for r in candidate_replicas if r.replica_id in near}
        delivery = _delivery(pending_request)
        untried = [r for r in replicas if r.unique_id not in delivery.tried]
        load = partial(self._load, lone=delivery.lone)
        best = sorted(untried or replicas, key=load)[:_CONSIDERED]
        if not best:
            return []
        self._turn += 1
        self._chosen = {r: turn for r, turn in self._chosen.items() if r in self._replica_id_set}
        self._chosen[best[0]] = self._turn
        self._sending[best[0]] += 1
        asyncio.get_running_loop().call_later(_SENDING_S, self._sent, best[0])
        return [[replicas[replica]] for replica in best]

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: RequestMetadata | None = None
    ) -> None:
        """Give a replica the oldest call that it has not failed.

        Serve gives it the oldest one, whichever call it was chosen for. (Ids do not tell calls
        apart: those of a gateway have that of the request in whose context they are made.)
        """
        waiting = self._pending_requests_to_fulfill
        for index, pending in enumerate(waiting):
            if not pending.future.done() and self._may_have(replica.replica_id, pending):
                del waiting[index]
                waiting.appendleft(pending)
                _delivery(pending).chosen = replica.replica_id.unique_id
                super()._fulfill_next_pending_request(replica, request_metadata)
                return

    def _may_have(self, replica: ReplicaID, pending: PendingRequest) -> bool:
        tried = _delivery(pending).tried
        return replica.unique_id not in tried or all(
            other.unique_id in tried for other in self._replica_id_set
        )

    def _sent(self, replica: ReplicaID) -> None:
        self._sending[replica] -= 1
        self._sending += Counter()  # keeps what is positive

    def _load(self, replica: ReplicaID, *, lone: bool) -> tuple[int, int]:
        queue = self.replica_queue_len_cache.get(replica) or 0
        turn = self._chosen.get(replica, 0)
        return queue + self._sending[replica], -turn if lone else turn


def _delivery(pending: PendingRequest | None) -> Delivery:
    found = None if pending is None else pending.kwargs.get("delivery")
    return found if isinstance(found, Delivery) else Delivery()
