"""What the paper puts in its appendix: configuration, environments, networks, optimisation,
replay, evaluation, logging. Each part is TorchRL's own, set by its own knobs."""

import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import hashlib
import io
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, is_dataclass, make_dataclass
from importlib import metadata
from pathlib import Path
from unittest import mock

import dm_env
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tensordict import MemoryMappedTensor, TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModuleBase
from torch import nn
from tqdm import tqdm

with mock.patch.dict(os.environ, MUJOCO_GL="disabled"):  # else TorchRL loads OpenGL with mujoco
    from torchrl import checkpoint as checkpoints
    from torchrl import envs, modules
    from torchrl.collectors import Collector
    from torchrl.data import ReplayBuffer, SliceSampler, TensorStorage, Unbounded
    from torchrl.record.loggers.wandb import WandbLogger

for name in ("absl", "torchrl"):  # both warn of what is meant here
    logging.getLogger(name).setLevel(logging.ERROR)
IMAGE = (64, 64, 3)  # height, width, channels: the only size that the paper's convolutions take

# --- Configuration -------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake that one sentence explains and the user can mend; shown without a traceback."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
               errno.ENOTDIR, errno.EIO)  # fmt: skip

def explain(error):
    """One sentence about an error that the user can mend: a `UserError`, or a disk that is full,
    read-only, forbidden or failing. Any other is raised again, for it may be ours."""
    if isinstance(error, UserError):
        return error
    if error.errno not in DISK_ERRORS:
        raise error
    place = error.filename or "while writing to run_dir"
    return (f"{error.strerror or error} ({place}): free some space, or choose another run_dir;"
            " what was saved stays, the same command goes on")

def schema(name, values):
    """The dataclass that has the keys and the types of `values`; Hydra checks both against it.
    A name in this module lets a job on a cluster find it."""
    fields = [(key, schema(f"{name}_{key}", value) if isinstance(value, dict) else type(value))
              for key, value in values.items() if key not in ("defaults", "hydra")]
    globals()[name] = made = make_dataclass(name, fields, namespace={"__module__": __name__})
    return made

# Hydra gets the files by name: told to look in this directory, --help would walk all of .venv.
for path in Path(__file__).parent.glob("config*.yaml"):
    ConfigStore.instance().store(path.stem, OmegaConf.load(path))
DEFAULTS = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("config.yaml")))
ConfigStore.instance().store("schema", schema("Config", DEFAULTS))
CHOICES = {
    "env.backend": ("dm_control", "gymnasium"),
    "optimization.autocast": ("auto", "false", "true", "bfloat16", "float16"),
    "optimization.compile": ("auto", "false", "true", "reduce-overhead"),
    "logger.mode": ("offline", "online", "disabled", "dryrun"),
}
HIGHEST = {"optimization.gamma": 1, "optimization.lambda_": 1}
LOWEST = {"env.camera": -1, "replay_buffer.batch_length": 2, "optimization.horizon": 2} | {
    key: 0 for key in (
        "seed", "collector.exploration_noise", "eval.every", "optimization.pretrain",
        "optimization.train_ratio", "optimization.kl_scale", "optimization.free_nats",
        "optimization.gamma", "optimization.lambda_", "optimization.discount_scale")}

def quoted(words):
    """To Hydra, the comma of eval.dream_from=EPISODE,STEP would be a sweep, but for quotes."""
    return [re.sub(r"^(eval\.dream_from)=(\d+,\d+)$", r"\1='\2'", word) for word in words]

sys.argv[:] = quoted(sys.argv)

def load_config(cfg):
    """Turns Hydra's config into a dataclass; `UserError` names the first thing that is wrong."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    for key in "autocast", "compile":
        setattr(config.optimization, key, getattr(config.optimization, key).lower())
    for name, part in vars(config).items():
        for key, value in vars(part).items() if is_dataclass(part) else [("", part)]:
            check_value(f"{name}.{key}".strip("."), value)
    check_combinations(config)
    return config

def check_value(key, value):
    """Raises `UserError` if `value` is outside the choices or the range of its key."""
    if value not in CHOICES.get(key, (value,)):
        raise UserError(f"{key}={value}: choose one of {', '.join(CHOICES[key])}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = LOWEST.get(key), HIGHEST.get(key, sys.float_info.max)
        if not (value > 0 if low is None else low <= value) or not value <= high:
            words = "above 0" if low is None else f"of at least {low}"
            raise UserError(f"{key}={value}: give a number {words}, at most {high:g}")

def check_combinations(config):
    """Raises `UserError` where single values are fine but do not go together."""
    env, collector, replay = config.env, config.collector, config.replay_buffer
    evaluation = config.eval
    rows = env.time_limit // env.action_repeat + 1  # of an episode: its agent steps and the reset
    episodes = env.n_parallel_envs * env.time_limit
    rules = [
        (replay.batch_size % replay.batch_length == 0,
         f"replay_buffer.batch_size={replay.batch_size} (frames per update) must be a multiple of"
         f" replay_buffer.batch_length={replay.batch_length}"),
        (env.time_limit % env.action_repeat == 0,
         f"env.time_limit={env.time_limit} is no multiple of action_repeat={env.action_repeat}"),
        (replay.batch_length <= rows, "replay_buffer.batch_length is longer than an episode, which"
         f" has {rows} rows: lower it, or raise env.time_limit"),
        (collector.random_steps >= episodes, "collector.random_steps does not fill an episode of"
         f" every environment: raise it to {episodes}"),
        (collector.total_steps >= collector.random_steps, "collector.total_steps ends before"
         f" training starts: raise it above random_steps={collector.random_steps}"),
        (replay.capacity >= collector.random_steps, "replay_buffer.capacity cannot hold the"
         f" {collector.random_steps} steps of collector.random_steps: raise it"),
        (env.from_pixels or not (config.logger.video or evaluation.video or evaluation.dream_from),
         "films need env.from_pixels=true, a state vector makes none: leave out logger.video,"
         " eval.video and eval.dream_from"),
        (evaluation.checkpoint or not (evaluation.video or evaluation.dream_from),
         "eval.video and eval.dream_from need eval.checkpoint=...; films of training come with"
         " logger.video=true"),
        (re.fullmatch(r"(\d+,\d+)?", evaluation.dream_from),
         f"eval.dream_from={evaluation.dream_from}: give EPISODE,STEP, e.g. 1,200"),
    ]
    for fine, sentence in rules:
        if not fine:
            raise UserError(sentence)

# --- Checkpoints ---------------------------------------------------------------------------------
MAY_CHANGE = ("name", "run_dir", "device", "doctor", "collector.total_steps", "eval.",
              "logger.", "checkpoint.")  # fmt: skip

class DamageError(Exception):
    """A checkpoint or its replay is not what was saved."""

def write(path, save, value):
    """Calls save(value, file) so that `path` is as before or complete, also after a kill."""
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("wb") as file:
        save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)

def write_text(path, text):
    """`write` for text."""
    write(path, lambda value, file: file.write(value), text.encode())

def flat(config, prefix=""):
    """{dotted key: value} of nested dictionaries."""
    pairs = [(f"{prefix}{key}", value) for key, value in config.items()]
    nested = [flat(v, f"{k}.") if isinstance(v, dict) else {k: v} for k, v in pairs]
    return {key: value for part in nested for key, value in part.items()}

class RunDirectory:
    """The directory of one run, claimed by one process, with its checkpoints. `resumes` says
    whether it holds this run already; nothing is written before `claim`."""

    def __init__(self, cfg):
        self.path, self.cfg, self.config = Path(cfg.run_dir), cfg, flat(asdict(cfg))
        self.lock, saved = None, self.path / "config.yaml"
        self.resumes = saved.exists() and cfg.checkpoint.resume
        if saved.exists() and not (cfg.checkpoint.resume or cfg.checkpoint.overwrite):
            raise UserError(f"{self.path} holds a run: checkpoint.resume=true goes on with it,"
                            " checkpoint.overwrite=true sets it aside, or choose another name=...")
        if self.resumes:
            self.claim()
            before = flat(OmegaConf.to_container(OmegaConf.load(saved)))
            differ = [f"{key}={before.get(key)} (now {self.config.get(key)})"
                      for key in sorted(before.keys() | self.config.keys())
                      if before.get(key) != self.config.get(key)
                      and not key.startswith(MAY_CHANGE)]
            if differ:
                raise UserError(f"{self.path} holds a run with {', '.join(differ)}: go back to"
                                " that, or choose another name=...")

    def claim(self):
        """Makes the directory, and locks it for as long as this process lives; an earlier run that
        is not wanted is set aside, not deleted."""
        if self.lock:
            return
        if (self.path / "config.yaml").exists() and not self.resumes:
            asides = (self.path.with_name(f"{self.path.name}.old{i}") for i in range(1, 1000))
            aside = next(path for path in asides if not path.exists())
            print(f"the run in {self.path} is now in {self.path.rename(aside)}")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.path} is in use by another process: wait for its end, or"
                            " choose another name=...") from None
        for left in (self.path / "checkpoints").glob(".*"):  # of a save that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not self.resumes and any(path.stat().st_size for path in self.path.glob("*.jsonl")):
            raise UserError(f"{self.path} holds metrics but no config.yaml: put it back, or choose"
                            " another name=...")

    def save(self, step, episodes, **parts):
        """Writes the parts aside, then renames; returns the least `episodes` that is kept."""
        metadata = {"step": step, "episodes": episodes, "config": self.config}
        rotation = checkpoints.CheckpointRotation(
            self.path / "checkpoints", keep_last=self.cfg.checkpoint.keep)
        try:
            path = rotation.save(checkpoint_of(parts), step=step, metadata=metadata)
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                os.fsync(file.fileno())
                if archive.testzip():
                    raise OSError(5, "what was read back is not what was written")
        except OSError as error:
            raise UserError(f"the checkpoint of step {step} could not be written to {self.path}"
                            f" ({error.strerror}): free some space; the same command then goes on"
                            " from the one before") from None
        kept = [checkpoints.Checkpoint.manifest(path) for path in rotation.checkpoints()]
        return min(manifest["metadata"]["episodes"] for manifest in kept)

def whole_checkpoints(found):
    """Paths of those checkpoints of a run directory, or of a list, that are whole, the newest
    first; `UserError` if none is left. One line for each that is damaged."""
    place = found
    if isinstance(found, Path):
        place = found / "checkpoints"
        found = sorted(place.glob("checkpoint-*"), reverse=True)
    for path in found:
        try:
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise DamageError(f"{broken} is damaged")
                checkpoints.Checkpoint.manifest(path)
            yield path
        except (DamageError, OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile,
                zlib.error) as error:  # all that a damaged archive can lead to
            print(f"checkpoint {path} is damaged ({error}): trying the one before")
    raise UserError(f"no checkpoint in {place} can be loaded: restore one from a backup, or start"
                    " anew with another name=...")

def load_checkpoint(path, **parts):
    """Gives the parts the state that they had when `path` was saved."""
    checkpoint_of(parts).load(path, map_location="cpu")

def checkpoint_of(parts):
    """TorchRL's checkpoint of these parts, one checksummed file."""
    whole = checkpoints.Checkpoint(format="archive")
    for name, part in parts.items():
        adapter = checkpoints.StateDictCheckpointAdapter("torch")
        whole.register(name, part, adapter=adapter)
    return whole

