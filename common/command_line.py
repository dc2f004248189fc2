"""What a command line says of a whole run: its task, its name, the run that it goes on with."""

import contextlib
import hashlib
import re
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from common.directory import CONFIG_FILE, read_config
from common.errors import UserError
from common.keys import changes_learning, flatten

IN_EVERY_NAME = ("env.name", "env.task", "seed")
LONGEST = 60  # characters of all that the command line changes, in a run's name
PLAIN = re.compile(r"[\w./:-]+")  # what needs no quotes, neither for Hydra nor for a shell


def register_resolvers():
    """Lets YAML say `${task_of:...}` and `${run_name:...}`."""
    OmegaConf.register_new_resolver("task_of", task_of, replace=True)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def typed_overrides():
    """{key: value} as typed on the command line; of one job, if it is a sweep."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}


# A run's task and name


def task_of(name, task):
    """`walker-walk` for the domain `walker` and its task `walk`; the name if there is no task."""
    return f"{name}-{task}" if task else str(name)


def split_task(cfg):
    """Sets `env.name` and `env.task`, if `task` was given in one word."""
    typed = typed_overrides()
    if OmegaConf.is_interpolation(cfg, "task") or not isinstance(cfg.task, str):
        return  # what is no text at all is refused with all other wrong values
    for key in ("env.name", "env.task"):
        if key in typed:
            raise UserError(f"task={cfg.task} and {key}={typed[key]}: give one of them")
    name, _, task = cfg.task.partition("-")
    if cfg.env.backend == "gymnasium":  # its names have hyphens of their own: HalfCheetah-v5
        name, task = cfg.task, ""
    cfg.env.name, cfg.env.task = name, task


def run_name(task, seed):
    """`walker-walk-seed0`, and what the command line changes of what is learned: `-horizon3`.

    So two runs that learn different things have two directories. What a path or the dashboard
    would read in its own way is an underscore. Many changes are eight digits that name them all.
    """
    typed = typed_overrides()
    keys = [key for key in sorted(typed) if changes_learning(key) and key not in IN_EVERY_NAME]
    changes = "-".join(f"{key.split('.')[-1]}{typed[key]}" for key in keys)
    if len(changes) > LONGEST:
        changes = hashlib.sha256(changes.encode()).hexdigest()[:8]
    words = (word for word in (str(task), f"seed{seed}", changes) if word)
    return re.sub(r"[^\w.+-]+", "_", "-".join(words))


# Going on


def values_of_run(values):
    """The configuration of the run in `values["resume"]`, under what was typed beside it."""
    path, typed = Path(str(values["resume"])), typed_overrides()
    if not (path / CONFIG_FILE).exists():
        raise UserError(f"resume={path} holds no run: `ls {path.parent}` shows what there is")
    for key in ("run_dir", "checkpoint.resume"):
        if key in typed:
            raise UserError(f"resume={path} already says {key}: leave out {key}={typed[key]}")
    if "task" in typed:
        typed |= {"env.name": None, "env.task": None}
    saved = flatten(read_config(path / CONFIG_FILE))
    for key, value in saved.items():
        section = values
        *names, name = key.split(".")
        for part in names:
            section = section.get(part, {})
        if name in section and key not in typed:
            section[name] = value
    return values | {"run_dir": str(path), "resume": str(path)}


def quoted_override(key, value):
    """`key=value` as it can be typed, whatever characters the value has."""
    value = str(value)
    if not PLAIN.fullmatch(value):
        value = "'" + value.replace("'", "\\'") + "'"
    return shlex.quote(f"{key}={value}")


# Jobs


def end_of_job(sentence):
    """What to raise when a job cannot go on: it ends the process, or one job of a sweep."""
    # What was said before comes first, also in a file that takes both, as a log of Slurm does.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if not sweep:
        return SystemExit(sentence)
    print(sentence, file=sys.stderr)  # now, for Hydra shows the first of them after the last job
    return CompactHydraException(sentence)
