"""What the paper puts in its appendix: configuration, environments, networks, optimisation,
replay, evaluation, logging. Each part is TorchRL's own, set by its own knobs."""

import contextlib
import ctypes
import functools
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, is_dataclass, make_dataclass
from pathlib import Path
from unittest import mock

import dm_env
import numpy as np
import torch
import wandb
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModuleBase
from torch import nn
from tqdm import tqdm

with mock.patch.dict(os.environ, MUJOCO_GL="disabled"):  # else TorchRL loads OpenGL with mujoco
    from torchrl import envs, modules
    from torchrl.collectors import Collector
    from torchrl.data import LazyMemmapStorage, ReplayBuffer, SliceSampler, Unbounded
    from torchrl.record.loggers.wandb import WandbLogger

for name in ("absl", "torchrl"):  # both warn of what is meant here
    logging.getLogger(name).setLevel(logging.ERROR)
IMAGE = (64, 64, 3)  # height, width, channels: the only size that the paper's convolutions take

# --- Configuration -------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake that one sentence explains and the user can mend; shown without a traceback."""

def schema(name, values):
    """The dataclass that has the keys and the types of `values`; Hydra checks both against it."""
    fields = [(key, schema(key, value) if isinstance(value, dict) else type(value))
              for key, value in values.items() if key not in ("defaults", "hydra")]
    return make_dataclass(name, fields)

# Hydra gets the files by name: told to look in this directory, --help would walk all of .venv.
for path in Path(__file__).parent.glob("config*.yaml"):
    ConfigStore.instance().store(path.stem, OmegaConf.load(path))
DEFAULTS = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("config.yaml")))
ConfigStore.instance().store("schema", schema("Config", DEFAULTS))
CHOICES = {
    "env.backend": ("dm_control", "gymnasium"),
    "optimization.autocast": ("auto", "false", "true", "bfloat16", "float16"),
    "logger.mode": ("offline", "online", "disabled", "dryrun"),
}
HIGHEST = {"optimization.gamma": 1, "optimization.lambda_": 1}
LOWEST = {"env.camera": -1, "replay_buffer.batch_length": 2, "optimization.horizon": 2} | {
    key: 0 for key in (
        "seed", "collector.exploration_noise", "evaluation.every", "optimization.pretrain",
        "optimization.train_ratio", "optimization.kl_scale", "optimization.free_nats",
        "optimization.gamma", "optimization.lambda_", "optimization.discount_scale")}

def load_config(cfg):
    """Turns Hydra's config into a dataclass; `UserError` names the first thing that is wrong."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    config.optimization.autocast = config.optimization.autocast.lower()
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
        (env.from_pixels or not config.logger.video,
         "logger.video=true needs env.from_pixels=true: a state vector makes no film"),
    ]
    for fine, sentence in rules:
        if not fine:
            raise UserError(sentence)

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
    """The seeds of the episodes of one copy of the environment: no reset depends on the past."""

    def __init__(self, seed, copy, episode=0):
        self.seed, self.copy, self.episode = seed, copy, episode

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
    return envs.TransformedEnv(env, envs.Compose(*parts))

def make_env(cfg, seeds, networks):
    """A copy of the environment for each of `seeds` (each in its own process if several), with the
    agent's memory, 0 after a reset: `state` [S], `belief` [D] and the executed action [A]."""
    make = [functools.partial(single_env, cfg, each) for each in seeds]
    several = len(make) > 1
    env = envs.TransformedEnv(envs.ParallelEnv(len(make), make)) if several else make[0]()
    sizes = {"state": networks.state_dim, "belief": networks.belief_dim,
             "previous_action": env.action_spec.shape[-1]}
    memory = {name: Unbounded(size) for name, size in sizes.items()}
    return env.append_transform(envs.TensorDictPrimer(memory, expand_specs=True))

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
        return observation.movedim(-1, -3).to(dtype) / 255 - 0.5

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
        self.apply(initialise)

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
        self.adam = torch.optim.Adam(self.parameters, lr, fused=device == "cuda")
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

