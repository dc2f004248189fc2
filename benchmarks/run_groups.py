"""Runs in folders; those that differ in nothing but their seed are one group."""

import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from scipy import stats

# A script finds modules in its own directory only; common/ is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.files import read_jsonl  # noqa: E402
from common.keys import changes_learning, flatten  # noqa: E402

TASK_KEYS = ("env.backend", "env.name", "env.task")


@dataclass
class RunCurve:
    """The evaluations of one run.

    Attributes:
        path: of its directory.
        config: {dotted key: value}, all of it.
        returns: {environment steps: return}.
    """

    path: Path
    config: dict
    returns: dict

    @property
    def env(self):
        """The configuration's section `env`, with the time limit of evaluation."""
        section = {key[4:]: value for key, value in self.config.items() if key[:4] == "env."}
        section["time_limit"] = self.config.get("eval.time_limit") or section["time_limit"]
        return SimpleNamespace(**section)

    @property
    def task(self):
        """`cartpole balance`."""
        return f"{self.config['env.name']} {self.config['env.task']}".strip()

    @property
    def learning(self):
        """What changes learning, but for the task and the seed, as something to compare."""
        skipped = (*TASK_KEYS, "seed")
        kept = {key: value for key, value in self.config.items() if changes_learning(key)}
        kept["eval.time_limit"] = self.env.time_limit
        return tuple(sorted((key, str(kept[key])) for key in kept if key not in skipped))


@dataclass
class Group:
    """Runs of one task and one configuration.

    Attributes:
        label: what tells it apart from the other groups, in a few words.
        settings: the same in full, if that is long.
        runs: one `RunCurve` for each seed.
    """

    task: str
    label: str
    settings: str
    runs: list

    @property
    def steps(self):
        """The environment steps at which every seed was evaluated, so nothing is made up."""
        return sorted(set.intersection(*(set(run.returns) for run in self.runs)))

    @property
    def returns(self):
        """[seeds, steps]."""
        return np.array([[run.returns[step] for step in self.steps] for run in self.runs])


def run_directories(folders):
    """The folders that are runs, and the runs in those that are not; each one once."""
    found = {}
    for folder in filter(Path.is_dir, folders):  # a sweep leaves a multirun.yaml among its runs
        inside = [folder] if (folder / "metrics.jsonl").exists() else sorted(folder.iterdir())
        for path in inside:
            if (path / "metrics.jsonl").exists() and (path / "config.yaml").exists():
                found[path.resolve()] = path
    return list(found.values())


def read_run(path):
    """A `RunCurve`."""
    config = flatten(yaml.safe_load((path / "config.yaml").read_text()))
    rows = read_jsonl(path / "metrics.jsonl", ("environment_steps",))
    returns = {
        row["environment_steps"]: row["eval/return"] for row in rows if "eval/return" in row
    }
    return RunCurve(path, config, returns)


def read_groups(folders, say):
    """All groups of runs in the folders, sorted by task; `say` hears what was left out and why."""
    seeds = defaultdict(dict)
    for path in run_directories(folders):
        run = read_run(path)
        if not run.returns:
            say(f"left out: {path} has no evaluation yet")
            continue
        group = seeds[run.task, run.learning]
        twin = group.get(run.config["seed"])
        if twin and len(twin.returns) >= len(run.returns):
            run, twin = twin, run
        if twin:
            say(f"left out: {twin.path} is the same run as {run.path}, and no longer")
        group[run.config["seed"]] = run
    labels = group_labels({learning for _, learning in seeds})
    groups = []
    for (task, learning), runs in sorted(seeds.items(), key=in_order):
        label, _, settings = labels[learning].partition(": ")
        group = Group(task, label, settings, [runs[seed] for seed in sorted(runs)])
        if not group.steps:
            say(f"left out: the seeds of {task} ({group.label}) have no evaluation at a same step")
            continue
        groups.append(group)
    return groups


def in_order(item):
    """Tasks by their names, and then settings by their values: 4 before 30."""
    (task, learning), _ = item
    return task, [(float(v), v) if is_number(v) else (float("inf"), v) for _, v in learning]


def is_number(text):
    """Whether it is one."""
    return re.fullmatch(r"-?[\d.]+(e-?\d+)?", text) is not None


def group_labels(configurations):
    """{configuration: the keys and values that tell it apart}.

    `ours` if there is only one; letters if it takes more than three keys.
    """
    values = {learning: dict(learning) for learning in configurations}
    keys = {key for config in values.values() for key in config}
    differ = sorted(
        key for key in keys if len({config.get(key) for config in values.values()}) > 1
    )
    labels = {
        learning: ", ".join(f"{key.split('.')[-1]}={config.get(key, '-')}" for key in differ)
        for learning, config in values.items()
    }
    if len(labels) == 1:
        return dict.fromkeys(labels, "ours")
    if len(differ) <= 3:
        return labels
    return {
        learning: f"settings {number}: {labels[learning]}"
        for number, learning in enumerate(sorted(labels), 1)
    }


def interquartile_mean(values, axis=None):
    """The mean of the middle half."""
    return stats.trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(strata, draws=2000):
    """The 95 % interval of a mean over strata, by resampling the seeds in each (percentiles).

    Args:
        strata: one array [seeds] for each task; the mean is that of the tasks' means.
    """

    def mean_of_means(*samples, axis):
        return np.mean([sample.mean(axis) for sample in samples], 0)

    found = stats.bootstrap(
        [np.asarray(values) for values in strata],
        mean_of_means,
        n_resamples=draws,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval
