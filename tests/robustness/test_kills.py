"""kill -9 at any moment loses nothing: the run that goes on ends with the same bits.

`python -m pytest -m faults` runs these; they take minutes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fingerprint import fingerprint
from small_runs import ROOT, SMALL, small

pytestmark = pytest.mark.faults


@pytest.mark.timeout(1200)
def test_fifty_kills_leave_no_trace(tmp_path):
    script = ROOT / "tests" / "robustness" / "kill_runs.py"
    command = [sys.executable, str(script), str(tmp_path), "50", "0"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["save"] + counts["episode"] >= 20
    assert counts["random"] + counts["save"] + counts["episode"] == 50
    assert counts["finished"] >= 1 and counts["mismatches"] == 0


def pid_of_the_job(folder):
    """The process that trains: the only child of the one that submitit named its files after."""
    [submitted] = folder.glob("*_submitted.pkl")
    controller = submitted.name.removesuffix("_submitted.pkl")
    [child] = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    return int(child)


def test_submitit_puts_an_interrupted_job_into_the_queue_again(tmp_path):
    """`hydra/launcher=submitit_local`: USR2, save, requeue, and the same bits at the end."""
    flags = "collector.total_steps=1200", "optimization.train_ratio=0.1", "checkpoint.every=400"
    command = [
        *(sys.executable, "dreamer.py", "-m", *SMALL, *flags),
        f"run_dir={tmp_path / 'run'}",
        "hydra/launcher=submitit_local",
        f"hydra.launcher.submitit_folder={tmp_path / 'submitit'}",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        "seed=0",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        rows, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
        while not (rows.exists() and rows.read_text().count("\n") > 6):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.kill(pid_of_the_job(tmp_path / "submitit"), signal.SIGUSR2)
        output, _ = process.communicate(timeout=200)
    logs = "".join(path.read_text() for path in (tmp_path / "submitit").rglob("*log.*"))
    assert process.returncode == 0, output + logs
    assert "the same command goes on" in logs and "going on at step" in logs, logs
    small(tmp_path / "whole", *flags)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
