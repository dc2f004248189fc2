"""A start that fails leaves nothing behind: no process, no file that looks like a run."""

import contextlib
import multiprocessing
import os

import pytest

import common.dashboard
import dreamer
import dreamer_utils as utils
from common.errors import UserError
from small_runs import SMALL, configure


def test_a_dashboard_that_does_not_answer_leaves_no_process_and_no_run(tmp_path, monkeypatch):
    """wandb starts last, when environments in processes of their own are there already."""
    workers, here = [], tmp_path / "run"

    def fail(*args):
        assert (here / "replay").is_dir()
        workers.extend(multiprocessing.active_children())
        raise UserError("wandb does not answer")

    monkeypatch.setattr(common.dashboard, "start_wandb", fail)
    flags = "env.n_parallel_envs=2", "logger.mode=offline"
    before = multiprocessing.active_children()
    # Kept, the error keeps all that was built: nothing ends only because nobody needs it.
    with pytest.raises(UserError) as kept:
        dreamer.train(configure(*SMALL, f"run_dir={here}", *flags))
    workers = [worker for worker in workers if worker not in before]
    assert len(workers) == 2
    assert not set(workers) & set(multiprocessing.active_children())
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)  # signal 0 only asks whether there is such a process
    assert list(tmp_path.iterdir()) == []
    assert str(kept.value) == "wandb does not answer"


def test_copies_of_a_task_are_as_quiet_as_one(capfd):
    """MuJoCo warns of the cheetah's file, which is the suite's affair."""
    words = "env.name=cheetah", "env.task=run", "env.from_pixels=false", "env.n_parallel_envs=2"
    with contextlib.closing(utils.make_env(configure(*words))) as env:
        env.reset()
    assert "WARNING" not in capfd.readouterr().err