# --- Environments --------------------------------------------------------------------------------
GL_PROBE = (
    "import mujoco; c = mujoco.GLContext(8, 8); c.make_current();"
    "mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), 100); c.free()"
)

def select_gl():
    """Sets MUJOCO_GL to the first backend that really renders; call before importing dm_control.

    The user's own MUJOCO_GL is checked, never replaced. The probe is a process of its own (about a
    second): one failed import of an OpenGL library spoils a process. Raises `UserError`.
    """
    wanted, failures = os.environ.get("MUJOCO_GL"), {}
    os.environ.pop("PYOPENGL_PLATFORM", None)  # follows from MUJOCO_GL
    if not wanted and sys.platform != "linux":
        return
    for backend in (wanted,) if wanted else ("egl", "osmesa"):
        env, probe = os.environ | {"MUJOCO_GL": backend}, [sys.executable, "-c", GL_PROBE]
        done = subprocess.run(probe, env=env, capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return
        failures[backend] = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    which = f"MUJOCO_GL={wanted} does not render: unset it," if wanted else "no OpenGL renders:"
    raise UserError(f"{which} `apt-get install -y --no-install-recommends libegl1 libgl1`, or use"
                    f" env.from_pixels=false (tried {failures})")

EVALUATION = 1_000_000  # as the index of a copy of the environment: the one that evaluates

class EpisodeSeeds:
    """The seeds of the episodes of one copy of the environment: no reset depends on the past.
    `replayed`: the actions [T, A] of an unfinished episode that its first reset repeats."""

    def __init__(self, seed, copy, episode=0, replayed=()):
        self.seed, self.copy, self.episode, self.replayed = seed, copy, episode, replayed

    def __next__(self):
        self.episode += 1
        sequence = np.random.SeedSequence((self.seed, self.copy, self.episode))
        return int(sequence.generate_state(1)[0])

class SuiteEpisodes:
    """A Control Suite task with action repeat, own seeds, and one render per agent step: the plain
    way's pixels in half the time. Keeping the camera and an off-screen buffer of the image's size
    saves a quarter of a render. `camera=None` gives the flat state."""

    def __init__(self, env, seeds, action_repeat, camera=None):
        self._env, self._seeds, self._repeat, self._camera = env, seeds, action_repeat, None
        self._spec = env.observation_spec().get("observations")
        if camera is not None:
            from dm_control.mujoco.engine import Camera
            self._spec, size = dm_env.specs.Array(IMAGE, np.uint8), env.physics.model.vis.global_
            size.offheight, size.offwidth = IMAGE[:2]
            self._camera = Camera(env.physics, *IMAGE[:2], camera)

    def reset(self):
        self._env.task._random = np.random.RandomState(next(self._seeds))
        return self._show(self._env.reset())

    def step(self, action):
        reward = 0.0
        for _ in range(self._repeat):
            time_step = self._env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        return self._show(time_step._replace(reward=reward))

    def _show(self, time_step):
        pixels = None if self._camera is None else self._camera.render().copy()
        observation = time_step.observation["observations"] if pixels is None else pixels
        return time_step._replace(observation={"observation": observation})

    def observation_spec(self):
        return {"observation": self._spec}

    def __getattr__(self, name):
        return getattr(self._env, name)

def suite_env(cfg, seeds):
    """A Control Suite task as a TorchRL environment; `UserError` names those that exist."""
    from dm_control import suite
    from dm_control.suite.wrappers import pixels
    domains = suite.TASKS_BY_DOMAIN
    if cfg.name not in domains:
        raise UserError(f"env.name={cfg.name}: choose one of {', '.join(sorted(domains))}")
    if cfg.task not in domains[cfg.name]:
        raise UserError(f"env.task={cfg.task}: choose one of {', '.join(domains[cfg.name])}")
    env = suite.load(cfg.name, cfg.task, None, {"flat_observation": not cfg.from_pixels})
    camera = cfg.camera if cfg.camera >= 0 else 2 if cfg.name == "quadruped" else 0
    if cfg.from_pixels and camera >= env.physics.model.ncam:
        raise UserError(f"env.camera={camera}: {cfg.name} has {env.physics.model.ncam} cameras")
    env = SuiteEpisodes(env, seeds, cfg.action_repeat, camera if cfg.from_pixels else None)
    pixels.Wrapper.register(SuiteEpisodes)  # the one wrapper that TorchRL takes around a task
    return envs.DMControlWrapper(env)

def gymnasium_env(cfg, seeds):
    """A Gymnasium task with continuous actions, under the same protocol as the suite's tasks."""
    import gymnasium
    from gymnasium.spaces import Box
    class Episodes(gymnasium.Wrapper):
        """Action repeat, own seeds, and 64 x 64 images by area averaging if asked for."""

        def reset(self, **_):
            observation, info = self.env.reset(seed=next(seeds))
            return self.show(observation), info

        def step(self, action):
            total = 0.0
            for _ in range(cfg.action_repeat):
                observation, reward, *ends, info = self.env.step(action)
                total += float(reward)
                if any(ends):
                    break
            return self.show(observation), total, *ends, info

        def show(self, observation):
            if not cfg.from_pixels:
                return observation
            image = torch.as_tensor(self.env.render().copy()).movedim(-1, 0)[None].float()
            image = nn.functional.interpolate(image, IMAGE[:2], mode="area")[0]
            return image.round().byte().movedim(0, -1).contiguous().numpy()

    try:
        mode = "rgb_array" if cfg.from_pixels else None
        env = Episodes(gymnasium.make(cfg.name, render_mode=mode))
    except Exception as error:  # unknown id, missing package: each backend raises its own kind
        reason = " ".join(str(error).split())
        raise UserError(f"env.name={cfg.name} cannot be made by gymnasium: {reason}") from None
    if not isinstance(env.action_space, Box) or not env.action_space.is_bounded():
        raise UserError(f"env.name={cfg.name} has discrete or unbounded actions, which are out of"
                        " scope: choose a task with bounded continuous (Box) actions")
    if cfg.from_pixels:
        env.observation_space = Box(0, 255, IMAGE, np.uint8)
    elif not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
        raise UserError(f"env.name={cfg.name} has no flat state vector: use env.from_pixels=true")
    return envs.GymWrapper(env)

def single_env(cfg, seeds):
    """One copy of the environment: actions in [-1, 1], float32, a truncation at the time limit."""
    env = (suite_env if cfg.backend == "dm_control" else gymnasium_env)(cfg, seeds)
    limit = envs.StepCounter(cfg.time_limit // cfg.action_repeat)
    parts = envs.ActionScaling(), envs.DoubleToFloat(), limit
    if "pixels" in env.observation_spec.keys():  # TorchRL's name for an image of Gymnasium
        parts += (envs.RenameTransform(["pixels"], ["observation"]),)
    return ResumableEnv(env, envs.Compose(*parts), seeds)

def worker_env(cfg, seeds):
    """The same in a process of its own, which leaves Ctrl-C to the process that asks it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return single_env(cfg, seeds)

class ResumableEnv(envs.TransformedEnv):
    """Resets to where an unfinished episode was: its seed and its actions bring it there."""

    def __init__(self, env, transform, seeds):
        super().__init__(env, transform)
        self.__dict__["seeds"] = seeds  # not a property of the environment inside

    def _reset(self, tensordict=None, **kwargs):
        start, replayed = super()._reset(tensordict, **kwargs), self.seeds.replayed
        self.seeds.replayed = ()
        for action in replayed:
            start = envs.step_mdp(self.step(start.set("action", action)))
        return start

class ResumedMemory(envs.Transform):
    """Gives the agent the memory that it had in unfinished episodes, at the first reset only."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def _reset(self, tensordict, tensordict_reset):
        memory, self.memory = self.memory, None
        return tensordict_reset if memory is None else tensordict_reset.update(memory)

def make_env(cfg, seeds, networks, resumed=None):
    """A copy of the environment for each of `seeds` (each in its own process if several), with the
    agent's memory, 0 after a reset: `state` [S], `belief` [D] and the executed action [A]."""
    several = len(seeds) > 1
    make = [functools.partial(worker_env if several else single_env, cfg, each) for each in seeds]
    env = envs.TransformedEnv(envs.ParallelEnv(len(make), make)) if several else make[0]()
    sizes = {"state": networks.state_dim, "belief": networks.belief_dim,
             "previous_action": env.action_spec.shape[-1]}
    memory = {name: Unbounded(size) for name, size in sizes.items()}
    env.append_transform(envs.TensorDictPrimer(memory, expand_specs=True))
    return env.append_transform(ResumedMemory(resumed))

# --- Networks (App. A) ---------------------------------------------------------------------------
class FullPrecision(nn.Module):
    """Ends a network: whatever autocast does inside, what comes out has at least float32."""

    def forward(self, x):
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x

class TransitionModel(modules.RSSMPrior):
    """TorchRL's RSSM prior; its belief is never rounded below float32, and may be float64."""

    def forward(self, state, belief, action, noise):
        """Eq. (1): s_{t-1} [n, S], [n, D], a_{t-1} [n, A], standard normal noise [n, S] ->
        mean, std and sample of s_t [n, S], next belief [n, D]."""
        hidden = self.action_state_projector(torch.cat([state, action], -1))
        # A GRU in bfloat16 fails on some GPU and driver pairs (CUBLAS_STATUS_INVALID_VALUE).
        with torch.autocast(hidden.device.type, enabled=False):
            belief = self.rnn(hidden.to(belief.dtype), belief)
        mean, std = self.rnn_to_prior_projector(belief)
        return mean, std, mean + std * noise, belief

class Actor(modules.DreamerActor):
    """TorchRL's actor; gives mean (bounded) and std of the Gaussian under the tanh, [..., A]."""

    def __init__(self, action_dim, cfg):
        super().__init__(action_dim, 4, cfg.hidden_dim)
        # The official initial std leaves out its floor of 1e-4, and the bias is not a float32.
        self.backbone[-1].scale_mapping.bias = math.log(math.expm1(cfg.action_std))
        self.mean_scale = cfg.action_mean_scale
        self.backbone.insert(len(self.backbone) - 1, FullPrecision())

    def forward(self, state, belief):
        mean, std = super().forward(state, belief)
        return self.mean_scale * torch.tanh(mean / self.mean_scale), std

class Deconvolution(nn.ConvTranspose2d):
    """The decoder's transposed convolution (stride 2, no padding), faster on a CPU: a 1 x 1 input
    is a matrix product, a larger one goes through `SubPixelConvolution`."""

    def forward(self, x):
        """[n, I, h, h] -> [n, O, 2 (h - 1) + k, same], as in PyTorch."""
        device, weight, bias = x.device.type, self.weight, self.bias
        if device != "cpu":
            return super().forward(x)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        if x.shape[-1] > 1:
            return SubPixelConvolution.apply(x, weight, bias)
        size = weight.shape[2:]
        image = x.flatten(1) @ weight.permute(0, 2, 3, 1).flatten(1)
        return image.unflatten(1, (*size, -1)).permute(0, 3, 1, 2) + bias[:, None, None]

class SubPixelConvolution(torch.autograd.Function):
    """A transposed convolution of stride 2 as a plain one, whose channels are its four output
    phases (even and odd rows and columns): oneDNN's transposed one takes up to four times as long.
    Its backward is fine, but for the bias, whose gradient is summed apart."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x [n, I, h, h] in channels_last, weight [I, O, k, k] -> [n, O, 2 (h - 1) + k, same]."""
        ctx.save_for_backward(x, weight)
        (n, inputs, h, _), (_, outputs, k, _) = x.shape, weight.shape
        half = (k + 1) // 2
        # out[2 i + p] sums weight[2 j + p] x[i - j]: phase p convolves with every second weight.
        phases = nn.functional.pad(weight, (0, k % 2, 0, k % 2))
        phases = phases.reshape(inputs, outputs, half, 2, half, 2).flip(2, 4)
        phases = phases.permute(3, 5, 1, 0, 2, 4).reshape(4 * outputs, inputs, half, half)
        phases = phases.contiguous(memory_format=torch.channels_last)
        image = nn.functional.conv2d(x, phases, bias.repeat(4), padding=half - 1)
        size = image.shape[-1]
        image = image.permute(0, 2, 3, 1).reshape(n, size, size, 2, 2, outputs).transpose(2, 3)
        image = image.reshape(n, 2 * size, 2 * size, outputs)
        size = 2 * (h - 1) + k
        return image[:, :size, :size].contiguous().permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x, weight and bias from that of the output."""
        x, weight = ctx.saved_tensors
        transposed = None, (2, 2), (0, 0), (1, 1), True, (0, 0), 1, (True, True, False)
        to_x, to_weight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *transposed)
        return to_x, to_weight, gradient.sum((0, 2, 3))

class WorldModel(nn.Module):
    """theta: encoder, RSSM (prior, posterior), decoder, reward head, discount head if wanted."""

    def __init__(self, cfg, observation_shape, action_dim, predict_discount):
        super().__init__()
        S, D, features = cfg.state_dim, cfg.belief_dim, cfg.state_dim + cfg.belief_dim
        self.sizes = {"state": S, "belief": D, "action": action_dim}
        self.pixels = len(observation_shape) == 3
        if self.pixels:
            embedding = cfg.channels * 8 * 2 * 2
            self.encoder = modules.ObsEncoder(cfg.channels, in_channels=observation_shape[-1])
            self.decoder = modules.ObsDecoder(cfg.channels, latent_dim=features)
            self.decoder.state_to_latent[1] = nn.Identity()  # officially no activation here
            for layer in self.decoder.decoder[::2]:
                layer.__class__ = Deconvolution
            self.decoder.decoder.append(FullPrecision())
        else:
            embedding = cfg.hidden_dim
            self.encoder = head(observation_shape[0], embedding, 2, cfg.hidden_dim)
            self.decoder = head(features, observation_shape[0], 3, cfg.hidden_dim)
        self.prior = TransitionModel(torch.zeros(action_dim), D, D, S, action_dim=action_dim)
        self.posterior = modules.RSSMPosterior(D, S, rnn_hidden_dim=D, obs_embed_dim=embedding)
        # softplus(raw) + min_std; TorchRL's max(softplus(raw), min_std) has no gradient below.
        mapping = f"biased_softplus_{math.log(2) + cfg.min_std}_{cfg.min_std}"
        for net in self.prior.rnn_to_prior_projector, self.posterior.obs_rnn_to_post_projector:
            net[-1] = nn.Sequential(FullPrecision(), NormalParamExtractor(mapping, scale_lb=0.0))
        self.reward = head(features, 1, 2, cfg.hidden_dim)
        self.discount = head(features, 1, 3, cfg.hidden_dim) if predict_discount else None

    def preprocess(self, observation):
        """Network input and target: uint8 [..., 64, 64, 3] -> [..., 3, 64, 64] in +-0.5, or the
        state vector as it is; in the precision of the parameters."""
        dtype = self.prior.rnn.weight_ih.dtype
        if not self.pixels:
            return observation.to(dtype)
        return observation.movedim(-1, -3).to(dtype, copy=True).div_(255).sub_(0.5)

    def initial(self, n):
        """The zero state [n, S] and belief [n, D] that sequences and episodes start from."""
        like = self.prior.rnn.weight_ih
        return like.new_zeros(n, self.sizes["state"]), like.new_zeros(n, self.sizes["belief"])

def head(inputs, outputs, depth, units):
    """A dense network with `depth` hidden ELU layers; several inputs are concatenated."""
    net = modules.MLP(inputs, outputs, depth=depth, num_cells=units, activation_class=nn.ELU)
    return net.append(FullPrecision())

class Agent(nn.Module):
    """theta (`world_model`), phi (`actor`) and psi (`value`), with the official initialisation."""

    def __init__(self, cfg, observation_shape, action_dim):
        super().__init__()
        net, predict_discount = cfg.networks, cfg.optimization.predict_discount
        self.world_model = WorldModel(net, observation_shape, action_dim, predict_discount)
        self.actor = Actor(action_dim, net)
        self.actor(torch.zeros(1, net.state_dim), torch.zeros(1, net.belief_dim))  # lazy layer
        self.value = head(net.state_dim + net.belief_dim, 1, 3, net.hidden_dim)
        self.apply(initialise).to(memory_format=torch.channels_last)  # as images come from disk

def initialise(module):
    """Glorot-uniform kernels, orthogonal recurrent matrix, zero biases: the official defaults."""
    for name, parameter in module.named_parameters(recurse=False):
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif name == "weight_hh":
            nn.init.orthogonal_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)

# --- Optimisation, device and precision ----------------------------------------------------------
class Optimizer:
    """Adam with a global-norm clip, as two verbs: `differentiate(loss)`, `step() -> grad_norm`."""

    def __init__(self, parameters, lr, eps, clip, float16=False):
        self.parameters, self.eps, self.clip = list(parameters), eps, clip
        device = self.parameters[0].device.type
        self.adam = torch.optim.Adam(self.parameters, lr, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=float16)

    def differentiate(self, loss, shared=False):
        """Sets the gradients of its own parameters only; `shared` keeps the graph for a loss."""
        self.adam.zero_grad()
        self.scaler.scale(loss).backward(inputs=self.parameters, retain_graph=shared)

    def step(self):
        """Clips the gradients, steps, and returns their norm before the clip."""
        self.scaler.unscale_(self.adam)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        for group in self.adam.param_groups:  # Keras adds eps before the bias correction
            group["steps"] = group.get("steps", 0) + 1
            group["eps"] = self.eps / math.sqrt(1 - group["betas"][1] ** group["steps"])
        self.scaler.step(self.adam)
        self.scaler.update()
        return norm

    def state_dict(self):
        """All that the next step depends on, but for the parameters."""
        return {"adam": self.adam.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        self.scaler.load_state_dict(state["scaler"])

def build_optimizers(cfg, agent, dtype=None):
    """One optimiser for each of theta, phi and psi; dtype float16 brings loss scaling."""
    rates = {"world_model": cfg.world_model_lr, "actor": cfg.actor_lr, "value": cfg.value_lr}
    rest = cfg.adam_eps, cfg.grad_clip, dtype == torch.float16
    return {k: Optimizer(getattr(agent, k).parameters(), lr, *rest) for k, lr in rates.items()}

def resolve_device(name):
    """`auto` is CUDA if it is there, else the CPU; `UserError` if the named device is missing."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}; use device=auto") from None

def resolve_autocast(name, device):
    """`optimization.autocast` as a dtype, or None for float32; `auto` is bfloat16 if it is native.

    Some GPU and driver pairs fail in bfloat16 (`CUBLAS_STATUS_INVALID_VALUE`): a small layer and a
    GRU run first, and if they fail, float16 is next, then float32, with one line that says so.
    """
    native = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
              torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if name == "false" or (name == "auto" and not native):
        return None
    x = torch.ones(4, 16, device=device)
    for dtype in dict.fromkeys((getattr(torch, name, torch.bfloat16), torch.float16)):
        layer, cell = nn.Linear(16, 16).to(device), nn.GRUCell(16, 16).to(device)
        try:
            with torch.autocast(device.type, dtype):
                cell(layer(x), x).float().sum().backward()
            if torch.isfinite(layer.weight.grad).all():
                return dtype
            reason = "gradients are not finite"
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        print(f"autocast: {dtype} fails on this {device.type} ({reason}); trying the next one")
    return None

def tune_process(device):
    """Process-wide switches for speed. CPU: freed memory is kept (a fresh page costs more than the
    arithmetic on it; 2 to 4 GB stay resident), float32 products go through oneDNN. CUDA: TF32."""
    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if device.type == "cpu" and hasattr(libc, "mallopt"):  # glibc only
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD

def compile_steps(agent, cfg, device):
    """Compiles what `observe` and `imagine` repeat: transition, representation and action model.

    `auto` is on CUDA only: on a CPU the gain is within the noise, and 2000 updates would not win
    back the 40 s that it takes. Compiling the loops as a whole takes three times as long. Without
    a working compiler one line says so, and everything runs as it is.
    """
    mode = cfg.optimization.compile
    if mode == "false" or (mode == "auto" and device.type == "cpu"):
        return
    torch.compiler.reset()  # what an earlier run in this process compiled counts against a limit
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        print(f"compile: no working compiler ({str(error).splitlines()[0]}); going on without")
        return
    for model in agent.world_model.prior, agent.world_model.posterior, agent.actor:
        model.compile(dynamic=False, mode=mode if mode == "reduce-overhead" else None)

@contextlib.contextmanager
def constant(model):
    """Holds the parameters constant inside: compiled steps would give them gradients that nobody
    wants, where others leave those out by themselves (and cast constants anew in every step)."""
    held = list(model.parameters()) if model.prior._compiled_call_impl else ()
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)

