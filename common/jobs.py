"""The Slurm jobs of a sweep: which there are, and where their logs are."""

import os
import shutil

from hydra.core.utils import filter_overrides
from hydra.experimental.callback import Callback


class ShowSlurmJobs(Callback):
    """Prints the id and the log of every Slurm job, which neither Hydra nor submitit does."""

    def on_multirun_start(self, config, **_):
        """Before the jobs of a sweep are submitted."""
        if not config.hydra.launcher._target_.endswith(".SlurmLauncher"):
            return
        if shutil.which("sbatch") is None:
            raise SystemExit(
                "error: Slurm has no sbatch here: use hydra/launcher=box, or a login node"
            )
        import submitit
        from submitit.core.utils import FailedJobError

        submit = submitit.AutoExecutor.map_array

        def submit_and_show(executor, launcher, overrides, *others):
            """Submitit's own, and then prints the ids of the jobs; exits if Slurm refuses them."""
            try:
                jobs = submit(executor, launcher, overrides, *others)
            except FailedJobError as error:
                raise SystemExit(
                    f"error: Slurm takes no job ({' '.join(str(error).split())}): change what"
                    " launcher_slurm.yaml asks for with hydra.launcher.KEY=..., or try later"
                ) from None
            print(describe_jobs(jobs, overrides), flush=True)
            return jobs

        submitit.AutoExecutor.map_array = submit_and_show


def describe_jobs(jobs, overrides):
    """A line for each job, with what distinguishes it, and how to watch and end all of them.

    Args:
        jobs: of submitit.
        overrides: the words of each job.
    """
    words = [filter_overrides(each) for each in overrides]
    shared = set.intersection(*map(set, words)) if len(words) > 1 else set()
    lines = [
        f"{len(jobs)} Slurm job(s): `squeue --me` shows them, `scancel"
        f" {jobs[0].job_id.split('_')[0]}` ends them; Ctrl-C here does not"
    ]
    for job, mine in zip(jobs, words, strict=True):
        different = " ".join(word for word in mine if word not in shared)
        lines.append(f"job {job.job_id}: {different}, log {os.path.relpath(job.paths.stdout)}")
    return "\n".join(lines)
