"""Draws evaluation returns of runs, one small plot per task, and prints a table of them.

    python benchmarks/plot.py runs/*                        # writes curves.png and curves.pdf
    python benchmarks/plot.py runs/sweep --out sweep.pdf

A folder is a run, or holds runs. Runs that differ in nothing but their seed are one curve: the
mean over its seeds at the steps where all of them were evaluated, and the 95 % interval of that
mean (bootstrap over the seeds) if there are several. Nothing is interpolated or extrapolated.

The published points (common/published.csv: 5 seeds of each task, from pixels with an action repeat
of 2) are the 100 runs that come with the official code, danijar/dreamer,
scores/dreamer.json, MIT license: their author says that they were made with an earlier setting of
the hyper-parameters (issue 55 there), so they are a guide, not a target.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# A script finds modules in its own directory only; common/ is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.plots import NEAR, published_curve  # noqa: E402
from run_groups import bootstrap_interval, interquartile_mean, read_groups  # noqa: E402

COLUMNS = ("task", "runs", "environment steps", "mean", "IQM", "95 % interval", "seeds")


def draw_group(axis, group, color):
    """The mean over seeds, its interval, and a thin line for each seed."""
    steps, returns = group.steps, group.returns
    label = f"{group.label}, {len(returns)} seed{'s' * (len(returns) > 1)}"
    axis.plot(steps, returns.mean(0), "o-", color=color, markersize=3, label=label)
    if len(returns) > 1:
        bounds = [bootstrap_interval([values]) for values in returns.T]
        low, high = zip(*bounds, strict=True)
        axis.fill_between(steps, low, high, color=color, alpha=0.2)
        axis.plot(steps, returns.T, color=color, linewidth=0.5, alpha=0.5)


def draw_published(axis, env, last_step):
    """The published points at their own steps, as far as ours go, and the one beside the end."""
    curve = published_curve(env)
    curve = None if curve is None else curve[curve[:, 0] <= last_step + NEAR]
    if curve is None or not len(curve):
        return
    steps, mean, low, high = curve.T
    label = "published: mean and range of 5 seeds"
    error = mean - low, high - mean
    axis.errorbar(steps, mean, yerr=error, fmt="ks", markersize=4, capsize=3, label=label)


def draw_task(axis, task, groups, colors):
    """One small plot."""
    for group in groups:
        draw_group(axis, group, colors[group.label])
    last_step = max(group.steps[-1] for group in groups)
    draw_published(axis, groups[0].runs[0].env, last_step)
    axis.set(title=task, xlabel="environment steps", ylabel="evaluation return")
    low, high = axis.get_ylim()
    low = min(0, low)
    axis.set_xlim(0, 1.03 * last_step)  # the last point is a whole one
    axis.set_ylim(low, high + 0.05 * (high - low))
    axis.legend(fontsize="small")


def table_row(task, label, steps, strata):
    """The cells of one line: one array of returns [seeds] for each task that it covers."""
    values = np.concatenate(strata)
    mean = np.mean([returns.mean() for returns in strata])
    interval = "-"
    if min(map(len, strata)) > 1:
        interval = "{:.0f} to {:.0f}".format(*bootstrap_interval(strata))
    cells = task, label, steps, f"{mean:.0f}", f"{interquartile_mean(values):.0f}", interval
    return *cells, str(len(values))


def table(groups):
    """A Markdown table of the last step that all seeds of a group have reached.

    Groups of several tasks have a line for all of them, whose interval resamples the seeds of each
    task on their own.
    """
    rows, by_label = [], defaultdict(list)
    for group in groups:
        last = group.returns[:, -1]
        rows.append(table_row(group.task, group.label, f"{group.steps[-1]:,}", [last]))
        by_label[group.label].append(last)
    for label, strata in by_label.items():
        if len(strata) > 1:
            rows.append(table_row(f"all {len(strata)} tasks", label, "the last", strata))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(groups):
    """A figure with one small plot for each task."""
    tasks = defaultdict(list)
    for group in groups:
        tasks[group.task].append(group)
    labels = dict.fromkeys(group.label for group in groups)
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    columns = min(4, len(tasks))
    shape = -(-len(tasks) // columns), columns
    figure = Figure(figsize=(5 * shape[1], 3.5 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, (task, members) in zip(axes.flat, tasks.items()):
        draw_task(axis, task, members, colors)
    return figure


def main():
    """Reads the runs named on the command line, prints the table and saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders of runs")
    both = [Path("curves.png"), Path("curves.pdf")]
    parser.add_argument("--out", nargs="+", type=Path, default=both, help="PNG, PDF or SVG")
    options = parser.parse_args()
    groups = read_groups(options.runs, say=lambda sentence: print(sentence, file=sys.stderr))
    if not groups:
        parser.error("none of these is or holds a run with an evaluation")
    figure = draw(groups)
    for path in options.out:
        figure.savefig(path, dpi=110)
    print(table(groups))
    long = {group.label: group.settings for group in groups if group.settings}
    for label, settings in sorted(long.items()):
        print(f"\n{label}: {settings}")
    print(f"\nwritten: {', '.join(map(str, options.out))}")


if __name__ == "__main__":
    main()
