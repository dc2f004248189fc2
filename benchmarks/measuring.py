"""What all measurements share: configuration, made-up batches, clocks, peak memory."""

import functools
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf

import dreamer_utils as utils

ROOT = Path(__file__).resolve().parents[1]
STATES = 17  # numbers of one observation of cheetah without pixels
ACTIONS = 6
RENDERER = """
import mujoco
context = mujoco.GLContext(8, 8)
context.make_current()
from OpenGL import GL
print(*(GL.glGetString(name).decode() for name in (GL.GL_VENDOR, GL.GL_RENDERER)), sep=", ")
context.free()
"""
AUTOCAST = {"float32": "false", "bfloat16": "bfloat16"}  # precision -> optimization.autocast


def configuration(*overrides):
    """Our configuration with some keys changed; no dashboard, no progress bar."""
    quiet = ["logger.mode=disabled", "logger.progress=false"]
    if hasattr(utils, "register_configs"):  # commits before it (compare_commits.py) need none
        utils.register_configs()
    with hydra.initialize(config_path=None, version_base="1.3"):
        return utils.load_config(hydra.compose("config", [*quiet, *overrides]))


def laptop_sizes():
    """The overrides that give networks, batches and dreams of the laptop preset."""
    preset = OmegaConf.load(ROOT / "config_laptop.yaml")
    sections = ("replay_buffer", "networks", "optimization")
    return [f"{name}.{key}={value}" for name in sections for key, value in preset[name].items()]


def set_threads(threads):
    """Sets the number of threads of PyTorch, if it is given."""
    if threads:
        torch.set_num_threads(threads)


def make_rows(observation, batch, length, device):
    """Replay rows with made-up content: observation, action, reward, all [B, L, ...]."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    shape = (batch, length, 64, 64, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    seen = pixels if observation == "pixels" else draw(batch, length, STATES)
    action = draw(batch, length, ACTIONS).clamp(-1, 1)
    return [value.to(device) for value in (seen, action, draw(batch, length))]


def find_renderer(backend):
    """Who renders with MUJOCO_GL=`backend`, as OpenGL says it; or why nothing does."""
    env = os.environ | {"MUJOCO_GL": backend}
    env.pop("PYOPENGL_PLATFORM", None)  # follows from MUJOCO_GL
    done = subprocess.run(
        [sys.executable, "-c", RENDERER], env=env, capture_output=True, text=True
    )
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return said[-1] if said else f"exit {done.returncode}"


def synchronize(device):
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device):
    """The most memory that this process has held: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Clock:
    """Seconds of the phases of an update: `clock(name)` ends one, and waits for a GPU."""

    def __init__(self, device):
        self.device, self.on, self.phases, self.last = device, False, {}, 0.0

    def start(self, on):
        """Starts the first phase; a clock that is not `on` does nothing."""
        synchronize(self.device)
        self.on, self.phases, self.last = on, {}, time.perf_counter()

    def __call__(self, name):
        if self.on:
            synchronize(self.device)
            now = time.perf_counter()
            self.phases[name] = self.phases.get(name, 0.0) + now - self.last
            self.last = now

    def after(self, function, name):
        """The same function, which ends the phase `name` when it returns."""

        @functools.wraps(function)
        def clocked(*args, **kwargs):
            result = function(*args, **kwargs)
            self(name)
            return result

        return clocked
