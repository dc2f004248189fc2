"""Whether every task of the paper loads, renders and trains: `python benchmarks/check_tasks.py`.

Each takes 1000 random environment steps from pixels and makes one update; the table goes to
benchmarks/results/tasks.md.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

# A script finds modules in its own directory only; dreamer.py is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dreamer  # noqa: E402
import dreamer_utils as utils  # noqa: E402
from measuring import ROOT, configuration  # noqa: E402

TASKS = """acrobot swingup, cartpole balance, cartpole balance_sparse, cartpole swingup,
cartpole swingup_sparse, cheetah run, cup catch, finger spin, finger turn_easy, finger turn_hard,
hopper hop, hopper stand, pendulum swingup, quadruped run, quadruped walk, reacher easy,
reacher hard, walker run, walker stand, walker walk"""
COLUMNS = ("task", "observation", "actions", "bounds before scaling", "ms per agent step", "loss")


def row(name, task):
    """One line of the table: a random episode, then one update on two sequences from it."""
    name = "ball_in_cup" if name == "cup" else name
    cfg = configuration(f"env.name={name}", f"env.task={task}", "replay_buffer.batch_size=100")
    env = utils.make_env(cfg)
    space = env.base_env.full_action_spec_unbatched["action"].space
    start = time.perf_counter()
    rollout = env.rollout(500)
    milliseconds = (time.perf_counter() - start) * 2
    assert len(rollout) == 500 and rollout["next", "truncated"][-1]
    loss = first_loss(cfg, utils.env_sizes(env), rollout[:100].reshape(2, 50))
    assert torch.isfinite(loss)
    shape, actions = utils.env_sizes(env)
    env.close()
    bounds = f"[{space.low.min():g}, {space.high.max():g}]"
    shape = " x ".join(map(str, shape))
    return f"{name} {task}", shape, actions, bounds, f"{milliseconds:.1f}", f"{loss:.0f}"


def first_loss(cfg, sizes, sequences):
    """The loss of the world model in the first update of a fresh agent."""
    after = sequences["next"]
    batch = {
        "observation": after["observation"],
        "action": sequences["action"],
        "reward": after["reward"].squeeze(-1),
        "terminated": after["terminated"].squeeze(-1),
    }
    hp = cfg.optimization
    agent = dreamer.make_agent(cfg, *sizes)
    optimizers = utils.make_optimizers(hp, agent)
    noise = dreamer.draw_noise(*sequences.shape, hp, agent.world_model)
    autocast = utils.make_autocast(torch.device("cpu"), torch.float32)
    metrics = dreamer.update(agent, optimizers, batch, noise, hp, autocast)
    return metrics["world_model/loss"]


def main():
    """Writes the table, one line as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    out = ROOT / "benchmarks" / "results" / "tasks.md"
    parser.add_argument("--out", type=Path, default=out)
    options = parser.parse_args()
    with options.out.open("w", buffering=1) as file:
        for line in (COLUMNS, ["---"] * len(COLUMNS), *(t.split() for t in TASKS.split(","))):
            cells = row(*line) if len(line) == 2 else line
            text = "| " + " | ".join(map(str, cells)) + " |"
            print(text, file=file)
            print(text)


if __name__ == "__main__":
    main()
