"""What a run does on a GPU, tried on a machine without one: see cuda_path.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_fake_gpu import build_library, find_compiler

from small_runs import ROOT

HERE = Path(__file__).parent


@pytest.mark.skipif(find_compiler() is None, reason="a fake GPU needs a C++ compiler")
def test_the_cuda_path_runs_on_a_gpu_that_computes_nothing(tmp_path):
    """In a process of its own, whose PyTorch believes in a GPU for good."""
    library = build_library(tmp_path)
    command = [sys.executable, HERE / "on_fake_gpu.py", library, HERE / "cuda_path.py", "-q"]
    # Not those of a worker of pytest-xdist.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
