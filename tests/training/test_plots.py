"""The scripts that draw and tabulate finished runs."""

import json
import subprocess
import sys

from matplotlib.image import imread

import random_returns
from small_runs import ROOT, small
from watched_run import PIXELS


def test_plot_draws_runs_over_the_published_curves(watched, tmp_path):
    small(tmp_path / "seed1", *PIXELS, "seed=1")
    small(tmp_path / "swing", *PIXELS, "env.task=swingup")
    runs = [str(watched[0]), str(tmp_path / "seed1"), str(tmp_path / "swing")]
    out = tmp_path / "curves.png"
    command = [sys.executable, "benchmarks/plot.py", *runs, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = json.loads((watched[0] / "metrics.jsonl").read_text().splitlines()[-1])
    other = json.loads((tmp_path / "seed1" / "metrics.jsonl").read_text().splitlines()[-1])
    mean = (first["eval/return"] + other["eval/return"]) / 2
    assert f"| cartpole balance | 240 | {mean:.0f} | 136 |" in done.stdout
    assert "| cartpole swingup | 240 |" in done.stdout
    assert imread(out).std() > 0.05


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
