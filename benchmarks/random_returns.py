"""What random actions score: `python benchmarks/random_returns.py TASK... [--episodes 100]`.

A task is written as on the cards, "cartpole balance". Uniform actions, each repeated as in the
states preset; returns do not depend on what is observed, so nothing is rendered. The means go to
benchmarks/results/random.json, beside those that are there.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

# A script finds modules in its own directory only; dreamer.py is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dreamer_utils as utils  # noqa: E402
from measuring import ROOT, configuration  # noqa: E402
from results import RANDOM  # noqa: E402


def random_returns(task, episodes, repeat):
    """The returns of some episodes with uniform actions."""
    name, kind = task.split()
    words = f"env.name={name}", f"env.task={kind}", f"env.action_repeat={repeat}"
    cfg = configuration(*words, "env.from_pixels=false")
    utils.set_seeds(0)
    env = utils.make_env(cfg)
    length = -(-cfg.env.time_limit // repeat)
    with torch.no_grad():
        returns = [env.rollout(length)["next", "reward"].sum().item() for _ in range(episodes)]
    utils.close_env(env)
    return returns


def main():
    """Measures the tasks of the command line, one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--episodes", type=int, default=100)
    repeat = OmegaConf.load(ROOT / "config_state.yaml").env.action_repeat
    parser.add_argument("--repeat", type=int, default=repeat, help="environment steps per action")
    options = parser.parse_args()
    means = json.loads(RANDOM.read_text()) if RANDOM.exists() else {}
    for task in options.tasks:
        returns = random_returns(task, options.episodes, options.repeat)
        means[task] = round(float(np.mean(returns)), 1)
        print(f"{task}: {np.mean(returns):.1f} +- {np.std(returns):.1f}", flush=True)
        RANDOM.write_text(json.dumps(dict(sorted(means.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()
