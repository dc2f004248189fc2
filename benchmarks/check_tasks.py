"""Every task of the paper: loads it, takes 1000 random environment steps from pixels, makes one
update, and writes a table to benchmarks/results/tasks.md.

    python benchmarks/tasks.py
"""

import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dreamer  # noqa: E402
import dreamer_utils as utils  # noqa: E402

TASKS = """acrobot swingup, cartpole balance, cartpole balance_sparse, cartpole swingup,
cartpole swingup_sparse, cheetah run, cup catch, finger spin, finger turn_easy, finger turn_hard,
hopper hop, hopper stand, pendulum swingup, quadruped run, quadruped walk, reacher easy,
reacher hard, walker run, walker stand, walker walk"""
COLUMNS = "task", "observation", "actions", "bounds before scaling", "ms per agent step", "loss"


def row(name, task):
    """One line of the table: a random episode, then one update on two sequences from it."""
    name = "ball_in_cup" if name == "cup" else name
    flags = [f"env.name={name}", f"env.task={task}", "replay_buffer.batch_size=100"]
    with initialize(config_path=None, version_base="1.3"):
        cfg = utils.load_config(compose("config", overrides=flags))
    env = utils.make_env(cfg.env, [utils.EpisodeSeeds(0, 0)], cfg.networks)
    space = env.base_env.full_action_spec_unbatched["action"].space
    size = env.action_spec.shape[-1]
    start = time.perf_counter()
    rollout = env.rollout(500)
    milliseconds = (time.perf_counter() - start) * 2
    assert len(rollout) == 500 and rollout["next", "truncated"][-1]
    seen = rollout["next", "observation"]
    agent = utils.Agent(cfg, seen.shape[1:], size)
    sequences = rollout[:100].reshape(2, 50)
    batch = {"observation": sequences["next", "observation"], "action": sequences["action"],
             "reward": sequences["next", "reward"].squeeze(-1),
             "terminated": sequences["next", "terminated"].squeeze(-1)}  # fmt: skip
    noise = dreamer.draw_noise(2, 50, cfg.optimization, agent.world_model)
    optimizers = utils.build_optimizers(cfg.optimization, agent)
    parts = dreamer.LEARNING, agent, optimizers, batch, noise, cfg.optimization
    loss = dreamer.update(*parts)["world_model/loss"]
    assert torch.isfinite(loss)
    bounds = f"[{space.low.min():g}, {space.high.max():g}]"
    shape = " x ".join(map(str, seen.shape[1:]))
    return f"{name} {task}", shape, size, bounds, f"{milliseconds:.1f}", f"{loss:.0f}"


def main():
    """Writes the table, one line as soon as it is there."""
    utils.select_gl()
    target = ROOT / "benchmarks" / "results" / "tasks.md"
    with target.open("w", buffering=1) as file:
        for line in (COLUMNS, ["---"] * len(COLUMNS), *(t.split() for t in TASKS.split(","))):
            cells = row(*line) if len(line) == 2 else line
            text = "| " + " | ".join(map(str, cells)) + " |"
            print(text, file=file)
            print(text)


if __name__ == "__main__":
    main()
