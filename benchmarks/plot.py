"""Draws evaluation returns of our runs over the published ones: small multiples, one per task.

    python benchmarks/plot.py runs/cheetah-run-seed0 runs/cheetah-run-seed1 --out curves.png

A run is a directory with metrics.jsonl and config.yaml. Runs of the same task are its seeds: their
mean, and their range if there are several. Prints a Markdown table of the same numbers. The
published curves (benchmarks/published.csv) are the 100 runs that come with the official code,
danijar/dreamer, scores/dreamer.json, MIT licence: their author says that they were made with an
earlier setting of the hyper-parameters (issue 55 there), so they are a guide, not a target.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from omegaconf import OmegaConf

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PUBLISHED = Path(__file__).with_name("published.csv")


def published():
    """task -> array of rows (environment steps, mean, lowest, highest) over the seeds."""
    curves = defaultdict(list)
    for row in csv.DictReader(PUBLISHED.open()):
        values = row["environment_steps"], row["mean"], row["lowest"], row["highest"]
        curves[row["task"]].append([float(value) for value in values])
    return {task: np.array(rows) for task, rows in curves.items()}


def read(run):
    """The task of a run, and its environment steps and evaluation returns."""
    env = OmegaConf.load(run / "config.yaml").env
    task = f"{env.name}_{env.task}".replace("ball_in_cup", "cup")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [(row["environment_steps"], row["eval/return"]) for row in rows if "eval/return" in row]
    return task, np.array(rows)


def draw(axis, task, runs, reference):
    """One panel; prints a table row for every evaluation of the shortest run."""
    steps = min((run[:, 0] for run in runs), key=len)
    ours = np.stack([np.interp(steps, *run.T) for run in runs])
    axis.plot(steps, ours.mean(0), label=f"ours, {len(runs)} seed{'s' * (len(runs) > 1)}")
    axis.fill_between(steps, ours.min(0), ours.max(0), alpha=0.2)
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
    for step, mine, published_mean in zip(steps, ours.mean(0), theirs):
        print(f"| {task} | {int(step):,} | {mine:.0f} | {published_mean:.0f} |")


def main():
    """Reads the runs named on the command line, prints the table and saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    tasks = defaultdict(list)
    for run in options.runs:
        task, rows = read(run)
        if len(rows) == 0:
            parser.error(f"{run} has no evaluation yet")
        tasks[task].append(rows)
    columns = min(4, len(tasks))
    shape = -(-len(tasks) // columns), columns
    size = 5 * shape[1], 3.5 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    print("| task | environment steps | ours | published |\n| --- | --- | --- | --- |")
    for axis, (task, runs) in zip(axes.flat, sorted(tasks.items())):
        draw(axis, task, runs, published().get(task))
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
