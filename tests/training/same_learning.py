"""Trains four tiny runs and prints digests of all that was learned, as a Markdown table.

    python tests/training/same_learning.py [CHECKOUT]

Two commits learn the same to the bit if their tables are equal. The runs go through the command
line of CHECKOUT (this one if it is left out), with one thread.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

COMMON = [
    "device=cpu",
    "env.name=cartpole",
    "env.task=balance",
    "env.time_limit=40",
    "collector.random_steps=80",
    "collector.train_every=30",
    "collector.total_steps=240",
    "replay_buffer.batch_size=24",
    "replay_buffer.batch_length=8",
    "networks.belief_dim=16",
    "networks.state_dim=4",
    "networks.hidden_dim=16",
    "networks.channels=2",
    "optimization.horizon=4",
    "optimization.pretrain=4",
    "optimization.train_ratio=0.1",
    "eval.every=80",
    "logger.every=40",
    "logger.mode=disabled",
    "logger.progress=false",
]
STATES = ["env.from_pixels=false"]
RUNS = {
    "pixels": ["optimization.autocast=bfloat16", "logger.video=true"],
    "states, predict_discount": [
        *STATES,
        "optimization.predict_discount=true",
        "optimization.autocast=false",
    ],
    "two copies": [
        *STATES,
        "env.n_parallel_envs=2",
        "collector.random_steps=120",
        "optimization.autocast=false",
        "replay_buffer.capacity=150",
    ],
    "float16": [*STATES, "optimization.autocast=float16"],
}
OPTIMIZERS = ("world_model", "actor", "value")


def tensors(value):
    """All tensors and numbers of a nested state, in a fixed order."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    else:
        yield value


def feed(digest, state):
    """Adds a nested state to a digest."""
    for value in tensors(state):
        if isinstance(value, torch.Tensor):
            value = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest.update(value if isinstance(value, bytes) else repr(value).encode())


def digests(run_dir):
    """Weights, optimizers, replay rows and metrics of a finished run: {part: 16 digits}."""
    parts = {name: hashlib.sha256() for name in ("weights", "optimizers", "replay", "metrics")}
    with zipfile.ZipFile(max((run_dir / "checkpoints").glob("checkpoint-*"))) as archive:
        for path in sorted(archive.namelist()):
            if path.endswith("state.pt"):
                name = path.split("/")[1].split("-", 1)[1]
                state = torch.load(io.BytesIO(archive.read(path)), weights_only=True)
                if name == "agent":
                    feed(parts["weights"], state)
                elif name in OPTIMIZERS:
                    feed(parts["optimizers"], state)
    for path in sorted((run_dir / "replay").glob("*.memmap")):
        parts["replay"].update(path.read_bytes())
    parts["metrics"].update((run_dir / "metrics.jsonl").read_bytes())
    return {name: digest.hexdigest()[:16] for name, digest in parts.items()}


def main(checkout):
    """Prints the table, one line as soon as it is there."""
    print("| run | weights | optimizers | replay rows | metrics.jsonl |")
    print("| --- | --- | --- | --- | --- |")
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    for name, overrides in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            words = [*COMMON, *overrides, f"run_dir={run_dir}"]
            subprocess.run(
                [sys.executable, "dreamer.py", *words],
                cwd=checkout,
                env=env,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            cells = [name, *digests(run_dir).values()]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2])
