"""One worker of the engine's tests: runs the scenarios of a JSON file one after another.

    python rank.py SCENARIOS.json      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

A process serves many scenarios: importing and starting DeepSpeed costs more than training here.
"""

import dataclasses
import json
import os
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoModelForCausalLM

from fusionrec.errors import FusionRecError
from fusionrec.training import checkpoints, weights
from fusionrec.training.checkpoints import sha256_of
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import train
from fusionrec.training.process import prepare_process
from fusionrec.training.task import shuffled
from fusionrec.training.tasks import load_task
from fusionrec.training.weights import build_engine

BUILT: list[int] = []
"""Elements of the weights that this worker held when it had loaded a model."""


@dataclasses.dataclass(frozen=True)
class Toy:
    """Pull the beginning of a small BERT's first vector towards a fixed random direction."""

    model: str
    num_examples: int = 24
    bad_example: int | None = None
    fault: str = "loss"  # of the bad example: its loss is NaN, its gradient is, or it jumps
    tokens: int = 7
    dropout: bool = True
    decoder: bool = False  # guess each token of a text instead

    name = "toy"
    head = ()

    @property
    def identity(self):
        return {"model": self.model, "num_examples": self.num_examples}

    def build_model(self):
        if self.decoder:
            return AutoModelForCausalLM.from_pretrained(self.model)
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        changed = {} if self.dropout else off
        model = AutoModel.from_pretrained(self.model, add_pooling_layer=False, **changed)
        BUILT.append(sum(parameter.numel() for parameter in model.parameters()))
        return model

    def plan(self, batch_size, generator):
        return shuffled(self.num_examples, batch_size, generator)

    def batch(self, examples):
        draw = [np.random.default_rng(int(e)).integers(5, 60, self.tokens) for e in examples]
        target = np.tile(np.random.default_rng(0).normal(size=32), (len(examples), 1))
        bad = examples == self.bad_example
        if self.fault != "gradient":
            target[bad] = np.nan if self.fault == "loss" else 1e3
        return {
            "input_ids": torch.from_numpy(np.stack(draw)),
            "target": torch.from_numpy(target.astype(np.float32)),
            "root": torch.tensor(bad.any() and self.fault == "gradient"),
        }

    def loss(self, model, batch):
        if self.decoder:
            logits = model(input_ids=batch["input_ids"]).logits.float()
            return cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        # Twice through the model, as the encoder's task does.
        first = model(input_ids=batch["input_ids"]).last_hidden_state[:, 0]
        second = model(input_ids=batch["input_ids"][:, :4]).last_hidden_state[:, 0]
        loss = ((first[:, :32] - batch["target"]) ** 2).mean()
        if batch["root"]:  # the root of zero: finite, but its derivative is not
            loss = loss + (0.0 * second.sum()).sqrt()
        return loss + ((second - 0.5) ** 2).mean()

    def describe(self, examples):
        return [{"example": int(e)} for e in examples]

    def save(self, model, directory):
        model.save_pretrained(directory)


def damage(file: Path, fault: str) -> None:
    """Change one bit of a file, shorten it, or remove it."""
    content = bytearray(file.read_bytes())
    if fault == "flipped":
        content[-1] ^= 1
        file.write_bytes(content)
    elif fault == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()


def broken_disk(checkpoint, path):
    if checkpoint in str(path) and dist.get_rank() == 1:
        raise OSError("Input/output error")
    return sha256_of(path)


works_in_place = TrainingConfig.works_in_place


def shares_weights(engine) -> bool:
    """Whether the optimizer updates the very weights that the model computes with."""
    masters = getattr(engine.optimizer, "single_partition_of_fp32_groups", ())
    held = {master.untyped_storage().data_ptr() for master in masters}
    trained = (each for each in engine.module.parameters() if each.requires_grad)
    return all(weight.untyped_storage().data_ptr() in held for weight in trained)


def run(scenario: dict) -> dict:
    folder = scenario["task"].get("folder")
    task = load_task(Path(folder)) if folder else Toy(**scenario["task"])
    config = TrainingConfig(**scenario["config"])
    directory = Path(scenario["directory"])
    losses, engines, shares = [], [], []
    BUILT.clear()

    def build(*args, **kwargs):
        engines.append(build_engine(*args, **kwargs))
        return engines[0]

    def on_report(report):
        losses.append(report.loss)
        shares.append(shares_weights(engines[0]))
        if report.step == scenario.get("kill_at") and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if report.step == scenario.get("terminate_at") and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if report.step == scenario.get("fill_disk_at") and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        if report.step == scenario.get("leave_at"):
            raise InterruptedError

    def noticed():
        return len(losses) == scenario.get("noticed_at")

    weights.build_engine = build
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if scenario.get("copies"):
        TrainingConfig.works_in_place = lambda *_, **__: False
    if "break_disk_at" in scenario:
        checkpoints.sha256_of = partial(broken_disk, scenario["break_disk_at"])
    try:
        result = train(task, config, directory, on_report=on_report, noticed=noticed)
        found = {"result": result.model_dump(mode="json")}
    except (FusionRecError, InterruptedError) as error:
        found = {"error": type(error).__name__, "message": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpoints.sha256_of = sha256_of
        TrainingConfig.works_in_place = works_in_place
        weights.build_engine = build_engine
    return found | {"losses": losses, "shares_weights": all(shares), "built": BUILT}


def main() -> None:
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    prepare_process(TrainingConfig(num_threads=1))
    dist.init_process_group("gloo")
    for scenario in scenarios:
        if "damage" in scenario and dist.get_rank() == 0:
            damage(Path(scenario["directory"], scenario["damage"]), scenario["fault"])
        dist.barrier()
        answer = run(scenario)
        Path(scenario["answer"]).with_suffix(f".{dist.get_rank()}.json").write_text(
            json.dumps(answer)
        )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
