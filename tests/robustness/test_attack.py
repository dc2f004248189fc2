"""A tenth of the attack: `python -m pytest -m faults` runs it; it takes minutes."""

import os
import subprocess
import sys

import pytest
from attack_children import Counts

from small_runs import ROOT


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_tenth_of_the_attack_destroys_nothing(tmp_path):
    script = ROOT / "tests" / "robustness" / "attack.py"
    command = [sys.executable, str(script), str(tmp_path / "attack"), "--quick"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-5:] == [f"{kind}: 0" for kind in Counts.KINDS]
