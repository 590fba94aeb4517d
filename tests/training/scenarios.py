"""What the workers of the engine's tests run; see rank.py."""

import shutil
from pathlib import Path

SETTINGS = {"batch_size": 2, "epochs": 2, "learning_rate": 5e-3, "num_threads": 1}
SETTINGS |= {"checkpoint_every": 4, "report_every": 1}
SKIPPED = [(1, "loss"), (2, "gradient"), (3, "loss"), (3, "gradient")]


def scenario(directory: Path, model: Path, config: dict | None = None, **rest) -> dict:
    task = {"model": str(model)} | rest.pop("task", {})
    return {
        "task": task,
        "config": SETTINGS | (config or {}),
        "directory": str(directory),
    } | rest


def faulty(workers, begun, tiny_encoder) -> dict:
    """Runs that meet a fault."""
    stopped = workers.directory / "stopped"
    source = Path(begun["whole", 1, "full"]["result"]["model"]).parent
    damaged = {}
    for fault in ("flipped", "truncated", "missing", "surplus", "manifest", "partial"):
        damaged[fault] = workers.directory / fault
        shutil.copytree(source / "checkpoints", damaged[fault] / "checkpoints")
        newest = damaged[fault] / "checkpoints" / "step-00000012"
        shard = newest / "deepspeed" / "mp_rank_00_model_states.pt"
        content = bytearray(shard.read_bytes())
        if fault == "flipped":
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)
        elif fault == "truncated":
            shard.write_bytes(content[:-1])
        elif fault == "missing":
            (newest / "rank-00001.safetensors").unlink()
        elif fault == "surplus":
            shard.with_name("mp_rank_01_model_states.pt").write_bytes(content)
        elif fault == "manifest":
            text = (newest / "manifest.json").read_text()
            (newest / "manifest.json").write_text(text.replace('"step": 12', '"step": 11'))
        else:
            newest.rename(newest.with_name(".step-00000012"))
    scenarios = {f: scenario(d, tiny_encoder, {"zero_stage": 1}) for f, d in damaged.items()}
    scenarios["other settings"] = scenario(
        source, tiny_encoder, {"zero_stage": 1, "learning_rate": 0.5}
    )
    scenarios["again"] = scenario(source, tiny_encoder, {"zero_stage": 1})
    bad = {"bad_example": 3}
    scenarios["nan"] = scenario(stopped, tiny_encoder, {"accumulation": 2}, task=bad)
    for stage, fault in SKIPPED:
        config = {"zero_stage": stage, "max_skipped_steps": 2}
        name = f"skip {fault} {stage}"
        task = bad | {"fault": fault}
        scenarios[name] = scenario(workers.directory / name, tiny_encoder, config, task=task)
    config = {"max_skipped_steps": 1}
    task = bad | {"fault": "gradient"}
    scenarios["gradient"] = scenario(workers.directory / "root", tiny_encoder, config, task=task)
    config, task = {"epochs": 4, "learning_rate": 1e-4}, bad | {"fault": "spike"}
    scenarios["spike"] = scenario(workers.directory / "spike", tiny_encoder, config, task=task)
    for part in ("full disk", "after full disk"):
        end = {"fill_disk_at": 5} if part == "full disk" else {}
        directory = workers.directory / "full disk"
        scenarios[part] = scenario(directory, tiny_encoder, {"zero_stage": 3}, **end)
    directory, at = workers.directory / "disk breaks", "step-00000008"
    scenarios["disk breaks"] = scenario(directory, tiny_encoder, {"epochs": 8}, break_disk_at=at)
    directory, config = workers.directory / "noticed", {"checkpoint_every": 99}
    scenarios["noticed"] = scenario(directory, tiny_encoder, config, noticed_at=5)
    for part in ("preempted", "after preempted"):
        end = {"terminate_at": 5} if part == "preempted" else {}
        scenarios[part] = scenario(workers.directory / "preempted", tiny_encoder, **end)
    scenarios["layers again"] = scenario(
        workers.directory / "layers again", tiny_encoder, {"activation_checkpointing": True}
    )
    lora = {"method": "lora", "zero_stage": 2, "accumulation": 2}
    scenarios["same seed"] = scenario(workers.directory / "same seed", tiny_encoder, lora)
    lora = lora | {"seed": 1}
    scenarios["other seed"] = scenario(workers.directory / "other seed", tiny_encoder, lora)
    scenarios["few"] = scenario(stopped, tiny_encoder, task={"num_examples": 3})
    return scenarios