def accelerate(learning, device, dtype):
    """The same dynamics and behaviour learning under autocast, theta constant in the latter: the
    only place that knows about precision."""
    dynamics_learning, behavior_learning = learning
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype is not None)

    def dynamics(*args):
        torch.compiler.cudagraph_mark_step_begin()  # for `optimization.compile=reduce-overhead`
        with autocast():
            return dynamics_learning(*args)

    def behavior(agent, *args):
        with autocast(), constant(agent.world_model):
            return behavior_learning(agent, *args)

    return dynamics, behavior

# --- Acting and replay ---------------------------------------------------------------------------
class Policy(TensorDictModuleBase):
    """A TorchRL policy from a rule (agent, observation, previous action, state, belief, noise) ->
    (action, state, belief), all [n, ...]; the memory travels with the environment. `samples`: (K,)
    if the rule chooses from K actions. The first `random_steps` agent steps act at random."""

    in_keys = ["observation", "previous_action", "state", "belief"]
    out_keys = ["action", ("next", "previous_action"), ("next", "state"), ("next", "belief")]

    def __init__(self, agent, rule, samples=()):
        super().__init__()
        self.agent, self.rule, self.samples, self.random_steps = agent, rule, samples, 0

    def device(self):
        """Where the agent is."""
        return self.agent.world_model.prior.rnn.weight_ih.device

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # a single step is not worth another compilation
    def forward(self, tensordict):
        lead, size = tensordict.batch_size, self.agent.world_model.sizes
        device, n = self.device(), lead.numel()
        inputs = [tensordict[key].to(device) for key in self.in_keys]
        inputs = inputs if lead else [value[None] for value in inputs]
        shapes = {"prior": (n, size["state"]), "posterior": (n, size["state"]),
                  "action": (*self.samples, n, size["action"]), "exploration": (n, size["action"])}
        noise = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
        action, state, belief = self.rule(self.agent, *inputs, noise)
        if self.random_steps > 0:
            action, self.random_steps = torch.rand_like(action) * 2 - 1, self.random_steps - n
        for key, value in zip(self.out_keys, (action, action, state, belief)):
            tensordict.set(key, value.reshape(*lead, -1).cpu())
        return tensordict

