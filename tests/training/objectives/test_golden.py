"""The first losses of every objective on a tiny random model, which change only where it is meant.

After a change that is, remove the curve from golden.json: the next run writes it anew.
"""

import dataclasses
import json
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
REVIEWS = ("love the book", "war and night", "in space")

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
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses: list[float] = []
    while len(losses) < 6:
        for batch in task.plan(2, np.random.default_rng([0, len(losses)])):
            step = len(losses)
            if step == 6:
                break
            if getattr(task, "refresh_every", 0) and step % task.refresh_every == 0:
                with torch.no_grad():
                    task.refresh(lambda f, b: f(model, b), step)
            loss = task.loss(model, task.batch(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    curves = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    name = "-".join(variant)
    if name not in curves:
        curves[name] = [round(loss, 5) for loss in losses]
        GOLDEN.write_text(json.dumps(curves, indent=1, sort_keys=True) + "\n")
        pytest.fail(f"the curve of {name} was missing and is written: look at it, and run again")
    assert losses == pytest.approx(curves[name], rel=1e-3, abs=1e-5)
