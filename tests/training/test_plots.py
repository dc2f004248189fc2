"""The scripts that draw and tabulate finished runs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from matplotlib.image import imread
from omegaconf import OmegaConf

import honesty
import random_returns
import run_groups
from common.files import read_jsonl
from common.plots import published_curve, published_metrics
from small_runs import ROOT, configure, small
from watched_run import PIXELS


def plot(*words):
    """What `python benchmarks/plot.py WORDS...` says: its table, and what it left out."""
    command = [sys.executable, "benchmarks/plot.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]], done


def copy_of(run, path, returns, **changes):
    """A run with other evaluation returns {step: return} and other keys of its configuration."""
    path.mkdir(parents=True)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    counters = {"agent_steps": 0, "updates": 0}
    rows = [
        counters | {"environment_steps": step, "eval/return": value}
        for step, value in returns.items()
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plot_takes_folders_and_puts_seeds_and_settings_into_groups(watched, tmp_path):
    runs, out = tmp_path / "runs", [tmp_path / "curves.png", tmp_path / "curves.pdf"]
    for seed, value in enumerate((100.0, 200.0, 300.0, 800.0)):
        copy_of(watched[0], runs / f"a{seed}", {80: 50.0, 160: value}, seed=seed)
    longer = {"optimization__horizon": 30, "logger__every": 7}
    for seed in range(2):
        copy_of(watched[0], runs / f"b{seed}", {160: 10.0 * seed}, seed=seed, **longer)
    copy_of(watched[0], runs / "swing", {160: 70.0}, env__task="swingup")
    small(runs / "no_evaluation", *PIXELS, "eval.every=0")
    twin = copy_of(watched[0], tmp_path / "twin", {80: 50.0}, seed=2)
    rows, done = plot(runs, twin, "--out", *out)
    horizon = yaml.safe_load((watched[0] / "config.yaml").read_text())["optimization"]["horizon"]
    assert rows[0][:5] == ["cartpole balance", f"horizon={horizon}", "160", "350", "250"]
    low, high = map(int, rows[0][5].split(" to "))
    assert 100 < low < 250 and 450 < high < 800 and rows[0][6] == "4"
    assert rows[1] == ["cartpole balance", "horizon=30", "160", "5", "5", "0 to 10", "2"]
    swingup = ["cartpole swingup", f"horizon={horizon}", "160", "70", "70", "-", "1"]
    assert rows[2] == swingup
    assert rows[3][:4] == ["all 2 tasks", f"horizon={horizon}", "the last", "210"]
    assert f"left out: {runs / 'no_evaluation'} has no evaluation yet" in done.stderr
    assert f"left out: {twin} is the same run as {runs / 'a2'}" in done.stderr
    assert imread(out[0]).std() > 0.05 and out[1].read_bytes().startswith(b"%PDF")


def test_plot_takes_all_that_a_sweep_leaves(watched, tmp_path):
    """`plot.py runs/*` meets Hydra's multirun.yaml and the logs of jobs."""
    (tmp_path / "multirun.yaml").write_text("hydra: {}\n")
    (tmp_path / "run").symlink_to(watched[0])
    [group] = run_groups.read_groups(sorted(tmp_path.iterdir()), say=print)
    assert len(group.runs) == 1


def test_plot_never_makes_up_an_evaluation(watched, tmp_path):
    """A mean is drawn where every seed was evaluated, and nowhere else."""
    first = copy_of(watched[0], tmp_path / "a", {10: 1.0, 20: 2.0, 30: 3.0}, seed=0)
    other = copy_of(watched[0], tmp_path / "b", {10: 3.0, 25: 50.0}, seed=1)
    [group] = run_groups.read_groups([first, other], say=print)
    assert group.steps == [10] and group.returns.tolist() == [[1.0], [3.0]]
    apart = copy_of(watched[0], tmp_path / "c", {15: 3.0}, seed=2)
    said = []
    assert run_groups.read_groups([first, apart], say=said.append) == []
    assert len(said) == 1 and "no evaluation at a same step" in said[0]


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    """Of seeds drawn at random, stratified over two tasks with very different scores."""
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        strata = generator.normal(100, 10, 20), generator.normal(900, 50, 20)
        low, high = run_groups.bootstrap_interval(strata, draws=400)
        inside += low <= 500 <= high
    assert 0.88 < inside / 200 < 0.99


def test_published_points_are_logged_only_where_they_are_and_for_their_settings():
    env = configure("task=cartpole-balance").env
    curve = published_curve(env)
    near = published_metrics(env, curve, 100_000)
    assert near == published_metrics(env, curve, 110_000) == published_metrics(env, curve, 105_000)
    assert near["eval/published_mean"] == curve[1, 1]
    assert published_metrics(env, curve, 50_000) == published_metrics(env, curve, 10**8) == {}
    for word in ("env.from_pixels=false", "env.action_repeat=4", "env.time_limit=500"):
        other = configure("task=cartpole-balance", word).env
        assert published_metrics(other, curve, 105_000) == {}


