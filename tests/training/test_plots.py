"""The scripts that draw and tabulate finished runs."""

import json
import subprocess
import sys

from matplotlib.image import imread

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


def test_the_table_of_results_comes_from_the_cards(watched):
    command = [sys.executable, "benchmarks/results.py", str(watched[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| run | cartpole balance | 240 | 6 |" in done.stdout.splitlines()[-1]
