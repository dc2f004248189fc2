"""What a user is told of the Slurm jobs of a sweep."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit

from common.jobs import ShowSlurmJobs, describe_jobs

SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def job(number):
    """A job of submitit, as far as it is looked at."""
    log = Path.cwd() / "runs" / ".submitit" / f"7_{number}" / f"7_{number}_0_log.out"
    return SimpleNamespace(job_id=f"7_{number}", paths=SimpleNamespace(stdout=log))


def test_each_job_has_a_line_with_its_id_what_it_changes_and_its_log():
    overrides = [["device=cpu", "seed=0", "hydra.x=1"], ["device=cpu", "seed=1", "hydra.x=1"]]
    head, *lines = describe_jobs([job(0), job(1)], overrides).splitlines()
    assert head.startswith("2 Slurm job(s): `squeue --me` shows them, `scancel 7` ends them")
    assert lines == [
        "job 7_0: seed=0, log runs/.submitit/7_0/7_0_0_log.out",
        "job 7_1: seed=1, log runs/.submitit/7_1/7_1_0_log.out",
    ]


@pytest.mark.parametrize(("target", "shown"), [(SLURM, True), ("BasicLauncher", False)])
def test_only_slurm_jobs_are_shown_when_they_are_submitted(monkeypatch, capsys, target, shown):
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/sbatch")
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda *_: [job(0)])
    launcher = SimpleNamespace(_target_=target)
    ShowSlurmJobs().on_multirun_start(SimpleNamespace(hydra=SimpleNamespace(launcher=launcher)))
    jobs = submitit.AutoExecutor.map_array(None, "launcher", [["seed=0"]], ["hydra.sweep.dir"])
    assert [each.job_id for each in jobs] == ["7_0"]
    assert ("job 7_0: seed=0, log" in capsys.readouterr().out) == shown


@pytest.mark.parametrize("path", [None, "/usr/bin/sbatch"])
def test_a_slurm_that_is_not_there_or_refuses_is_one_sentence(monkeypatch, path):
    def refuse(*_):
        raise submitit.core.utils.FailedJobError("sbatch: error: Unable to contact")

    monkeypatch.setattr("shutil.which", lambda _: path)
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", refuse)
    launcher = SimpleNamespace(_target_=SLURM)
    config = SimpleNamespace(hydra=SimpleNamespace(launcher=launcher))
    with pytest.raises(SystemExit, match="error: Slurm (has no sbatch|takes no job)"):
        ShowSlurmJobs().on_multirun_start(config)
        submitit.AutoExecutor.map_array(None, "launcher", [["seed=0"]])
