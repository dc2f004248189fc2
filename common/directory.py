"""The directory of a run: held by one process, never written over, as before if a start fails."""

import shutil
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError
from common.files import atomic_write
from common.keys import changes_learning, flatten
from common.lock import DirectoryLock

LEFTOVERS = ".checkpoint-*.*-" + 32 * "[0-9a-f]"  # TorchRL's names: stage, archive, backup, delete


CONFIG_FILE = "config.yaml"


def read_config(path):
    """What the config.yaml of a run says; `UserError` if it is damaged."""
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        saved, reason = None, str(error).splitlines()[0]
    else:
        reason = "it is no table of keys"
    if not isinstance(saved, dict):
        raise UserError(
            f"{path} is damaged ({reason}): restore it from a backup, or from the"
            " configuration in the dashboard; the checkpoints are left alone"
        )
    return saved


class RunDirectory:
    """The directory `cfg.run_dir`. It holds a run as soon as there is a config.yaml in it."""

    def __init__(self, cfg):
        self.cfg, self.path = cfg, Path(cfg.run_dir)
        self.config_file = self.path / CONFIG_FILE
        self.lock, self.created, self.set_aside = DirectoryLock(self.path), False, None

    def find_run(self):
        """Locks the directory, then says whether it holds a run of this configuration."""
        wanted = self.cfg.checkpoint
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is not a directory: choose another run_dir")
        if wanted.lock:
            self.lock.take()
        if not self.config_file.exists():
            return False
        if not (wanted.resume or wanted.overwrite):
            raise UserError(
                f"{self.path} holds a run: checkpoint.resume=true goes on with it,"
                " checkpoint.overwrite=true sets it aside, or choose another name=..."
            )
        if wanted.resume:
            self.check_config(read_config(self.config_file))
            self.remove_leftovers()
        return wanted.resume

    def check_config(self, saved):
        """`UserError` if the run in the directory was started with another configuration."""
        before, now = flatten(saved), flatten(self.cfg)
        differences = [
            f"{key}={before.get(key)} (now {now.get(key)})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and changes_learning(key)
        ]
        if differences:
            raise UserError(
                f"{self.path} holds a run with {', '.join(differences)}: go back to"
                " that, or choose another name=..."
            )

    def remove_leftovers(self):
        """Deletes what a save left that was killed; the user's own hidden files stay."""
        for left in (self.path / "checkpoints").glob(LEFTOVERS):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()

    def claim(self):
        """Makes the directory of a new run; an old one that is not wanted is set aside."""
        if self.config_file.exists() and self.cfg.checkpoint.resume:
            return
        if self.config_file.exists():
            names = (f"{self.path.name}.old{number}" for number in range(1, 1000))
            asides = (self.path.with_name(name) for name in names)
            self.set_aside = next(path for path in asides if not path.exists())
            self.path.rename(self.set_aside)
        created = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self.created = created
        metrics = any(path.stat().st_size for path in self.path.glob("*.jsonl"))
        # That of step 0 is what a start left that was killed in the middle.
        checkpoints = any(self.path.glob("checkpoints/checkpoint-*[1-9]*.torchrl"))
        if metrics or checkpoints:
            raise UserError(
                f"{self.path} holds {'metrics' if metrics else 'checkpoints'} but no config.yaml:"
                " put it back, or choose another name=..."
            )

    def remove_traces(self):
        """Removes what a new run that could not start has made, and puts an old one back."""
        if self.created:
            rows = self.path / "replay"
            if rows.is_symlink():  # made on another disk, by this start
                shutil.rmtree(rows.resolve())
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
        self.lock.release()
