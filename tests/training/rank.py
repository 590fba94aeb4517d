"""One worker of the engine's tests: runs the scenarios of a JSON file one after another.

    python rank.py SCENARIOS.json      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

A process serves many scenarios: importing and starting DeepSpeed costs more than training here.
"""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModel

from fusionrec.errors import FusionRecError
from fusionrec.training.config import TrainingConfig
from fusionrec.training.engine import prepare_process, train
from fusionrec.training.task import shuffled


@dataclasses.dataclass(frozen=True)
class Toy:
    """Pull a tiny BERT's first vector towards a fixed random direction."""

    model: str
    num_examples: int = 24
    bad_example: int | None = None

    name = "toy"
    head = ()

    @property
    def identity(self):
        return {"model": self.model, "num_examples": self.num_examples}

    def build_model(self):
        return AutoModel.from_pretrained(self.model, add_pooling_layer=False)

    def plan(self, batch_size, generator):
        return shuffled(self.num_examples, batch_size, generator)

    def batch(self, examples):
        tokens = np.stack([np.random.default_rng(int(e)).integers(5, 60, 7) for e in examples])
        target = np.tile(np.random.default_rng(0).normal(size=32), (len(examples), 1))
        target[examples == self.bad_example] = np.nan
        return {
            "input_ids": torch.from_numpy(tokens),
            "target": torch.from_numpy(target.astype(np.float32)),
        }

    def loss(self, model, batch):
        # Twice through the model, as the encoder's task does.
        first = model(input_ids=batch["input_ids"]).last_hidden_state[:, 0]
        second = model(input_ids=batch["input_ids"][:, :4]).last_hidden_state[:, 0]
        return ((first - batch["target"]) ** 2).mean() + ((second - 0.5) ** 2).mean()

    def describe(self, examples):
        return [{"example": int(e)} for e in examples]

    def save(self, model, directory):
        model.save_pretrained(directory)


def run(scenario: dict) -> dict:
    task = Toy(**scenario["task"])
    config = TrainingConfig(**scenario["config"])
    directory = Path(scenario["directory"])
    losses = []

    def on_report(report):
        losses.append(report.loss)
        if report.step == scenario.get("kill_at") and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if report.step == scenario.get("leave_at"):
            raise InterruptedError

    try:
        result = train(task, config, directory, on_report=on_report)
    except (FusionRecError, InterruptedError) as error:
        return {"error": type(error).__name__, "message": str(error), "losses": losses}
    return {"result": result.model_dump(mode="json"), "losses": losses}


def main() -> None:
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    prepare_process(TrainingConfig(num_threads=1))
    dist.init_process_group("gloo")
    for scenario in scenarios:
        answer = run(scenario)
        Path(scenario["answer"]).with_suffix(f".{dist.get_rank()}.json").write_text(
            json.dumps(answer)
        )
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
