"""The first losses of every objective on a tiny random model, which change only where it is meant.

A curve is the losses of six steps, and at last that of the first batch again.

After a change that is, remove the curve from golden.json: the next run writes it anew.
"""

import dataclasses
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionrec.training.objectives.settings import given
from fusionrec.training.tasks import OBJECTIVES

GOLDEN = Path(__file__).with_name("golden.json")
TEACHER = np.tile(np.array([2.0, 0.0, -2.0], np.float32), (8, 1))
RATINGS = np.array([1, 2, 3, 4, 5, 4, 3, 2], np.float32)
READ = np.arange(16, dtype=np.int32).reshape(8, 2, 1) % 4 - 1
REVIEWS = (
    "love the book of the night , and the music in the film",
    "war and night and war , a film of war ! no music",
    "in space : space , space and space",
)
SAME = {("encoder-in-batch", "encoder-gradcache")}
"""Two ways to one curve."""

VARIANTS: dict[tuple[str, str], dict] = {
    ("encoder", "in-batch"): {},
    ("encoder", "popularity"): {"popularity_correction": True},
    ("encoder", "gradcache"): {"grad_cache": 1},
    ("encoder", "matryoshka"): {"dimensions": [8, 16]},
    ("encoder", "towers"): {"towers": 2},
    ("encoder", "mined"): {"mined_negatives": 2, "mine_every": 2},
    ("reranker", "listwise"): {"ranking_loss": "listwise"},
    ("reranker", "pairwise"): {"ranking_loss": "pairwise"},
    ("reranker", "pointwise"): {"ranking_loss": "pointwise"},
    ("decoder", "letters"): {"prompt": "letters"},
    ("decoder", "yes-no"): {"prompt": "yes-no"},
    ("pretraining", "masked"): {"max_tokens": 12},
    ("pretraining", "next-sentence"): {"max_tokens": 24, "next_sentence": True},
    ("pretraining", "causal"): {"max_tokens": 8},
    ("pretraining", "reviews"): {"max_tokens": 12},
    ("rating", "regression"): {},
    ("rating", "reviews"): {"num_reviews": 1},
    ("distillation", "margin-mse"): {"distillation_loss": "margin-mse"},
    ("distillation", "kl"): {"distillation_loss": "kl", "student": "encoder"},
    ("multi-task", "weighted"): {"objective_weights": [1.0, 0.5], "max_tokens": 12},
    ("multi-task", "uncertainty"): {"objectives": ["encoder", "reranker", "rating"]},
    ("multi-task", "decoder"): {"objectives": ["decoder", "pretraining"], "max_tokens": 24},
    ("multi-task", "mined"): {
        "objectives": ["encoder", "distillation"],
        "dimensions": [8],
        "mined_negatives": 2,
        "mine_every": 2,
    },
}


def louder(model: torch.nn.Module) -> None:
    """Scale the layers' weights: fresh ones are so small that all texts have nearly one vector."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embeddings" not in name:
                parameter.mul_(8)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_curve(variant, still_encoder, tiny_decoder, catalogue, examples):
    settings = VARIANTS[variant]
    decodes = variant[0] == "decoder" or variant[1] in ("causal", "decoder")
    objective = OBJECTIVES[variant[0]]
    taught = dataclasses.replace(
        examples, scores=TEACHER, ratings=RATINGS, expected=np.full(8, 3.0, np.float32)
    )
    if variant[1] == "reviews":
        taught = dataclasses.replace(taught, reviews=READ, review_texts=REVIEWS)
    chosen = objective.settings.model_validate(
        {"encoder": str(tiny_decoder if decodes else still_encoder), "max_tokens": 48} | settings
    )
    read = variant in (("pretraining", "reviews"), ("multi-task", "decoder"))
    reviews = REVIEWS if read else ()
    task = objective.task(chosen, catalogue, **given(chosen.needs, taught, reviews))
    torch.manual_seed(0)
    model = task.build_model().train()
    if not decodes:
        louder(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses: list[float] = []
    first = None
    while len(losses) < 6:
        for batch in task.plan(2, np.random.default_rng([0, len(losses)])):
            step = len(losses)
            if step == 6:
                break
            if getattr(task, "refresh_every", 0) and step % task.refresh_every == 0:
                with torch.no_grad():
                    task.refresh(lambda f, b: f(model, b), step)
            tensors = task.batch(batch)
            first = first or tensors
            loss = task.loss(model, tensors)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    losses.append(task.loss(model, first).item())
    curves = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    name = "-".join(variant)
    if name not in curves:
        curves[name] = [round(loss, 5) for loss in losses]
        GOLDEN.write_text(json.dumps(curves, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"the curve of {name} was missing and is written: look at it, and run again")
    assert losses == pytest.approx(curves[name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_six_steps_move_the_first_loss_by_more_than_the_tolerance(variant):
    """Or the curve could not tell a loss without a gradient from one with it."""
    curve = json.loads(GOLDEN.read_text())["-".join(variant)]
    assert abs(curve[-1] - curve[0]) > 0.01 * curve[0]


@pytest.mark.parametrize("objective", sorted({objective for objective, _ in VARIANTS}))
def test_variants_of_an_objective_differ(objective):
    """Or an option that is not read would go unseen."""
    curves = json.loads(GOLDEN.read_text())
    assert set(curves) == {"-".join(variant) for variant in VARIANTS}
    names = ["-".join(variant) for variant in VARIANTS if variant[0] == objective]
    for pair in combinations(names, 2):
        one, other = (np.array(curves[name]) for name in pair)
        if pair in SAME:
            np.testing.assert_allclose(one, other, rtol=1e-3)
        else:
            apart = np.abs(one - other) / np.maximum(np.minimum(one, other), 1e-2)
            assert apart.max() > 0.01, pair