def accelerate(function, device, dtype):
    """The same function under autocast: the only place that knows about precision."""

    @functools.wraps(function)
    def accelerated(*args):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return function(*args)

    return accelerated

# --- Acting and replay ---------------------------------------------------------------------------
class Policy(TensorDictModuleBase):
    """A TorchRL policy from a rule (agent, observation, previous action, state, belief, noise) ->
    (action, state, belief), all [n, ...]; the memory travels with the environment. `samples`: (K,)
    if the rule chooses from K actions. The first `random_steps` agent steps act at random."""

    in_keys = ["observation", "previous_action", "state", "belief"]
    out_keys = ["action", ("next", "previous_action"), ("next", "state"), ("next", "belief")]

    def __init__(self, agent, rule, samples=(), random_steps=0):
        super().__init__()
        self.agent, self.rule, self.samples, self.random_steps = agent, rule, samples, random_steps

    @torch.no_grad()
    def forward(self, tensordict):
        lead, size = tensordict.batch_size, self.agent.world_model.sizes
        device, n = self.agent.world_model.prior.rnn.weight_ih.device, lead.numel()
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

def replay_rows(cfg, observation_shape, action_dim, directory):
    """Rows that the replay holds; prints bytes needed and free, `UserError` if they cannot fit."""
    steps = min(cfg.replay_buffer.capacity, cfg.collector.total_steps)
    rows = math.ceil(steps / cfg.env.action_repeat + steps / cfg.env.time_limit)  # and resets
    bytes_each = math.prod(observation_shape) * (1 if cfg.env.from_pixels else 4)
    needed = rows * (bytes_each + 4 * action_dim + 4 + 1 + 8) / 1e9  # ... reward, end, episode
    free = shutil.disk_usage(directory).free / 1e9
    print(f"replay: {needed:.2f} GB for {steps:,} environment steps, {free:.1f} GB free")
    if needed > free:
        raise UserError(f"the replay needs {needed:.2f} GB and {directory} has {free:.1f} GB free:"
                        " lower replay_buffer.capacity, or choose another run_dir")
    return rows

class Replay:
    """Finished episodes as rows on disk (see the time grid in dreamer.py), observations once;
    sampled in sequences that never cross an episode."""

    def __init__(self, cfg, rows, directory, action_repeat, device):
        self.length, self.device, self.repeat = cfg.batch_length, device, action_repeat
        self.episodes, self.longest, self.pending = 0, 0, {}
        self.buffer = ReplayBuffer(
            storage=LazyMemmapStorage(rows, scratch_dir=directory), batch_size=cfg.batch_size,
            sampler=SliceSampler(slice_len=self.length, traj_key="episode", truncated_key=None,
                                 strict_length=True))

    def extend(self, transitions):
        """Adds transitions [T] or [copies, T]; returns (return, length) of episodes they end."""
        finished = []
        for copy, part in enumerate(transitions.reshape(-1, transitions.shape[-1])):
            ends = part["next", "done"].flatten().nonzero().flatten() + 1
            for piece in part.tensor_split(ends.tolist()):
                self.pending.setdefault(copy, []).append(piece.clone())
                if piece["next", "done"].any():
                    finished.append(self.add_episode(torch.cat(self.pending.pop(copy))))
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
        self.buffer.extend(TensorDict(rows, batch_size=[len(steps) + 1]))
        self.episodes, self.longest = self.episodes + 1, max(self.longest, len(steps) + 1)
        return float(after["reward"].double().sum()), len(steps) * self.repeat

    def sample(self):
        """A batch [B, L] on the training device; `UserError` if no episode is that long."""
        if self.longest < self.length:
            raise UserError(f"no episode has replay_buffer.batch_length={self.length} rows (the"
                            f" longest has {self.longest}): lower replay_buffer.batch_length, or"
                            " raise collector.random_steps")
        batch = self.buffer.sample().reshape(-1, self.length)
        return batch.exclude("episode", "index").to(self.device)

