"""A twentieth of the attack: `python -m pytest -m faults` runs it; it takes minutes."""

import os
import subprocess
import sys

import pytest
from attack_children import Counts
from attack_lines import all_lines, wrong_values

from common.keys import flatten
from small_runs import ROOT, configure


def test_the_attack_gives_every_key_wrong_values():
    keys = {words.split("=")[0] for words, _ in wrong_values()}
    assert keys == set(flatten(configure()))
    assert len(all_lines()) >= 200


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_twentieth_of_the_attack_destroys_nothing(tmp_path):
    script = ROOT / "tests" / "robustness" / "attack.py"
    command = [sys.executable, str(script), str(tmp_path / "attack"), "--quick"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-5:] == [f"{kind}: 0" for kind in Counts.KINDS]
