"""What every test shares. The golden arrays are what the official TF2 code computed."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # two tests run side by side: more threads would only fight

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("DREAMER_GOLDEN", ROOT / "tests" / "golden"))


@pytest.fixture(autouse=True)
def deterministic():
    """The same random numbers for every test, whatever ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    """Runs a test in both precisions; see the tolerances in golden_weights.py."""
    return request.param


@pytest.fixture(scope="session")
def golden():
    """golden(file, dtype): all arrays of one golden file, floating-point ones in `dtype`."""

    def load(name, dtype=torch.float64):
        arrays = {key: torch.from_numpy(a) for key, a in np.load(GOLDEN / f"{name}.npz").items()}
        return {k: a.to(dtype) if a.is_floating_point() else a for k, a in arrays.items()}

    return load


@pytest.fixture(scope="session", autouse=True)
def opengl():
    """One process runs tests from pixels and from states: it needs OpenGL before dm_control."""
    from common.opengl import select_gl

    select_gl()
    import dm_control.suite  # noqa: F401
