"""Which devices a replica may compute on."""

from __future__ import annotations

import os

import ray


def hide_unassigned_gpus() -> None:
    """In a replica without a GPU of its own, hide those of its machine, before CUDA looks for them.

    A model takes the GPU where it sees one, and since 2.60 Ray leaves all of them visible to actors
    that asked for none.
    """
    if not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None and not context.get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
