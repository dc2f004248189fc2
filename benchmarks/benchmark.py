"""Are our returns those of the paper? `python benchmarks/benchmark.py RUNS...`.

Compares runs with the published returns of each seed (common/published.csv), task by task, at the
published steps only. A folder is a run, or holds runs; those that differ in nothing but their seed
are one row. Runs whose settings are not those of config.yaml are left out: it would be another
experiment. `--all` shows every published step that the runs have reached, not only the last;
`--into` puts the table between the two marks of a page, such as README.md.

What is compared. Published points are 100,000 environment steps apart, and look like the mean of
the ten evaluations since the point before (they are too smooth for single episodes). The official
code evaluates at 5,000, 15,000, 25,000 ... steps. Ours is the mean of ten evaluations, too: at
these steps with `eval.every=5_000`, 5,000 steps earlier with the 10,000 of config.yaml, which is
never to our advantage while a curve rises.

The verdict. Take the published seeds as draws from a normal distribution of unknown mean and
variance. The mean of k more draws lies in the 95 % prediction interval, mean +- t sd sqrt(1/k +
1/n), 95 times in 100. Each published run, compared in this way with the others of its task, lies
inside in 93 of 100 cases. `consistent`: ours lies inside. `below`, `above`: it does not. `too few
seeds`: it lies inside, but the interval reaches down to 0, so that a run that has learned nothing
would lie inside as well. The column `would see` is the smallest loss that is called `below`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script finds modules in its own directory only

from common.keys import changes_learning, flatten  # noqa: E402
from common.plots import NEAR, is_published_setting, published_returns  # noqa: E402
from markdown_tables import add_page_option, markdown_table, put_into_page  # noqa: E402
from run_groups import TASK_KEYS, read_groups  # noqa: E402

SPACING = 100_000  # environment steps between two published points
EVERY = 10_000  # environment steps between two evaluations of the official code
FEWEST = 5  # evaluations behind a published point; one episode each says little
COLUMNS = (
    "task",
    "environment steps",
    "ours",
    "published mean",
    "published range",
    "interval of 95 %",
    "would see",
    "verdict",
)


def prediction_interval(published, k):
    """Where the mean of k more draws lies with a probability of 95 %: (low, high).

    Args:
        published: [n], returns of the published seeds.
    """
    n = len(published)
    half = stats.t.ppf(0.975, n - 1) * np.std(published, ddof=1) * np.sqrt(1 / k + 1 / n)
    return np.mean(published) - half, np.mean(published) + half


def verdict(ours, published):
    """One of the four sentences; both are returns of seeds at one step."""
    low, high = prediction_interval(published, len(ours))
    if np.mean(ours) < low:
        return "below"
    if np.mean(ours) > high:
        return "above"
    return "consistent" if low > 0 else "too few seeds"


def return_at(returns, step):
    """Ours for the published point at `step`, or None.

    For each evaluation of the official code since the point before, ours is the last one so far,
    if it is less than 10,000 steps old. Evaluations that are closer together do not count more.

    Args:
        returns: {environment steps: return} of one run.
    """
    taken = []
    for official in range(step - SPACING + EVERY, step + 1, EVERY):
        recent = [at for at in returns if official - EVERY < at <= official]
        if recent:
            taken.append(max(recent))
    if len(taken) < FEWEST or taken[-1] < step - NEAR:
        return None
    return float(np.mean([returns[at] for at in taken]))


def compare(group):
    """[(step, ours [seeds], published [seeds])] at the published steps that every seed reached."""
    found = []
    for step, published in published_returns(group.runs[0].env).items():
        ours = [return_at(run.returns, step) for run in group.runs]
        if None not in ours:
            found.append((step, ours, published))
    return found


def changed_keys(group):
    """The keys of a group that change learning and are not as in config.yaml."""
    default = flatten(yaml.safe_load((ROOT / "config.yaml").read_text()))
    config = group.runs[0].config
    skipped = {*TASK_KEYS, "seed"}
    return [
        key
        for key, value in config.items()
        if key not in skipped and changes_learning(key) and str(default.get(key)) != str(value)
    ]


def row(task, step, ours, published):
    """The cells of one comparison."""
    low, high = prediction_interval(published, len(ours))
    mean = np.mean(published)
    seeds = "single run" if len(ours) == 1 else f"{len(ours)} seeds"
    loss = f"a loss of {100 * (mean - low) / mean:.0f} %" if low > 0 else "no loss"
    return (
        task,
        f"{step:,}",
        f"{np.mean(ours):.0f} ({seeds})",
        f"{mean:.0f}",
        f"{min(published):.0f} to {max(published):.0f}, {len(published)} seeds",
        f"{max(low, 0):.0f} to {high:.0f}",
        loss,
        f"**{verdict(ours, published)}**",
    )


def table(groups, every_step, say):
    """The comparison as Markdown, empty if nothing can be compared; `say` hears why."""
    rows = []
    for group in groups:
        changed = changed_keys(group)
        if changed or not is_published_setting(group.runs[0].env):
            differ = ", ".join(changed[:4]) + ", ..." * (len(changed) > 4)
            say(f"left out: {group.task}: not the settings of config.yaml ({differ})")
            continue
        found = compare(group)
        if not found:
            reason = "no seed, or not every one, can be compared at a published step"
            say(f"left out: {group.task}: {reason}")
        rows += [row(group.task, *each) for each in (found if every_step else found[-1:])]
    return markdown_table(COLUMNS, rows)


def main():
    """Prints the table, and puts it into a page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders of runs")
    parser.add_argument("--all", action="store_true", help="every published step")
    add_page_option(parser)
    options = parser.parse_args()
    missing = [str(path) for path in options.runs if not path.is_dir()]
    if missing:
        parser.error(f"no such folder: {', '.join(missing)}")

    def say(sentence):
        print(sentence, file=sys.stderr)

    text = table(read_groups(options.runs, say), options.all, say)
    nothing = "No run with the settings of `config.yaml` can be compared at a published step yet."
    text = text or nothing
    print(text)
    if options.into:
        put_into_page(options.into, "verdict", text)


if __name__ == "__main__":
    main()
