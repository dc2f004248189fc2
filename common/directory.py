"""The directory of a run: held by one process, never written over, as before if a start fails."""

import fcntl
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from common.errors import UserError
from common.files import atomic_write
from common.keys import MAY_CHANGE, flatten


class RunDirectory:
    """The directory `cfg.run_dir`. It holds a run as soon as there is a config.yaml in it."""

    def __init__(self, cfg):
        self.cfg, self.path = cfg, Path(cfg.run_dir)
        self.config_file = self.path / "config.yaml"
        self.lock, self.created, self.set_aside = None, False, None

    def find_run(self):
        """Whether there is a run to go on with; it is then locked, and of this configuration."""
        if not self.config_file.exists():
            return False
        wanted = self.cfg.checkpoint
        if not (wanted.resume or wanted.overwrite):
            raise UserError(
                f"{self.path} holds a run: checkpoint.resume=true goes on with it,"
                " checkpoint.overwrite=true sets it aside, or choose another name=..."
            )
        if wanted.resume:
            self.take_lock()
            self.check_config(OmegaConf.to_container(OmegaConf.load(self.config_file)))
        return wanted.resume

    def check_config(self, saved):
        """`UserError` if the run in the directory was started with another configuration."""
        before, now = flatten(saved), flatten(self.cfg)
        differences = [
            f"{key}={before.get(key)} (now {now.get(key)})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_CHANGE)
        ]
        if differences:
            raise UserError(
                f"{self.path} holds a run with {', '.join(differences)}: go back to"
                " that, or choose another name=..."
            )

    def take_lock(self):
        """Holds the directory for as long as this process lives."""
        self.lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.path} is in use by another process: wait for its end, or"
                " choose another name=..."
            ) from None
        for left in (self.path / "checkpoints").glob(".*"):  # of a save that was killed
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def claim(self):
        """Makes the directory of a new run; an old one that is not wanted is set aside."""
        if self.lock:
            return
        if self.config_file.exists():
            names = (f"{self.path.name}.old{number}" for number in range(1, 1000))
            asides = (self.path.with_name(name) for name in names)
            self.set_aside = next(path for path in asides if not path.exists())
            self.path.rename(self.set_aside)
        self.created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self.take_lock()
        if any(path.stat().st_size for path in self.path.glob("*.jsonl")):
            raise UserError(
                f"{self.path} holds metrics but no config.yaml: put it back, or choose"
                " another name=..."
            )

    def remove_traces(self):
        """Removes what a new run that could not start has made, and puts an old one back."""
        if self.created:
            shutil.rmtree(self.path)
        if self.set_aside:
            self.set_aside.rename(self.path)

    def write_config(self):
        """Makes it a run, once everything else is there."""
        atomic_write(self.config_file, OmegaConf.to_yaml(self.cfg.model_dump()))
        if self.set_aside:
            print(f"the run that was in {self.path} is now in {self.set_aside}")

    def unlock(self):
        """Lets other processes use the directory."""
        if self.lock:
            self.lock.close()