def replay_rows(cfg, observation_shape, action_dim):
    """The number of rows that the replay holds, and {key: (shape, dtype)} of one row."""
    steps = min(cfg.replay_buffer.capacity, cfg.collector.total_steps)
    rows = math.ceil(steps / cfg.env.action_repeat + steps / cfg.env.time_limit)  # and resets
    image = torch.uint8 if cfg.env.from_pixels else torch.float32
    return rows, {
        "observation": (tuple(observation_shape), image),
        "action": ((action_dim,), torch.float32), "reward": ((), torch.float32),
        "terminated": ((), torch.bool), "episode": ((), torch.int64),
    }  # fmt: skip

def reserve(path, size):
    """Makes a file at least `size` bytes long, on disk and not only by name: a memory-mapped file
    that meets a full disk later would end the process without a word."""
    with path.open("ab") as file:
        if (missing := size - file.tell()) > 0:
            if missing > (free := shutil.disk_usage(path.parent).free):
                raise UserError(f"the replay needs {missing / 1e9:.2f} GB for {path} and there are"
                                f" {free / 1e9:.2f} GB free: lower replay_buffer.capacity, or"
                                " choose another run_dir")
            os.posix_fallocate(file.fileno(), size - missing, missing)

class Replay:
    """Finished episodes as rows on disk (see the time grid in dreamer.py), observations once;
    sampled in sequences that never cross an episode.

    The files are the only copy. A checkpoint keeps the number and the checksums of the episodes;
    what a full buffer overwrites after it is kept in `undo/` until the next ones are there.
    """

    def __init__(self, cfg, rows, layout, directory, action_repeat, device, seed=0):
        self.length, self.device, self.repeat = cfg.batch_length, device, action_repeat
        self.episodes, self.longest, self.pending = 0, 0, {}
        self.table, self.finished = [], {}  # (first row, rows, checksum); episodes of each copy
        self.rows, self.directory = rows, directory
        (directory / "undo").mkdir(parents=True, exist_ok=True)
        self.files = TensorDict({}, [rows])
        for name, (shape, dtype) in layout.items():
            path = directory / f"{name}.memmap"
            reserve(path, rows * math.prod(shape) * dtype.itemsize)
            self.files[name] = MemoryMappedTensor.from_filename(path, dtype, (rows, *shape))
        self.buffer = ReplayBuffer(
            storage=TensorStorage(self.files), batch_size=cfg.batch_size,
            pin_memory=device.type == "cuda",
            sampler=SliceSampler(slice_len=self.length, traj_key="episode", truncated_key=None,
                                 strict_length=True, cache_values=True))
        # Drawn with random numbers of its own, a batch is the same whichever thread draws it.
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer.set_rng(self.generator)
        self.ahead, self.drawn = ThreadPoolExecutor(1), self.generator.get_state()
        self.rewind(0, 0)

    def rewind(self, stored, cursor):
        """Says how many rows are valid, and where the next one goes."""
        state = {"_storage": {}, "initialized": True, "_len": stored}
        self.buffer.storage.load_state_dict(state)
        self.buffer.writer.load_state_dict({"_cursor": cursor})

    def state_dict(self):
        """Everything but the rows: they are durable once this returns."""
        for path in self.directory.glob("*.memmap"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        pending = {copy: torch.cat(parts).to_dict() for copy, parts in self.pending.items()}
        return {"episodes": self.episodes, "longest": self.longest, "finished": self.finished,
                "table": self.table, "stored": len(self.buffer), "cursor": self.cursor(),
                "rows": self.rows, "generator": self.drawn, "pending": pending}  # fmt: skip

    def load_state_dict(self, state):
        """Takes the rows back to what they were, checked; `DamageError` if they are not there."""
        for path in sorted((self.directory / "undo").glob("*.pt"), reverse=True):
            if int(path.stem) >= state["episodes"]:
                rows = torch.load(path)
                index = rows.pop("index")
                self.files[index] = TensorDict(rows, [len(index)])
        oldest = state["episodes"] - len(state["table"])
        for episode, (first, count, checksum) in enumerate(state["table"], oldest):
            if self.checksum(self.files[(first + torch.arange(count)) % self.rows]) != checksum:
                raise DamageError(f"{self.directory}: episode {episode} is damaged or missing")
        grown = self.rows > state["rows"]
        self.rewind(state["stored"], state["stored"] if grown else state["cursor"])
        self.episodes, self.longest = state["episodes"], state["longest"]
        self.table, self.finished, self.drawn = (
            state[key] for key in ("table", "finished", "generator"))
        self.generator.set_state(self.drawn)
        self.pending = {copy: [TensorDict(steps, [len(steps["action"])])]
                        for copy, steps in state["pending"].items()}

    def cursor(self):
        """Where the next row goes."""
        return self.buffer.writer.state_dict()["_cursor"]

    def checksum(self, rows):
        """CRC-32 of all bytes of some rows."""
        value = 0
        for name in sorted(self.files.keys()):
            value = zlib.crc32(rows[name].contiguous().numpy().view(np.uint8).reshape(-1), value)
        return value

    def forget(self, episodes):
        """Deletes what is only needed to go back to less than `episodes` episodes."""
        for path in (self.directory / "undo").glob("*.pt"):
            if int(path.stem) < episodes:
                path.unlink()

    def extend(self, transitions):
        """Adds transitions [T] or [copies, T]; returns (return, length) of episodes they end."""
        finished = []
        for copy, part in enumerate(transitions.reshape(-1, transitions.shape[-1])):
            if not part["next", "reward"].isfinite().all():
                raise UserError("the environment gave a reward that is not finite: mend the task;"
                                " the same command then goes on from the last checkpoint")
            ends = part["next", "done"].flatten().nonzero().flatten() + 1
            for piece in filter(len, part.tensor_split(ends.tolist())):
                self.pending.setdefault(copy, []).append(piece.exclude("collector").clone())
                if piece["next", "done"].any():
                    finished.append(self.add_episode(torch.cat(self.pending.pop(copy))))
                    self.finished[copy] = self.finished.get(copy, 0) + 1
        return finished

    def add_episode(self, steps):
        """Stores an episode of T transitions as T + 1 rows; returns its return and its length."""
        after, reset = steps["next"], torch.zeros_like(steps[:1])
        rows = {
            "observation": torch.cat([steps["observation"][:1], after["observation"]]),
            "action": torch.cat([reset["action"], steps["action"]]),
            "reward": torch.cat([reset["next", "reward"], after["reward"]]).flatten(),
            "terminated": torch.cat([reset["terminated"], after["terminated"]]).flatten(),
            "episode": torch.full((len(steps) + 1,), self.episodes),
        }
        rows, first = TensorDict(rows, batch_size=[len(steps) + 1]), self.cursor()
        index = (first + torch.arange(len(rows))) % self.rows
        if len(self.buffer) + len(rows) > self.rows:
            replaced = self.files[index].clone().to_dict() | {"index": index}
            write(self.directory / "undo" / f"{self.episodes:09d}.pt", torch.save, replaced)
            while self.table and sum(row[1] for row in self.table) + len(rows) > self.rows:
                self.table.pop(0)
        self.buffer.extend(rows)
        self.table.append((first, len(rows), self.checksum(rows)))
        self.episodes, self.longest = self.episodes + 1, max(self.longest, len(rows))
        return float(after["reward"].double().sum()), len(steps) * self.repeat

    def batches(self, count):
        """Yields `count` batches [B, L] on the training device; each is drawn while the one before
        is in use, and none before it is known which episodes are there."""
        ahead = self.ahead.submit(self.sample) if count > 0 else None
        for following in reversed(range(count)):
            batch, self.drawn = ahead.result(), self.generator.get_state()
            batch = batch.to(self.device, non_blocking=True)
            if following:  # last, for the two threads share one interpreter
                ahead = self.ahead.submit(self.sample)
            yield batch

    def sample(self):
        """A batch [B, L] in memory; `UserError` if no episode is that long."""
        if self.longest < self.length:
            raise UserError(f"no episode has replay_buffer.batch_length={self.length} rows (the"
                            f" longest has {self.longest}): lower replay_buffer.batch_length, or"
                            " raise collector.random_steps")
        batch = self.buffer.sample().reshape(-1, self.length)
        return batch.exclude("episode", "index")

# --- Evaluation: nothing here changes what is learned --------------------------------------------
@contextlib.contextmanager
def one_thread():
    """One PyTorch thread while acting: idle ones spin, which slows a software renderer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

class Evaluation:
    """Plays episodes with the evaluation policy, in an environment and with noise of its own, and
    compares the first one with what model and critic say of it. `rules`: dreamer.EVALUATION."""

    def __init__(self, cfg, agent, rules):
        rule, self.diagnose, self.picture = rules
        self.cfg, self.agent, self.policy = cfg, agent, Policy(agent, rule, (100,))
        self.seeds = EpisodeSeeds(cfg.seed, EVALUATION)
        self.env = make_env(cfg.env, [self.seeds], cfg.networks)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # the same bits, whether training is compiled or not
    def __call__(self, step, films=False, dream_from=None):
        """Metrics, curves {name: list}, and {name: what there is to draw}. A step has its
        episodes and its noise, however many are asked for, and whatever is drawn."""
        pictures, hp = {}, self.cfg.optimization
        with one_thread(), torch.random.fork_rng():
            self.seeds.episode = step
            torch.manual_seed(next(self.seeds))
            episodes = [self.play() for _ in range(self.cfg.eval.episodes)]
            returns = [episode["reward"].double().sum().item() for episode in episodes]
            steps = sum(len(episode["reward"]) for episode in episodes) / len(episodes)
            metrics = {"eval/return": sum(returns) / len(returns),
                       "eval/length": steps * self.cfg.env.action_repeat,
                       "eval/return_std": float(np.std(returns))}
            torch.manual_seed(step)
            curves, one = {}, episodes[0]
            if (length := len(one["reward"])) > 2:
                honesty, curves, *windows = self.diagnose(self.agent, one, hp)
                metrics |= honesty
                if films:
                    context = min(CONTEXT, length - 1)
                    dream = self.picture(self.agent, one, context - 1, length - context + 1)
                    pictures |= {"open_loop": (one, *windows), "dream": (one, context, dream)}
            if dream_from:
                torch.manual_seed(step)
                pictures["dream_from"] = self.dream_from(episodes, *dream_from)
        pictures |= {f"evaluation_{i}": episode for i, episode in enumerate(episodes, 1) if films}
        return metrics, curves | {"return": returns}, pictures

    def play(self):
        """An episode: `observation` [T+1, ...], `action` [T, A], `reward` [T], and the filtered
        `state` [T, S] and `belief` [T, D] from which the actions were chosen."""
        limit = self.cfg.env.time_limit // self.cfg.env.action_repeat
        steps = self.env.rollout(limit, self.policy)
        after, device = steps["next"], self.policy.device()
        episode = {"observation": torch.cat([steps["observation"][:1], after["observation"]]),
                   "action": steps["action"], "reward": after["reward"].flatten(),
                   "state": after["state"], "belief": after["belief"]}  # fmt: skip
        return {name: value.to(device) for name, value in episode.items()}

    def dream_from(self, episodes, number, row):
        """The episode, the row, and what is dreamed from there: at most 45 rows."""
        if not 1 <= number <= len(episodes):
            raise UserError(f"eval.dream_from: there are episodes 1 to {len(episodes)}: choose one"
                            " of these, or raise eval.episodes")
        episode, repeat = episodes[number - 1], self.cfg.env.action_repeat
        last = len(episode["reward"]) - 2
        if not 0 <= row // repeat <= last:
            raise UserError(f"eval.dream_from: episode {number} can be left at the steps 0 to"
                            f" {last * repeat}: choose one of these")
        row //= repeat
        length = min(45, len(episode["reward"]) - row)
        return episode, row, self.picture(self.agent, episode, row, length)

# --- Films and panels: drawn beside training, from what an evaluation kept -----------------------
CONTEXT = 5  # rows that the model has seen before it is left alone
SEEN, DREAMED = (0, 160, 0), (255, 128, 0)  # border of a frame that it has seen, that it predicts

def decoded(images):
    """Decoder output [..., 3, h, w] in +-0.5 -> uint8 [..., h, w, 3]."""
    return ((images + 0.5) * 255).round().clamp(0, 255).byte().movedim(-3, -1).cpu()

def framed(frames, context):
    """[T, h, w, 3] -> [T, h+4, w+4, 3]: a border that tells the first `context` frames apart."""
    size = len(frames), frames.shape[1] + 4, frames.shape[2] + 4, 3
    border = torch.tensor(DREAMED, dtype=torch.uint8).expand(size).clone()
    border[:context] = torch.tensor(SEEN, dtype=torch.uint8)
    border[:, 2:-2, 2:-2] = frames
    return border

def enlarged(frames, times=4):
    """Every pixel as a square of `times` x `times`."""
    return frames.repeat_interleave(times, -3).repeat_interleave(times, -2)

def compared(truth, *models, context):
    """Truth, models and the error of the last, one below the other: [T, h, w, 3] each, uint8."""
    error = (models[-1].int() - truth.int()).abs().byte()
    return torch.cat([framed(part, context) for part in (truth, *models, error)], 1)

def evaluation_frames(episode):
    """The episode as it was."""
    return enlarged(episode["observation"].cpu())

def dream_frames(episode, context, seen):
    """The real episode, and beside it the one that the model dreams with the policy's actions."""
    model = torch.cat([seen["filtered"][0][:context], seen["dream"][0]])
    both = episode["observation"].cpu(), decoded(model)
    return enlarged(torch.cat([framed(part, context) for part in both], 2), 3)

def open_loop_frames(episode, predicted, first):
    """Six sequences: truth, the model with the real actions, error."""
    length, model = predicted.shape[1], decoded(predicted)
    truth, context = episode["observation"].cpu(), min(CONTEXT, length - 1)
    columns = [compared(truth[row : row + length], frames, context=context)
               for row, frames in zip(first.tolist(), model)]  # fmt: skip
    return enlarged(torch.cat(columns, 2), 2)

FRAMES = {"evaluation": evaluation_frames, "dream": dream_frames, "open_loop": open_loop_frames}

def write_film(path, frames, fps):
    """Writes uint8 frames [T, h, w, 3] as an mp4, complete or not at all."""
    from moviepy import ImageSequenceClip
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    film = ImageSequenceClip(list(frames.numpy()), fps=fps)
    film.write_videofile(str(aside), codec="libx264", logger=None)
    os.replace(aside, path)

def draw_film(path, name, picture, fps):
    """Composes and writes one of `FRAMES`."""
    parts = picture if isinstance(picture, tuple) else (picture,)
    write_film(path, FRAMES[name.rstrip("0123456789_")](*parts), fps)

def save_figure(figure, path):
    """Writes a figure as PNG, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=100, format="png")
    os.replace(aside, path)

def lines(axis, title, xlabel, **curves):
    """One panel with lines {label: (x, y, style)}."""
    for label, (x, y, style) in curves.items():
        axis.plot(x, y, style, label=label.replace("_", " "))
    axis.set(title=title, xlabel=xlabel)
    if curves:
        axis.legend(fontsize="small")

def draw_panel(path, curves, reference, free_nats):
    """The state of a run in six panels: returns with the published ones, the free nats, and what
    the model and the critic say against one real episode."""
    from matplotlib.figure import Figure
    rows = [json.loads(row) for row in path.with_name("metrics.jsonl").read_text().splitlines()]
    figure, margins = Figure(figsize=(14, 7.5)), {"left": 0.04, "right": 0.99, "bottom": 0.07,
                                                  "top": 0.95, "wspace": 0.18, "hspace": 0.33}
    (top, bottom), steps = figure.subplots(2, 3, gridspec_kw=margins), "environment steps"
    def over(key):
        return zip(*((row["environment_steps"], row[key]) for row in rows if key in row))

    x, y = over("eval/return")
    lines(top[0], "evaluation return", steps, ours=(x, y, "o-"))
    if reference is not None:
        near = reference[reference[:, 0] <= max(x[-1], reference[1, 0])].T
        lines(top[0], "evaluation return", steps, published=(near[0], near[1], "k--"))
        top[0].fill_between(near[0], near[2], near[3], color="k", alpha=0.1)
    if any("world_model/kl" in row for row in rows):
        x, y = over("world_model/kl")
        lines(bottom[0], "KL of the model, nats", steps, kl=(x, y, "-"),
              free_nats=((x[0], x[-1]), (free_nats,) * 2, "k:"))  # fmt: skip
    if "value" in curves:
        ahead = range(1, len(curves["reward_error"]) + 1)
        for axis, what, title in ((top[1], "observation", "squared error of predicted frames"),
                                  (bottom[1], "reward", "absolute error of predicted rewards")):
            lines(axis, title, "steps without an observation",
                  model=(ahead, curves[f"{what}_error"], "-"),
                  last_row_repeated=(ahead, curves[f"copied_{what}"], "k--"))  # fmt: skip
        now = range(len(curves["imagined_return"]))
        lines(top[2], "rewards of the next H steps", "agent step of the episode",
              imagined=(now, curves["imagined_return"], "-"),
              real=(now, curves["real_return"], "k--"))  # fmt: skip
        target = np.subtract(curves["value"][:-1], curves["value_above_target"])
        lines(bottom[2], "value against the real lambda-return", "agent step of the episode",
              value=(range(len(target)), curves["value"][:-1], "-"),
              lambda_return=(range(len(target)), target, "k--"))  # fmt: skip
    save_figure(figure, path)

def draw_dream(path, episode, row, dreams, fps, repeat):
    """Real, reconstruction, open loop and error from `row` on, and rewards, as PNG and mp4."""
    from matplotlib.figure import Figure
    length, first = len(dreams["open_loop"][0]), max(row - CONTEXT + 1, 0)
    context, rows = row + 1 - first, slice(first, row + 1 + length)
    truth = episode["observation"].cpu()[rows]
    filtered = decoded(dreams["filtered"][0])[rows]
    filtered = torch.cat([filtered, truth.new_zeros(len(truth) - len(filtered), *IMAGE)])
    model = torch.cat([filtered[:context], decoded(dreams["open_loop"][0])])
    frames = compared(truth, filtered, model, context=context)
    write_film(path.with_suffix(".mp4"), enlarged(frames, 3), fps)
    shown = np.unique(np.r_[0, context - 1, np.linspace(context, len(frames) - 1, 9)].astype(int))
    figure = Figure(figsize=(len(shown) * 1.1, 6.6), layout="constrained")
    strip, axis = figure.subplots(2, 1, height_ratios=(2.2, 1))
    strip.imshow(torch.cat([frames[i] for i in shown], 1).numpy(), interpolation="nearest")
    size = IMAGE[0] + 4
    strip.set_yticks([size * (i + 0.5) for i in range(4)],
                     ["real", "seen", "open loop", "error"])  # fmt: skip
    strip.set_xticks([size * (i + 0.5) for i in range(len(shown))], (first + shown) * repeat)
    strip.set_xlabel("environment step (orange: the model alone, with the real actions)")
    real, after = episode["reward"].cpu(), np.arange(row + 1, row + 1 + length) * repeat
    before = np.arange(max(first, 1), row + 1) * repeat
    lines(axis, "", "environment step",
          real=(np.r_[before, after], real[max(first, 1) - 1 : row + length], "k--"),
          open_loop=(after, dreams["open_loop"][1].cpu(), "-"),
          dream_of_the_policy=(after, dreams["dream"][1].cpu(), ":"))  # fmt: skip
    axis.set_ylabel("reward")
    save_figure(figure, path)

def published(env):
    """The published curve of a task: rows (environment steps, mean, lowest, highest), or None."""
    task = f"{env.name}_{env.task}".replace("ball_in_cup", "cup")
    path = Path(__file__).with_name("benchmarks") / "published.csv"
    if env.backend != "dm_control" or not path.exists():
        return None
    columns = "environment_steps", "mean", "lowest", "highest"
    with path.open() as file:
        rows = [[float(row[column]) for column in columns]
                for row in csv.DictReader(file) if row["task"] == task]  # fmt: skip
    return np.array(rows) if rows else None

# --- Logging: nothing here changes what is learned -----------------------------------------------
WITHOUT_WANDB = "or use logger.mode=offline (wandb sync sends it later), or logger.mode=disabled"

def check_wandb(cfg):
    """`UserError` if the dashboard of this configuration cannot work here."""
    os.environ.setdefault("WANDB_SILENT", "true")
    if cfg.logger.mode == "disabled":
        return
    try:
        import wandb
    except ImportError:
        raise UserError("wandb is not installed: pip install wandb, or use"
                        " logger.mode=disabled") from None
    if cfg.logger.mode == "online" and not wandb.api.api_key:
        raise UserError(f"logger.mode=online needs an API key: run `wandb login`, {WITHOUT_WANDB}")

def start_wandb(cfg, directory, resumed):
    """The wandb run, a continued one if `resumed` is its id; `UserError` if wandb cannot start."""
    import wandb
    try:
        settings = wandb.Settings(init_timeout=30)
        return WandbLogger(
            cfg.name, offline=cfg.logger.mode != "online", save_dir=str(directory), id=resumed,
            project=cfg.logger.project, log_env_packages=False, config=asdict(cfg),
            settings=settings).experiment
    except (wandb.errors.Error, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"wandb does not answer ({reason}): check the network, {WITHOUT_WANDB}"
                        ) from None

class Logger:
    """One row of metrics at a time, to metrics.jsonl and wandb, and a progress bar. Times go to
    throughput.jsonl: the other files are the same to the byte, however often a run was stopped."""

    KEPT = ("updates", "episodes", "seconds", "last_row", "evaluations", "wandb_id")
    FILES = {"rows": "metrics.jsonl", "times": "throughput.jsonl", "curves": "curves.jsonl"}

    def __init__(self, cfg, directory, device):
        self.cfg, self.directory, self.device = cfg, directory, device
        self.hint = device.type == "cpu"
        self.updates, self.episodes, self.seconds = [], [], {}  # since the last row
        self.last_row, self.evaluations = 0, 0
        for key, name in self.FILES.items():
            setattr(self, key, (directory / name).open("ab", buffering=0))
        self.wandb, self.wandb_id = None, None
        self.reference = published(cfg.env)
        self.artist, self.drawings = ThreadPoolExecutor(1), []
        self.bar = tqdm(total=cfg.collector.total_steps, unit="step", smoothing=0.05,
                        disable=not cfg.logger.progress)

    def start(self, step, about):
        """Opens the dashboard and the progress bar at `step`; `about` the run goes with it."""
        cfg = self.cfg
        if cfg.logger.mode != "disabled":
            self.wandb = start_wandb(cfg, self.directory, self.wandb_id)
            self.wandb_id = self.wandb.id
            self.wandb.define_metric("*", step_metric="environment_steps")
            self.wandb.config.update(about, allow_val_change=True)
        self.bar.update(step - self.bar.n)

    def state_dict(self):
        """What has not become a row yet, and how long the files are."""
        lengths = {key: getattr(self, key).tell() for key in self.FILES}
        return {key: getattr(self, key) for key in self.KEPT} | {"lengths": lengths}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave; rows written after it are written again."""
        for key in self.KEPT:
            setattr(self, key, state[key])
        self.updates = [{name: value.to(self.device) for name, value in row.items()}
                        for row in self.updates]
        for key, length in state["lengths"].items():
            getattr(self, key).truncate(length)

    @contextlib.contextmanager
    def clock(self, phase):
        """Adds the wall time of its block to `phase`, once a GPU has done its work."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def report(self, step, before, updates, evaluation):
        """All that is due between the steps `before` and `step`: evaluation, films, one row."""
        cfg, metrics, curves, last = self.cfg, {}, {}, step >= self.cfg.collector.total_steps
        if self.episodes:
            shown = {"return": self.episodes[-1][0], "updates": updates}
            self.bar.set_postfix(shown, refresh=False)
        every = cfg.eval.every or step + 1
        if updates and (before // every != step // every or last and cfg.eval.every):
            self.evaluations += 1
            films = cfg.logger.video and self.evaluations % cfg.logger.video_every == 0
            with self.clock("evaluate"):
                metrics, curves, pictures = evaluation(step, films=films)
            self.bar.write(f"step {step:,}: evaluation return {metrics['eval/return']:.1f}")
            for name, picture in pictures.items():
                path = self.directory / "videos" / f"{name}_{step:09d}.mp4"
                fps = 40 / cfg.env.action_repeat
                self.draw(f"eval/{name}", path, draw_film, name, picture, fps)
        self.bar.update(step - before)
        if metrics or last or before // cfg.logger.every != step // cfg.logger.every:
            self.write(step, updates, metrics, curves)

    def write(self, step, updates, metrics, curves):
        """Writes `metrics`, means over the updates and episodes since the last row, and times."""
        seconds, count = self.seconds, len(self.updates)
        if curves and self.reference is not None and step <= self.reference[-1, 0]:
            for name, column in zip(("mean", "lowest", "highest"), self.reference.T[1:]):
                here = np.interp(step, self.reference[:, 0], column)
                metrics[f"eval/published_{name}"] = float(here)
        if self.episodes:
            means = np.mean(self.episodes, 0).tolist()
            metrics |= {"train/return": means[0], "train/length": means[1]}
        for name in self.updates[0] if count else ():
            metrics[name] = torch.stack([row[name] for row in self.updates]).mean().item()
        times = {f"throughput/{phase}_seconds": value for phase, value in seconds.items()}
        rate = (step - self.last_row) / seconds["collect"]
        times["throughput/environment_steps_per_second"] = rate
        if count:
            times["throughput/updates_per_second"] = count / seconds["update"]
        counters = {"environment_steps": step, "agent_steps": step // self.cfg.env.action_repeat,
                    "updates": updates}
        short = {name: [float(f"{x:.5g}") for x in curve] for name, curve in curves.items()}
        for file, row in (self.rows, metrics), (self.times, times), (self.curves, short):
            if row:
                file.write((json.dumps(counters | row) + "\n").encode())
        if self.wandb:
            self.wandb.log(counters | metrics | times | self.drawn(), step=step)
        if curves:
            self.draw("eval/panel", self.directory / "panel.png", draw_panel, curves,
                      self.reference, self.cfg.optimization.free_nats)  # fmt: skip
        if count and self.hint:
            self.hint = False  # once is enough
            self.estimate(step, self.cfg.optimization.train_ratio * seconds["update"] / count
                          + 1 / rate)  # fmt: skip
        self.updates, self.episodes, self.seconds, self.last_row = [], [], {}, step

    def estimate(self, step, seconds):
        """Says how long the rest takes at these seconds per environment step."""
        hours = (self.cfg.collector.total_steps - step) * seconds / 3600
        self.bar.write(f"about {hours:.1f} hours to go on this CPU" + (hours > 2) * (
            "; a smaller run: python dreamer.py --config-name config_laptop"))

    def draw(self, name, path, function, *args):
        """Draws a film or a picture beside training; `drawn` shows it under `name`. One that is
        still waiting to be drawn gives way to a newer one for the same file."""
        self.drawings = [row for row in self.drawings if row[1] != path or not row[2].cancel()]
        self.drawings.append((name, path, self.artist.submit(function, path, *args)))

    def drawn(self, wait=False):
        """{name: wandb's film or picture} of what has been drawn since; one line for a failure."""
        done = [row for row in self.drawings if wait or row[2].done()]
        self.drawings, media = [row for row in self.drawings if row not in done], {}
        for name, path, drawing in done:
            if error := drawing.exception():
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.bar.write(f"{path.name} could not be drawn ({reason}); training goes on")
            elif self.wandb:
                import wandb
                kind = wandb.Video if path.suffix == ".mp4" else wandb.Image
                media[name] = kind(str(path))
        return media

    def close(self, hurry=False):
        """Ends what is being drawn (or leaves it), the progress bar, the files, the wandb run."""
        media = self.drawn(wait=not hurry)
        self.artist.shutdown(wait=not hurry, cancel_futures=True)
        self.bar.close()
        for key in self.FILES:
            getattr(self, key).close()
        if self.wandb:
            if media:
                self.wandb.log({"environment_steps": self.last_row} | media, step=self.last_row)
            self.wandb.finish()

# --- Evaluation of a checkpoint ------------------------------------------------------------------
def evaluate(cfg, rules):
    """Plays `eval.episodes` episodes with the agent of `eval.checkpoint`, prints their returns
    and draws what is asked for. The same episodes give what training saw, to the bit."""
    path = find_checkpoint(Path(cfg.eval.checkpoint))
    manifest = checkpoints.Checkpoint.manifest(path)["metadata"]
    restore(cfg, manifest["config"])
    check_combinations(cfg)
    device = resolve_device(cfg.device)
    tune_process(device)
    if cfg.env.from_pixels:
        select_gl()
    env = make_env(cfg.env, [EpisodeSeeds(cfg.seed, EVALUATION)], cfg.networks)
    sizes = env.observation_spec["observation"].shape, env.action_spec.shape[-1]
    env.close()
    agent = Agent(cfg, *sizes).to(device)
    load_checkpoint(path, agent=agent)
    dream_from = [int(number) for number in cfg.eval.dream_from.split(",") if number]
    evaluation = Evaluation(cfg, agent, rules)
    metrics, curves, pictures = evaluation(manifest["step"], cfg.eval.video, dream_from)
    evaluation.env.close()
    for number, value in enumerate(curves["return"], 1):
        print(f"episode {number}: return {value:.2f}")
    print(f"mean {metrics['eval/return']:.2f}, standard deviation {metrics['eval/return_std']:.2f}"
          f" over {cfg.eval.episodes} episodes, step {manifest['step']:,} of {path}")
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    folder, fps = run / f"evaluation_{manifest['step']:09d}", 40 / cfg.env.action_repeat
    folder.mkdir(exist_ok=True)
    numbers = metrics | {"returns": curves["return"]}
    write_text(folder / f"{cfg.eval.episodes}_episodes.json", json.dumps(numbers, indent=1) + "\n")
    for name, picture in pictures.items():
        if name == "dream_from":
            where = folder / f"dream_from_{dream_from[0]}_{dream_from[1]}.png"
            draw_dream(where, *picture, fps, cfg.env.action_repeat)
        else:
            draw_film(folder / f"{name}.mp4", name, picture, fps)
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")

def find_checkpoint(path):
    """The checkpoint itself, or the newest whole one of a run directory."""
    if path.is_dir() and not (path / "checkpoints").is_dir():
        raise UserError(f"eval.checkpoint={path} holds no checkpoints: name a run directory, or a"
                        " file in its checkpoints/")
    if not path.exists():
        raise UserError(f"eval.checkpoint={path} does not exist: `ls runs/*/checkpoints` shows"
                        " what there is")
    return next(whole_checkpoints(path if path.is_dir() else [path]))

def restore(cfg, saved):
    """Gives `cfg` what a checkpoint was trained with; `UserError` if the command line, or the
    checkpoint, says something else."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    wrong = [word for word in given if not word.lstrip("+").startswith(MAY_CHANGE)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: eval.checkpoint brings its own configuration: leave"
                        " this out")
    for key in flat(asdict(cfg)):
        if key.startswith(MAY_CHANGE):
            continue
        if key not in saved:
            raise UserError(f"the checkpoint knows no {key}: it comes from another version")
        *groups, name = key.split(".")
        setattr(functools.reduce(getattr, groups, cfg), name, saved[key])

# --- Doctor --------------------------------------------------------------------------------------
def check_versions():
    """The installed packages against requirements.txt; `UserError` names those that differ."""
    lines = Path(__file__).with_name("requirements.txt").read_text().split()
    pins, differ = dict(line.split("==") for line in lines), []
    for name, pin in pins.items():
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != pin:
            differ.append(f"{name} {found} (tested with {pin})")
    if differ:
        raise UserError(f"{', '.join(differ)}: pip install -r requirements.txt")
    return f"Python {sys.version.split()[0]}, {len(pins)} packages as in requirements.txt"

def check_picture(observation):
    """`UserError` if an image [64, 64, 3] has one colour only: OpenGL that draws nothing."""
    spread = int(observation.max()) - int(observation.min())
    if spread < 8:
        raise UserError("rendered images have one colour only: OpenGL does not draw; try another"
                        " MUJOCO_GL (egl, osmesa), or use env.from_pixels=false")
    return f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}, 64 x 64 image, {spread + 1} levels of grey"

def doctor(cfg, train):
    """Checks all that a run needs, measures its speed, prints a table; True if all is well."""
    device, seeds = resolve_device(cfg.device), EpisodeSeeds(cfg.seed, EVALUATION)

    def name_device():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return f"{device}: {name}, {torch.get_num_threads()} threads"

    def render():
        if not cfg.env.from_pixels:
            return "not needed: env.from_pixels=false"
        select_gl()
        return check_picture(make_env(cfg.env, [seeds], cfg.networks).reset()["observation"])

    def space():
        # A guess from above: the environment, which knows, may be what does not work.
        rows, layout = replay_rows(cfg, IMAGE if cfg.env.from_pixels else (128,), 32)
        needed = rows * sum(math.prod(shape) * kind.itemsize for shape, kind in layout.values())
        place = next(path for path in Path(cfg.run_dir).absolute().parents if path.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(f"the replay needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are"
                            " free: lower replay_buffer.capacity, or choose another run_dir")
        return f"replay {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"

    def dashboard():
        check_wandb(cfg)
        with tempfile.TemporaryDirectory() as folder:
            if cfg.logger.mode == "online":
                start_wandb(cfg, folder, None).finish()
        return f"logger.mode={cfg.logger.mode}"

    checks = {"versions": check_versions, "device": name_device,
              "precision": lambda: str(resolve_autocast(cfg.optimization.autocast, device)
                                       or torch.float32),
              "OpenGL": render, "disk": space, "wandb": dashboard,
              "speed": lambda: measure_speed(cfg, train)}  # fmt: skip
    fine = True
    for name, check in checks.items():
        try:
            print(f"ok      {name:<10} {check()}", flush=True)
        except UserError as error:
            print(f"problem {name:<10} {error}", flush=True)
            fine = False
    return fine

def measure_speed(cfg, train):
    """A sentence about the time that a run would take, from one episode and five updates."""
    with tempfile.TemporaryDirectory() as folder:
        trial = deepcopy(cfg)
        trial.run_dir, trial.doctor = f"{folder}/run", False
        trial.logger.mode, trial.logger.progress, trial.logger.video = "disabled", False, False
        trial.optimization.pretrain, trial.eval.every = 5, 0
        steps = cfg.env.n_parallel_envs * cfg.env.time_limit
        trial.collector.random_steps = trial.collector.total_steps = steps
        with contextlib.redirect_stdout(io.StringIO()):
            train(trial)
        row = json.loads(Path(folder, "run", "throughput.jsonl").read_text().splitlines()[-1])
    rates = row["throughput/environment_steps_per_second"], row["throughput/updates_per_second"]
    hours = cfg.collector.total_steps * (1 / rates[0] + cfg.optimization.train_ratio / rates[1])
    return (f"{rates[0]:.0f} environment steps/s, {rates[1]:.2f} updates/s: about"
            f" {hours / 3600:.1f} hours for {cfg.collector.total_steps:,} steps")

# --- A run ---------------------------------------------------------------------------------------
class Run:
    """Every part of a run, checked and built from the configuration, in the order of cost; goes on
    where the run in its directory was."""

    def __init__(self, cfg, collection_rule, evaluation_rules):
        self.cfg, self.step, self.before, self.updates = cfg, 0, 0, 0
        self.due, self.signal, self.handlers, self.unchecked = False, None, {}, []
        self.home = RunDirectory(cfg)
        try:
            check_versions()
        except UserError as error:
            print(f"not the tested versions: {error}")
        check_wandb(cfg)
        self.device = resolve_device(cfg.device)
        tune_process(self.device)
        self.autocast = resolve_autocast(cfg.optimization.autocast, self.device)
        if cfg.env.from_pixels:
            select_gl()
        elif "dm_control" not in sys.modules:
            os.environ["MUJOCO_GL"] = "disabled"  # states need no OpenGL, so none is imported
        for path in whole_checkpoints(self.home.path) if self.home.resumes else (None,):
            try:
                self.build(path, collection_rule, evaluation_rules)
                break
            except (DamageError, checkpoints.CheckpointError) as error:
                print(f"checkpoint {path} cannot be used ({error}): trying the one before")
        if not self.home.resumes:
            self.save()
            text = OmegaConf.to_yaml(OmegaConf.structured(cfg))
            write_text(self.home.path / "config.yaml", text)
        print(f"{'going on at step' if self.step else 'training from step'} {self.step:,} on"
              f" {self.device} in {self.autocast or torch.float32}, run in {self.home.path}")
        self.about = about(cfg, self.device, self.autocast)
        self.logger.start(self.step, {"run": self.about})
        self.card("running")
        if path:  # last, so that nothing above has drawn from them
            load_checkpoint(path, random=checkpoints.GlobalRNGState())
        self.listen()

    def build(self, path, collection_rule, evaluation_rules):
        """Builds all parts, with their states in the checkpoint `path` if there is one."""
        cfg, state = self.cfg, Kept()
        for generator in torch.manual_seed, np.random.seed, random.seed:
            generator(cfg.seed)
        if path:
            load_checkpoint(path, progress=state)
        copies, repeat = cfg.env.n_parallel_envs, cfg.env.action_repeat
        seeds, memory = resumed_episodes(cfg, state)
        env = make_env(cfg.env, seeds, cfg.networks, memory)
        sizes = env.observation_spec["observation"].shape[env.ndim :], env.action_spec.shape[-1]
        self.agent = Agent(cfg, *sizes).to(self.device)
        self.optimizers = build_optimizers(cfg.optimization, self.agent, self.autocast)
        self.home.claim()  # all that can be wrong with the configuration was seen by now
        rows, layout = replay_rows(cfg, *sizes)
        if path and state["replay"]["episodes"] > len(state["replay"]["table"]):
            rows = state["replay"]["rows"]  # a buffer that has overwritten rows cannot grow
        places = self.home.path / "replay", repeat, self.device, cfg.seed
        self.replay = Replay(cfg.replay_buffer, rows, layout, *places)
        self.logger = Logger(cfg, self.home.path, self.device)
        self.policy = Policy(self.agent, collection_rule)
        compile_steps(self.agent, cfg, self.device)
        phase = math.ceil(cfg.collector.train_every / (copies * repeat)) * copies
        self.collector = Collector(
            env, self.policy, frames_per_batch=phase, total_frames=-1, trust_policy=True,
            auto_register_policy_transforms=False)
        self.interaction = iter(self.collector)
        self.policy.random_steps = cfg.collector.random_steps // repeat  # the collector tried it
        self.evaluation = Evaluation(cfg, self.agent, evaluation_rules)
        if path:
            load_checkpoint(path, agent=self.agent, **self.optimizers)
            self.load_state_dict(state)

    def state_dict(self):
        """Counters, replay (but for its rows) and logger."""
        counters = {key: getattr(self, key) for key in ("step", "before", "updates")}
        return counters | {"random_steps": self.policy.random_steps,
                           "replay": self.replay.state_dict(), "logger": self.logger.state_dict()}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        for key in "step", "before", "updates":
            setattr(self, key, state[key])
        self.policy.random_steps = state["random_steps"]
        self.replay.load_state_dict(state["replay"])
        self.logger.load_state_dict(state["logger"])

    def collect(self):
        """Adds the transitions of the next interaction phase to the replay."""
        try:
            with one_thread():
                transitions = next(self.interaction)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"acting in the environment failed after step {self.step} ({reason});"
                            " the same command goes on from the last checkpoint") from error
        if self.step == 0 and self.cfg.env.from_pixels:
            check_picture(transitions["observation"].flatten(0, -4)[0])
        self.logger.episodes += self.replay.extend(transitions)
        self.before = self.step
        self.step += transitions.numel() * self.cfg.env.action_repeat

    def learned(self, batch, metrics):
        """Counts an update; `UserError` if its numbers are not finite (a GPU is one ahead)."""
        self.updates += 1
        self.logger.updates.append(metrics)
        self.unchecked.append((self.updates, batch, metrics))
        while len(self.unchecked) > (self.device.type == "cuda"):
            check_finite(*self.unchecked.pop(0), self.autocast, self.home.path)

    def report(self):
        """Evaluation, video and metrics, as far as they are due since the last report."""
        if self.before != self.step:
            every, last = self.cfg.checkpoint.every, self.step >= self.cfg.collector.total_steps
            self.logger.report(self.step, self.before, self.updates, self.evaluation)
            self.due = last or self.before // every != self.step // every
            self.before = self.step

    def goes_on(self):
        """Saves if that is due; false at the end of the run, or after a signal."""
        for name, weight in self.agent.named_parameters():
            if not weight.isfinite().all():  # the simulator would only name actions
                raise UserError(f"{name} is not finite after update {self.updates}: the last"
                                f" finite weights are in {self.home.path / 'checkpoints'}; lower"
                                " the learning rates, or use optimization.autocast=false")
        if self.due or self.signal:
            self.save()
            self.card("running")
        self.due = False
        return not self.signal and self.step < self.cfg.collector.total_steps

    def save(self):
        """Saves everything that the next step depends on."""
        parts = {"agent": self.agent, **self.optimizers, "progress": self,
                 "random": checkpoints.GlobalRNGState()}
        self.replay.forget(self.home.save(self.step, self.replay.episodes, **parts))

    def card(self, state):
        """Writes run.json, the run in numbers, and returns it."""
        card = {"state": state, "environment_steps": self.step, "updates": self.updates}
        card |= self.about | results(self.home.path)
        write_text(self.home.path / "run.json", json.dumps(card, indent=1) + "\n")
        return card

    def listen(self):
        """Lets a first signal end the run at the next update; a second Ctrl-C ends it at once."""

        def ask(number, frame):
            if self.signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self.signal = self.signal or number
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving after this update\n".encode())  # print may be busy

        if threading.current_thread() is threading.main_thread():
            for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR2:
                self.handlers[number] = signal.signal(number, ask)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Stops the environments and ends the logs; after a signal, so does the process."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.collector.shutdown()
        self.replay.ahead.shutdown()
        self.evaluation.env.close()
        self.logger.close(hurry=kind is KeyboardInterrupt)
        if not kind:
            print(summary(self.cfg, self.card("stopped" if self.signal else "finished")))
        self.home.lock.close()
        if self.signal and not kind:
            print(f"saved at step {self.step:,}: the same command goes on", file=sys.stderr)
            if self.signal == signal.SIGUSR2 and callable(handler := self.handlers[self.signal]):
                handler(self.signal, None)  # submitit's, which puts the job into the queue again
            raise SystemExit(128 + self.signal)

def about(cfg, device, autocast):
    """What a result depends on: code, versions, machine, configuration."""
    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True)
            return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    decisive = {key: value for key, value in flat(asdict(cfg)).items()
                if not key.startswith(MAY_CHANGE)}  # fmt: skip
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {name: metadata.version(name) for name in ("torch", "torchrl", "dm_control")}
    return {"name": cfg.name, "task": f"{cfg.env.name} {cfg.env.task}".strip(), "seed": cfg.seed,
            "git_revision": git("rev-parse", "HEAD"),
            "git_dirty": None if changes is None else bool(changes),
            "config_hash": hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12],
            "versions": versions | {"python": platform.python_version()},
            "device": f"{device.type}: {name}, {os.cpu_count()} cores",
            "precision": str(autocast or torch.float32)}  # fmt: skip

def results(directory):
    """Returns, wall time and speed of a run, from its files, however often it was stopped."""
    def rows(name):
        return [json.loads(row) for row in (directory / name).read_text().splitlines()]

    times, updates = rows("throughput.jsonl"), 0
    spent = {phase: sum(row.get(f"throughput/{phase}_seconds", 0) for row in times)
             for phase in ("collect", "update", "evaluate")}  # fmt: skip
    updates, steps = (times[-1][key] if times else 0 for key in ("updates", "environment_steps"))
    numbers = {"wall_seconds": round(sum(spent.values()), 1)}
    if spent["update"] and spent["collect"]:
        numbers |= {"updates_per_second": round(updates / spent["update"], 3),
                    "environment_steps_per_second": round(steps / spent["collect"], 1)}
    evaluations = [row for row in rows("metrics.jsonl") if "eval/return" in row][-5:]
    if evaluations:
        returns, last = [row["eval/return"] for row in evaluations], evaluations[-1]
        numbers |= {"eval_return": last["eval/return"], "eval_steps": last["environment_steps"],
                    "last_returns_mean": float(np.mean(returns)),
                    "last_returns_std": float(np.std(returns)), "last_returns": len(returns),
                    "published_mean": last.get("eval/published_mean")}  # fmt: skip
    return numbers

def summary(cfg, card):
    """What there is to know and to do at the end of a run."""
    place, known = cfg.run_dir, round(card.get("published_mean") or 0)
    said = [f"{card['state']} at {card['environment_steps']:,} environment steps and"
            f" {card['updates']:,} updates, after {card['wall_seconds'] / 3600:.2f} hours"]
    if "eval_return" in card:
        said += [f"evaluation return {card['eval_return']:.1f} at step {card['eval_steps']:,}, the"
                 f" last {card['last_returns']}: {card['last_returns_mean']:.1f} +-"
                 f" {card['last_returns_std']:.1f}" + f", published mean {known}" * bool(known)]
    typed = Path(sys.argv[0]).name == "dreamer.py"
    words = sys.argv[1:] if typed else [f"run_dir={place}", "..."]
    if card["state"] == "finished":  # the same command would only say so again
        words = [word for word in words if not word.startswith("collector.total_steps=")]
        words += [f"collector.total_steps={2 * cfg.collector.total_steps}"]
    shown = "panel.png metrics.jsonl curves.jsonl run.json checkpoints replay videos wandb".split()
    said += [f"in {place}: {', '.join(name for name in shown if Path(place, name).exists())}",
             f"go on:    python dreamer.py {shlex.join(words)}",
             f"evaluate: python dreamer.py eval.checkpoint={place} eval.episodes=10",
             f"plot:     python benchmarks/plot.py {place}"]  # fmt: skip
    return "\n".join(said)

class Kept(dict):
    """The state of a part that is not built yet."""

    def state_dict(self):
        return self

    def load_state_dict(self, state):
        self.update(state)

def resumed_episodes(cfg, state):
    """`EpisodeSeeds` of each copy of the environment, and the agent's memory in the episodes that
    were under way (None at the start of a run)."""
    replay = state.get("replay", {"pending": {}, "finished": {}})
    seeds, memories = [], []
    for copy in range(cfg.env.n_parallel_envs):
        steps = replay["pending"].get(copy)
        taken = () if steps is None else steps["action"]
        seeds.append(EpisodeSeeds(cfg.seed, copy, replay["finished"].get(copy, 0), taken))
        names = "state", "belief", "previous_action"
        memories.append(steps and {name: steps["next"][name][-1] for name in names})
    if not any(memories):
        return seeds, None
    fresh = {name: torch.zeros_like(value) for name, value in next(filter(None, memories)).items()}
    memory = [TensorDict(each or fresh) for each in memories]
    return seeds, memory[0] if len(memory) == 1 else torch.stack(memory)

def check_finite(update, batch, metrics, autocast, directory):
    """Raises `UserError` if a loss or a gradient of an update is not finite, and keeps its batch.
    With float16 a gradient may overflow: loss scaling then skips the step."""
    names = [name for name in metrics if autocast != torch.float16 or "grad_norm" not in name]
    finite = torch.stack([metrics[name] for name in names]).isfinite()
    if not finite.all():
        name = next(name for name, fine in zip(names, finite.tolist()) if not fine)
        path = directory / f"not_finite_{update}.pt"
        write(path, torch.save, {"batch": batch.cpu().to_dict(), "metrics": metrics})
        raise UserError(f"{name} is not finite in update {update}: its batch is in {path}, the"
                        f" last finite weights are in {directory / 'checkpoints'}; lower the"
                        " learning rates, or use optimization.autocast=false")
