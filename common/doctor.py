"""Checks all that a run needs, and measures its speed, before anything expensive starts."""

import contextlib
import io
import os
import tempfile
from pathlib import Path

import torch

from common.dashboard import check_wandb, start_wandb
from common.device import resolve_device, resolve_precision, say_if_crowded
from common.directory import RunDirectory
from common.envs import IMAGE
from common.errors import can_be_mended, user_message
from common.files import read_jsonl
from common.memory import check_memory
from common.opengl import check_picture, select_gl
from common.report import check_versions
from common.rows import check_space, replay_layout, row_bytes


def nearest_directory(path):
    """`path`, or the first directory above it that exists."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


class Doctor:
    """One method a check; each returns what it found, or raises `UserError`.

    Args:
        cfg: the whole configuration.
        make_env: a function of `cfg` that gives an environment.
        train: Algorithm 1.
    """

    def __init__(self, cfg, make_env, train):
        self.cfg, self.make_env, self.train = cfg, make_env, train

    def examine(self):
        """Prints a table of all checks; True if all is well."""
        checks = {
            "versions": check_versions,
            "device": self.check_device,
            "memory": self.check_memory,
            "precision": self.check_precision,
            "OpenGL": self.check_opengl,
            "task": self.check_task,
            "run_dir": self.check_run_dir,
            "disk": self.check_disk,
            "wandb": self.check_dashboard,
            "speed": self.measure_speed,
        }
        fine = True
        for name, check in checks.items():
            try:
                print(f"ok      {name:<10} {check()}", flush=True)
            except Exception as error:  # a check that fails must not hide the next ones
                reason = user_message(error) if can_be_mended(error) else repr(error)
                print(f"problem {name:<10} {' '.join(reason.split())}", flush=True)
                fine = False
        return fine

    def check_device(self):
        """Its name, and the threads of PyTorch."""
        device = resolve_device(self.cfg.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        crowded = say_if_crowded() if device.type == "cpu" else ""
        threads = f"{device}: {name}, {torch.get_num_threads()} threads"
        return f"{threads}; {crowded}" if crowded else threads

    def check_precision(self):
        """In what networks compute."""
        device = resolve_device(self.cfg.device)
        return str(resolve_precision(self.cfg.optimization.autocast, device))

    def check_memory(self):
        """Whether the sizes can fit."""
        return check_memory(self.cfg, resolve_device(self.cfg.device))

    def check_opengl(self):
        """Whether something renders."""
        if not self.cfg.env.from_pixels:
            return "not needed: env.from_pixels=false"
        select_gl()
        return f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}"

    def check_task(self):
        """Whether the task can be made, and its images show anything."""
        cfg = self.cfg.model_copy(deep=True)
        cfg.env.n_parallel_envs = 1
        with contextlib.closing(self.make_env(cfg)) as env:
            observation = env.reset()["observation"]
            if cfg.env.from_pixels:
                return check_picture(observation)
            return f"{observation.shape[-1]} numbers, {env.action_spec.shape[-1]} actions"

    def check_run_dir(self):
        """Whether a start would find a directory that it can use."""
        directory = RunDirectory(self.cfg)
        try:
            goes_on = directory.find_run()
            with tempfile.TemporaryDirectory(dir=nearest_directory(self.cfg.run_dir)):
                return f"{self.cfg.run_dir}, {'goes on' if goes_on else 'a new run'}"
        finally:
            directory.unlock()

    def check_disk(self):
        """Whether the replay has room."""
        # A guess from above: the environment, which knows, may be what does not work.
        shape = IMAGE if self.cfg.env.from_pixels else (128,)
        rows, layout = replay_layout(self.cfg, shape, action_dim=32)
        needed = rows * row_bytes(layout)
        place = self.cfg.replay_buffer.directory or self.cfg.run_dir
        free = check_space(nearest_directory(place), needed)
        return f"replay {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"

    def check_dashboard(self):
        """Whether wandb answers, if it is asked to."""
        check_wandb(self.cfg)
        if self.cfg.logger.mode == "online":
            with tempfile.TemporaryDirectory() as folder:
                start_wandb(self.cfg, folder, None).finish()
        return f"logger.mode={self.cfg.logger.mode}"

    def measure_speed(self):
        """A sentence about the time that a run would take, from one episode and five updates."""
        cfg = self.cfg
        with tempfile.TemporaryDirectory() as folder:
            trial = cfg.model_copy(deep=True)
            trial.run_dir, trial.doctor = f"{folder}/run", False
            trial.logger.mode, trial.logger.progress, trial.logger.video = "disabled", False, False
            trial.optimization.pretrain, trial.eval.every = 5, 0
            steps = cfg.env.n_parallel_envs * cfg.env.time_limit
            trial.collector.random_steps = trial.collector.total_steps = steps
            with contextlib.redirect_stdout(io.StringIO()):
                self.train(trial)
            row = read_jsonl(Path(folder, "run", "throughput.jsonl"))[-1]
        steps_per_second = row["throughput/environment_steps_per_second"]
        updates_per_second = row["throughput/updates_per_second"]
        seconds_per_step = 1 / steps_per_second
        seconds_per_step += cfg.optimization.train_ratio / updates_per_second
        hours = cfg.collector.total_steps * seconds_per_step / 3600
        return (
            f"{steps_per_second:.0f} environment steps/s, {updates_per_second:.2f} updates/s:"
            f" about {hours:.1f} hours for {cfg.collector.total_steps:,} steps"
        )
