"""How true were an agent's beliefs, over a whole run? `python benchmarks/honesty.py RUNS...`.

One column for each run, all of it over environment steps, one point for each evaluation. The
returns are on top, beside the published ones. Below are the beliefs that can be checked. Blue is
what model or critic said. The dashed line is what turned out to be true, or, for errors, those of
repeating the last observation or reward. So the agent was right where blue lies on the dashed
line, and, for errors, below it.

A folder is a run, or holds runs.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

# A script finds modules in its own directory only; common/ is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import read_jsonl  # noqa: E402
from common.panel import ENVIRONMENT_STEPS, LARGE, column_of, draw, draw_returns  # noqa: E402
from common.plots import is_published_setting, published_curve, save_figure  # noqa: E402
from run_groups import run_directories  # noqa: E402


def beliefs(cfg, history, curves):
    """What model and critic said at each evaluation, and what they should have said.

    Returns:
        {name: [evaluations]}: the mean over an evaluation of each curve, errors over the first H
        steps of it, which are those that are dreamed; `true_value` is the value less its bias.
    """
    horizon = cfg.optimization.horizon
    bias = dict(zip(*column_of(history, "behavior/value_bias"), strict=True))
    found = defaultdict(list)
    for row in curves:
        step = row["environment_steps"]
        if step not in bias:  # the episode was shorter than a dream, or the row is still to come
            continue
        found["environment_steps"].append(step)
        for name in ("observation_error", "copied_observation", "reward_error", "copied_reward"):
            found[name].append(np.mean(row[name][:horizon]))
        for name in ("imagined_return", "real_return", "value"):
            found[name].append(np.mean(row[name]))
        found["true_value"].append(found["value"][-1] - bias[step])
    return found


def titles(paths):
    """Of the columns: the task and the seed; the folder too where these are the same for two."""
    configs = [OmegaConf.load(path / "config.yaml") for path in paths]
    names = [f"{cfg.env.name} {cfg.env.task}".strip() + f", seed {cfg.seed}" for cfg in configs]
    return [
        f"{name} ({path.name})" if names.count(name) > 1 else name
        for name, path in zip(names, paths, strict=True)
    ]


def draw_run(axes, path, title):
    """One column of the figure."""
    cfg = OmegaConf.load(path / "config.yaml")
    history = read_jsonl(path / "metrics.jsonl", ("environment_steps",))
    curves = read_jsonl(path / "curves.jsonl", ("environment_steps",))
    published = published_curve(cfg.env) if is_published_setting(cfg.env) else None
    draw_returns(axes[0], history, published)
    axes[0].set_title(f"{title}: return", size=LARGE + 3)

    found = beliefs(cfg, history, curves)
    steps, H = found["environment_steps"], cfg.optimization.horizon
    seen = "frames" if cfg.env.from_pixels else "observations"
    number = "pixel" if cfg.env.from_pixels else "number"

    def draw_belief(axis, title, unit, names):
        blue, dashed = names
        lines = {blue: (steps, found[names[blue]], "o-")}
        lines[dashed] = (steps, found[names[dashed]], "ks--")
        draw(axis, title, ENVIRONMENT_STEPS, unit, **lines)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))

    draw_belief(
        axes[1],
        f"model: error of {seen} predicted for 1 to {H} steps",
        f"squared error per {number}",
        {"model": "observation_error", "last one repeated": "copied_observation"},
    )
    draw_belief(
        axes[2],
        f"model: error of rewards predicted for 1 to {H} steps",
        "absolute error of a reward",
        {"model": "reward_error", "last one repeated": "copied_reward"},
    )
    draw_belief(
        axes[3],
        f"dream: rewards of the next {H} steps",
        "sum of rewards",
        {"dreamed": "imagined_return", "real": "real_return"},
    )
    draw_belief(
        axes[4],
        "critic: mean value of an episode's states",
        "discounted rewards",
        {"value": "value", "value less its bias": "true_value"},
    )
    for axis in axes[:-1]:
        axis.set_xlabel("")  # all plots of a column have the same steps


def main():
    """Draws the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders of runs")
    parser.add_argument("--out", type=Path, default=Path("honesty.png"), help="PNG")
    options = parser.parse_args()
    paths = [path for path in run_directories(options.runs) if has_curves(path)]
    if not paths:
        parser.error("none of these is or holds a run with an evaluation of its beliefs")
    figure = Figure(figsize=(8 * len(paths), 22), layout="constrained")
    columns = figure.subplots(5, len(paths), squeeze=False, sharex="col").T
    for axes, path, title in zip(columns, paths, titles(paths), strict=True):
        draw_run(axes, path, title)
    save_figure(figure, options.out, dpi=60)
    print(f"written: {options.out}")


def has_curves(path):
    """Whether an evaluation of the run has compared model and critic with its episode."""
    file = path / "curves.jsonl"
    return file.exists() and any("value" in row for row in read_jsonl(file))


if __name__ == "__main__":
    main()