def test_seeds_of_one_task_become_one_row_of_the_table_of_results(watched, tmp_path):
    card = json.loads((watched[0] / "run.json").read_text())
    for seed, value in enumerate((300.0, 900.0)):
        (tmp_path / "mine" / f"seed{seed}").mkdir(parents=True)
        seeds = card | {"seed": seed, "eval_return": value}
        (tmp_path / "mine" / f"seed{seed}" / "run.json").write_text(json.dumps(seeds))
    command = [sys.executable, "benchmarks/results.py", str(tmp_path / "mine"), str(watched[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seeds, single = done.stdout.splitlines()[-2:]
    assert seeds.startswith("| mine | cartpole balance | 240 | 6 |")
    assert "| 300, 900 | 600 | 300 |" in seeds
    assert single.startswith("| run | cartpole balance | 240 | 6 |") and "single seed" in single


def test_a_table_goes_between_its_marks_and_nowhere_else(watched, tmp_path):
    page = tmp_path / "page.md"
    marks = "<!-- results: python a -->\n{}\n<!-- end of results -->"
    around = "before\n<!-- verdict: python b -->\nkept\n<!-- end of verdict -->\n{}\nafter\n"
    page.write_text(around.format(marks.format("old\nlines")))
    command = [sys.executable, "benchmarks/results.py", str(watched[0]), "--into", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = done.stdout.strip()
    assert page.read_text() == around.format(marks.format(table)) and "| run |" in table
    page.write_text("no marks\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "needs these two lines once" in done.stderr
    assert page.read_text() == "no marks\n"


def test_the_panel_of_an_earlier_step_is_drawn_again(watched, tmp_path):
    command = [sys.executable, "benchmarks/panels.py", str(watched[0]), "240", "100", "--out"]
    done = subprocess.run(
        [*command, str(tmp_path / "p")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p_240.png", "p_80.png"]
    last, again = imread(watched[0] / "panel.png"), imread(tmp_path / "p_240.png")
    assert abs(last - again).mean() < 0.001  # the file holds five digits of each number
    early = imread(tmp_path / "p_80.png")
    assert early.shape == last.shape and abs(last - early).mean() > 0.01


def test_random_actions_are_measured_for_any_task(tmp_path, monkeypatch):
    monkeypatch.setattr(random_returns, "RANDOM", tmp_path / "random.json")
    monkeypatch.setattr(sys, "argv", ["", "pendulum swingup", "--episodes", "2"])
    random_returns.main()
    measured = json.loads((tmp_path / "random.json").read_text())
    returns = random_returns.random_returns("pendulum swingup", 2, 4)
    assert measured == {"pendulum swingup": round(sum(returns) / 2, 1)}
    assert len(returns) == 2 and 0 <= min(returns) <= max(returns) <= 1000


def test_beliefs_over_a_run_are_those_of_its_rows_and_become_a_picture(watched, tmp_path):
    run = watched[0]
    cfg = OmegaConf.load(run / "config.yaml")
    history, curves = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "curves.jsonl")
    found = honesty.beliefs(cfg, history, curves)
    evaluations = [row for row in history if "behavior/return_gap" in row]
    assert found["environment_steps"] == [row["environment_steps"] for row in evaluations]
    for number, (row, curve) in enumerate(zip(evaluations, curves, strict=True)):
        got = {name: column[number] for name, column in found.items()}
        gap, bias = row["behavior/return_gap"], row["behavior/value_bias"]
        # The file of curves holds five digits.
        assert got["imagined_return"] - got["real_return"] == pytest.approx(gap, abs=1e-3)
        assert got["value"] - got["true_value"] == pytest.approx(bias, abs=1e-3)
        H = cfg.optimization.horizon
        assert len(curve["reward_error"]) > H
        assert got["reward_error"] == pytest.approx(sum(curve["reward_error"][:H]) / H)
    command = [sys.executable, "benchmarks/honesty.py", str(run), "--out", str(tmp_path / "h.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert imread(tmp_path / "h.png").std() > 0.05
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    assert honesty.titles([run]) == ["cartpole balance, seed 0"]
    assert honesty.titles([run, other]) == [
        "cartpole balance, seed 0 (run)",
        "cartpole balance, seed 0 (other)",
    ]
    empty = [sys.executable, "benchmarks/honesty.py", str(tmp_path)]
    done = subprocess.run(empty, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "an evaluation of its beliefs" in done.stderr