# --- Evaluation and logging: nothing here changes what is learned --------------------------------
class Evaluation:
    """Plays episodes with the evaluation policy, in an environment and with noise of its own."""

    def __init__(self, cfg, policy):
        self.cfg, self.policy, self.seeds = cfg, policy, EpisodeSeeds(cfg.seed, EVALUATION)
        self.env = make_env(cfg.env, [self.seeds], cfg.networks)

    def __call__(self, step):
        """Metrics, and observations [T+1, ...] of the first episode; a step has its episodes."""
        repeat, threads = self.cfg.env.action_repeat, torch.get_num_threads()
        torch.set_num_threads(1)
        with torch.random.fork_rng():
            self.seeds.episode = step
            torch.manual_seed(next(self.seeds))
            episodes = [self.env.rollout(self.cfg.env.time_limit // repeat, self.policy)
                        for _ in range(self.cfg.evaluation.episodes)]
        torch.set_num_threads(threads)
        returns = [episode["next", "reward"].double().sum().item() for episode in episodes]
        length = sum(len(episode) for episode in episodes) * repeat / len(episodes)
        metrics = {"eval/return": sum(returns) / len(returns), "eval/length": length,
                   "eval/return_std": float(np.std(returns))}
        one = episodes[0]
        return metrics, torch.cat([one["observation"][:1], one["next", "observation"]])

class Logger:
    """One row of metrics at a time, to metrics.jsonl and wandb, and a progress bar."""

    def __init__(self, cfg, directory, device):
        self.cfg, self.directory, self.hint = cfg, directory, device.type == "cpu"
        self.updates, self.episodes, self.seconds = [], [], {}  # since the last row
        self.last_row, self.evaluations, self.wandb = 0, 0, None
        self.rows = (directory / "metrics.jsonl").open("a", buffering=1)
        if cfg.logger.mode != "disabled":
            os.environ.setdefault("WANDB_SILENT", "true")
            self.wandb = WandbLogger(
                cfg.name, offline=cfg.logger.mode != "online", save_dir=str(directory),
                project=cfg.logger.project, log_env_packages=False, config=asdict(cfg)).experiment
            self.wandb.define_metric("*", step_metric="environment_steps")
        self.bar = tqdm(total=cfg.collector.total_steps, unit="step", smoothing=0.05,
                        disable=not cfg.logger.progress)

    @contextlib.contextmanager
    def clock(self, phase):
        """Adds the wall time of its block to `phase`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def report(self, step, before, updates, episodes, evaluation):
        """All that is due between the steps `before` and `step`: evaluation, video, one row."""
        cfg, metrics, last = self.cfg, {}, step >= self.cfg.collector.total_steps
        self.episodes += episodes
        if episodes:
            self.bar.set_postfix({"return": episodes[-1][0], "updates": updates}, refresh=False)
        every = cfg.evaluation.every or step + 1
        if updates and (before // every != step // every or last and cfg.evaluation.every):
            with self.clock("evaluate"):
                scores, observations = evaluation(step)
            metrics |= scores
            self.bar.write(f"step {step:,}: evaluation return {scores['eval/return']:.1f}")
            self.evaluations += 1
            if cfg.logger.video and self.evaluations % cfg.logger.video_every == 0:
                self.video(step, observations)
        self.bar.update(step - before)
        if metrics or last or before // cfg.logger.every != step // cfg.logger.every:
            self.write(step, updates, metrics)

    def write(self, step, updates, metrics):
        """Writes `metrics`, means over the updates and episodes since the last row, and times."""
        seconds, count = self.seconds, len(self.updates)
        if self.episodes:
            means = np.mean(self.episodes, 0).tolist()
            metrics |= {"train/return": means[0], "train/length": means[1]}
        for name in self.updates[0] if count else ():
            metrics[name] = torch.stack([row[name] for row in self.updates]).mean().item()
        metrics |= {f"throughput/{phase}_seconds": value for phase, value in seconds.items()}
        rate = (step - self.last_row) / seconds["collect"]
        metrics["throughput/environment_steps_per_second"] = rate
        if count:
            metrics["throughput/updates_per_second"] = count / seconds["update"]
        row = {"environment_steps": step, "agent_steps": step // self.cfg.env.action_repeat,
               "updates": updates, **metrics}
        self.rows.write(json.dumps(row) + "\n")
        if self.wandb:
            self.wandb.log(row)
        if count and self.hint:
            self.hint = False  # once is enough
            each = self.cfg.optimization.train_ratio * seconds["update"] / count + 1 / rate
            hours = (self.cfg.collector.total_steps - step) * each / 3600
            self.bar.write(f"about {hours:.1f} hours to go on this CPU" + (hours > 2) * (
                "; a smaller run: python dreamer.py --config-name config_laptop"))
        self.updates, self.episodes, self.seconds, self.last_row = [], [], {}, step

    def video(self, step, observations):
        """Saves [T, 64, 64, 3] uint8 as an mp4 in the run directory, and shows it on wandb."""
        from moviepy import ImageSequenceClip
        path = self.directory / "videos" / f"evaluation_{step:09d}.mp4"
        path.parent.mkdir(exist_ok=True)
        frames = observations.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
        film = ImageSequenceClip(list(frames), fps=40 / self.cfg.env.action_repeat)
        film.write_videofile(str(path), codec="libx264", logger=None)
        if self.wandb:
            self.wandb.log({"environment_steps": step, "eval/video": wandb.Video(str(path))})

    def close(self):
        """Ends the progress bar, the metrics file and the wandb run."""
        self.bar.close()
        self.rows.close()
        if self.wandb:
            self.wandb.finish()

# --- A run ---------------------------------------------------------------------------------------
class Run:
    """Every part of a run, checked and built from the configuration, in the order of cost."""

    def __init__(self, cfg, collection_rule, evaluation_rule):
        self.cfg, directory = cfg, Path(cfg.run_dir)
        if (directory / "metrics.jsonl").exists():
            raise UserError(f"{directory} holds a run: choose another name=..., or remove it")
        self.device = resolve_device(cfg.device)
        tune_process(self.device)
        self.autocast = resolve_autocast(cfg.optimization.autocast, self.device)
        if cfg.env.from_pixels:
            select_gl()
        elif "dm_control" not in sys.modules:
            os.environ["MUJOCO_GL"] = "disabled"  # states need no OpenGL, so none is imported
        torch.manual_seed(cfg.seed)
        copies, repeat = cfg.env.n_parallel_envs, cfg.env.action_repeat
        seeds = [EpisodeSeeds(cfg.seed, copy) for copy in range(copies)]
        env = make_env(cfg.env, seeds, cfg.networks)
        sizes = env.observation_spec["observation"].shape[env.ndim :], env.action_spec.shape[-1]
        self.agent = Agent(cfg, *sizes).to(self.device)
        self.optimizers = build_optimizers(cfg.optimization, self.agent, self.autocast)
        phase = math.ceil(cfg.collector.train_every / (copies * repeat)) * copies
        policy = Policy(self.agent, collection_rule, (), cfg.collector.random_steps // repeat)
        threads = torch.get_num_threads()  # idle ones spin, which slows a software renderer
        self.collector = Collector(
            env, policy, frames_per_batch=phase, total_frames=-1, trust_policy=True,
            auto_register_policy_transforms=False,
            pre_collect_hook=functools.partial(torch.set_num_threads, 1),
            post_collect_hook=lambda _: torch.set_num_threads(threads))
        self.evaluation = Evaluation(cfg, Policy(self.agent, evaluation_rule, (100,)))
        directory.mkdir(parents=True, exist_ok=True)
        rows = replay_rows(cfg, *sizes, directory)
        self.replay = Replay(cfg.replay_buffer, rows, directory / "replay", repeat, self.device)
        OmegaConf.save(OmegaConf.structured(cfg), directory / "config.yaml")
        print(f"training on {self.device} in {self.autocast or torch.float32}, run in {directory}")
        self.logger = Logger(cfg, directory, self.device)

    def close(self):
        """Stops the environments and ends the logs."""
        self.collector.shutdown()
        self.evaluation.env.close()
        self.logger.close()
