"""Draws evaluation returns of our runs over the published ones: small multiples, one per task.

    python benchmarks/plot.py runs/cheetah-run-seed0 runs/cheetah-run-seed1 --out curves.png

A run is a directory with metrics.jsonl and config.yaml. Runs of the same task are its seeds: their
mean, and the 95 % confidence band of that mean (bootstrap over seeds) if there are several. Prints
a Markdown table of the same numbers. The published curves (common/published.csv: mean and range
over 5 seeds) are the 100 runs that come with the official code, danijar/dreamer,
scores/dreamer.json, MIT license: their author says that they were made with an earlier setting of
the hyper-parameters (issue 55 there), so they are a guide, not a target.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import OmegaConf

# A script finds modules in its own directory only; common/ is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.plots import published_curve  # noqa: E402


def read(run):
    """The environment of a run, and its environment steps and evaluation returns [n, 2]."""
    env = OmegaConf.load(run / "config.yaml").env
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [(row["environment_steps"], row["eval/return"]) for row in rows if "eval/return" in row]
    return env, np.array(rows)


def confidence_band(curves, draws=2000):
    """The 95 % interval of the mean over seeds, [seeds, n] -> two [n], by resampling the seeds."""
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, len(curves), (draws, len(curves)))
    return np.percentile(curves[chosen].mean(1), (2.5, 97.5), axis=0)


def draw(axis, task, runs, reference):
    """One panel; prints a table row for every evaluation of the shortest run."""
    steps = min((run[:, 0] for run in runs), key=lambda run: run[-1])
    ours = np.stack([np.interp(steps, *run.T) for run in runs])
    label = f"ours, {len(runs)} seed{'s' * (len(runs) > 1)}"
    axis.plot(steps, ours.mean(0), "o-", markersize=3, label=label)
    if len(runs) > 1:
        axis.fill_between(steps, *confidence_band(ours), alpha=0.2)
    theirs = np.full(len(steps), np.nan)
    if reference is not None:
        last = np.searchsorted(reference[:, 0], steps[-1]) + 1
        x, mean, low, high = reference[:last].T
        axis.plot(x, mean, "k--", label="published, 5 seeds")
        axis.fill_between(x, low, high, color="k", alpha=0.1)
        theirs = np.interp(steps, x, mean)
    axis.set(title=task, xlabel="environment steps", ylabel="evaluation return", ylim=(0, 1000))
    axis.set_xlim(0, steps[-1] * 1.02)
    axis.legend(loc="upper left")
    for step, mine, published_mean in zip(steps, ours.mean(0), theirs, strict=True):
        print(f"| {task} | {int(step):,} | {mine:.0f} | {published_mean:.0f} |")


def main():
    """Reads the runs named on the command line, prints the table and saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    tasks = defaultdict(list)
    references = {}
    for run in options.runs:
        if not (run / "metrics.jsonl").exists():
            parser.error(f"{run} is no run: it has no metrics.jsonl")
        env, rows = read(run)
        if len(rows) == 0:
            parser.error(f"{run} has no evaluation yet")
        task = f"{env.name} {env.task}".strip()
        tasks[task].append(rows)
        references[task] = published_curve(env)
    columns = min(4, len(tasks))
    shape = -(-len(tasks) // columns), columns
    figure = Figure(figsize=(5 * shape[1], 3.5 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    print("| task | environment steps | ours | published |\n| --- | --- | --- | --- |")
    for axis, (task, runs) in zip(axes.flat, sorted(tasks.items())):
        draw(axis, task, runs, references[task])
    figure.savefig(options.out, dpi=110)
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
