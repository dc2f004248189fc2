"""What the tests of training share."""

import pytest

from small_runs import small
from watched_run import WATCHED


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """The watched run, made once: its directory, its weights, its metrics."""
    run = tmp_path_factory.mktemp("watched") / "run"
    return run, *small(run, *WATCHED)
