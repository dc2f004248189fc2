"""The verdict on our returns beside the published ones: benchmarks/benchmark.py."""

import csv
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import benchmark
from common.plots import PUBLISHED, published_returns
from small_runs import ROOT, configure

STEPS = range(10_000, 1_010_000, 10_000)


def published_tasks():
    """(name, task) of all published curves."""
    with PUBLISHED.open() as file:
        names = dict.fromkeys(row["task"].partition("_")[::2] for row in csv.DictReader(file))
    return [("ball_in_cup" if name == "cup" else name, task) for name, task in names]


def returns_of(name, task):
    """{step: returns of the published seeds}."""
    return published_returns(SimpleNamespace(backend="dm_control", name=name, task=task))


def write_run(path, *words, seed=0, factor=1.0, last=1_000_000, source=0):
    """A run of the paper's settings whose evaluations are those of one published seed."""
    cfg = configure(*words, f"seed={seed}")
    published = returns_of(cfg.env.name, cfg.env.task)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump()))
    rows = []
    for step in STEPS:
        point = next(at for at in published if at >= step)
        value = factor * published[point][source]
        rows.append({"environment_steps": step, "agent_steps": 0, "updates": 0})
        rows[-1]["eval/return"] = value
    lines = [json.dumps(row) for row in rows if row["environment_steps"] <= last]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def run_benchmark(*words):
    """The cells of the table that the command prints, and what it says beside it."""
    command = [sys.executable, "benchmarks/benchmark.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]], done


@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_runs_like_the_published_ones_are_consistent_in_95_of_100(seeds):
    """Both drawn from one distribution, with the spread of each published point."""
    generator, inside = np.random.default_rng(seeds), []
    for task in published_tasks():
        for published in list(returns_of(*task).values())[1::4]:
            mean, spread = np.mean(published), np.std(published, ddof=1)
            theirs = generator.normal(mean, spread, len(published))
            ours = generator.normal(mean, spread, seeds)
            inside.append(benchmark.verdict(ours, theirs) in ("consistent", "too few seeds"))
    assert 0.92 < np.mean(inside) < 0.98, len(inside)


def test_each_published_run_is_consistent_with_the_others_in_93_of_100():
    """Whatever their distribution really is; the script's text gives this figure."""
    inside = []
    for task in published_tasks():
        for published in returns_of(*task).values():
            for number, left_out in enumerate(published):
                others = published[:number] + published[number + 1 :]
                if len(others) >= 3:
                    low, high = benchmark.prediction_interval(others, 1)
                    inside.append(low <= left_out <= high)
    assert len(inside) > 4000 and round(np.mean(inside), 2) == 0.93


@pytest.mark.parametrize("task", ["cartpole balance", "walker walk", "walker stand"])
def test_a_loss_of_a_fifth_is_below(task):
    """A million steps: five runs, or each alone."""
    published = returns_of(*task.split())[1_005_000]
    handicapped = [0.8 * value for value in published]
    assert benchmark.verdict(handicapped, published) == "below"
    assert {benchmark.verdict([value], published) for value in handicapped} == {"below"}
    assert benchmark.verdict(published, published) == "consistent"
    assert benchmark.verdict([1.2 * value for value in published], published) == "above"


def test_an_interval_down_to_0_says_that_more_seeds_are_needed():
    published = returns_of("finger", "spin")[105_000]
    assert benchmark.verdict([0.0], published) == "too few seeds"


def test_ours_is_the_mean_since_the_published_point_before():
    returns = {step: float(step) for step in range(10_000, 310_000, 10_000)}
    assert benchmark.return_at(returns, 105_000) == 55_000
    assert benchmark.return_at(returns, 205_000) == 155_000
    assert benchmark.return_at(returns, 405_000) is None
    assert benchmark.return_at({5_000: 1.0}, 5_000) is None, "one evaluation says too little"
    unfinished = {step: value for step, value in returns.items() if step <= 90_000}
    assert benchmark.return_at(unfinished, 105_000) is None


def test_ours_are_the_ten_evaluations_of_the_official_code_and_no_others():
    """It evaluates at 15,000, 25,000 ... 105,000; the mean of a line is that of its middle."""
    for every in (2_500, 5_000):
        returns = {step: float(step) for step in range(every, 205_000, every)}
        assert benchmark.return_at(returns, 105_000) == 60_000, every
    denser = {step: float(step) for step in (10_000, 20_000, *range(30_000, 110_000, 5_000))}
    ours = 10_000, 20_000, *range(35_000, 115_000, 10_000)
    assert benchmark.return_at(denser, 105_000) == np.mean(ours)
    sparse = {step: float(step) for step in range(20_000, 120_000, 20_000)}
    assert benchmark.return_at(sparse, 105_000) == 60_000, "no evaluation counts twice"


def test_the_command_compares_at_published_steps_and_with_the_papers_settings_only(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"balance{seed}", "task=cartpole-balance", seed=seed, source=seed)
    write_run(tmp_path / "walk", "task=walker-walk", factor=0.5)
    write_run(tmp_path / "short", "task=cheetah-run", last=60_000)
    write_run(tmp_path / "other", "task=walker-stand", "optimization.horizon=10")
    write_run(tmp_path / "states", "task=walker-run", "env.from_pixels=false")
    rows, done = run_benchmark(tmp_path)
    balance, walk = rows
    three = np.mean(returns_of("cartpole", "balance")[1_005_000][:3])
    assert balance[:3] == ["cartpole balance", "1,005,000", f"{three:.0f} (3 seeds)"]
    assert balance[-1] == "**consistent**"
    assert walk[0] == "walker walk" and "(single run)" in walk[2] and walk[-1] == "**below**"
    for reason in (
        "cheetah run: no seed, or not every one, can be compared at a published step",
        "walker stand: not the settings of config.yaml (optimization.horizon)",
        "walker run: not the settings of config.yaml (env.from_pixels)",
    ):
        assert f"left out: {reason}" in done.stderr
    rows, _ = run_benchmark(tmp_path / "walk", "--all")
    assert [row[1] for row in rows[:2]] == ["105,000", "205,000"] and len(rows) == 10
    rows, done = run_benchmark(tmp_path / "short")
    assert not rows and "can be compared at a published step yet" in done.stdout
