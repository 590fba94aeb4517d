"""How many replicas a stage needs: Serve asks for each deployment whose YAML names the policy.

The unit of a stage is a batch, and a gateway sends only as many as there are replicas of the widest
stage, and some ahead. So the calls of a stage never pile up, and its queue does not tell how much
more it could do: the share of time in which its replicas have a call does. The slow stage of a busy
endpoint always has one, the others wait for it.
"""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

Decision = tuple[int, dict[str, Any]]


def follow_load(context: AutoscalingContext) -> Decision:
    """One replica more where the stage is busier than wanted, one less where it still would not be.

    The wanted calls of a replica, ``target_ongoing_requests``, are below 1: the share of time in
    which it works. Another replica lets every gateway send another batch, so that what was measured
    with n replicas says little about more than n + 1: it goes up and down by one, each time after
    the delays of the YAML, which Serve keeps, as it does the bounds.

    Returns:
        Replicas, and the state that Serve keeps for the next call.
    """
    replicas = context.target_num_replicas
    wanted = context.config.get_target_ongoing_requests()  # type: ignore[union-attr]
    calls = context.total_num_requests
    if calls > wanted * replicas:
        # One that is still starting has taken nothing from the others.
        replicas += context.current_num_replicas >= replicas
    elif calls < _SLACK * wanted * (replicas - 1):
        replicas -= 1
    return replicas, {}


_SLACK = 0.8
"""Of what the replicas that are left could do: else one would go and come again."""
