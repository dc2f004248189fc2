"""Tasks of the DeepMind Control Suite and of Gymnasium, all under the same protocol.

An agent step repeats its action, sums the rewards and renders once. Actions are in [-1, 1],
images are uint8 [64, 64, 3], and the time limit is a truncation, not an end.
"""

import logging
import os

import dm_env
import numpy as np
import torch
from torch import nn

from common.episodes import ResumableEnv
from common.errors import UserError
from common.opengl import no_opengl
from common.signals import end_with

with no_opengl():  # else TorchRL loads it with mujoco, also where nothing is rendered
    from torchrl import envs

IMAGE = (64, 64, 3)  # height, width, channels: the only size that the paper's convolutions take


class SuiteEpisodes:
    """A Control Suite task with action repeat, own seeds, and one render per agent step.

    The pixels are those of rendering at every physics step, in half the time. Keeping the camera
    and an off-screen buffer of the image's size saves a quarter of a render. `camera=None` gives
    the flat state.
    """

    def __init__(self, env, seeds, action_repeat, camera=None):
        self._env, self._seeds, self._repeat, self._camera = env, seeds, action_repeat, None
        self._spec = env.observation_spec().get("observations")
        if camera is not None:
            from dm_control.mujoco.engine import Camera

            height, width, _ = IMAGE
            screen = env.physics.model.vis.global_
            screen.offheight, screen.offwidth = height, width
            self._spec = dm_env.specs.Array(IMAGE, np.uint8)
            self._camera = Camera(
                env.physics, height, width, camera, scene_callback=self._use_own_opengl
            )

    def reset(self):
        """Starts the next episode, whose seed is its own."""
        self._env.task._random = np.random.RandomState(next(self._seeds))  # no public way to seed
        return self._observe(self._env.reset())

    def step(self, action):
        """Repeats the action, and sums the rewards."""
        reward = 0.0
        for _ in range(self._repeat):
            time_step = self._env.step(action)
            reward += time_step.reward
            if time_step.last():
                break
        return self._observe(time_step._replace(reward=reward))

    def _observe(self, time_step):
        if self._camera is None:
            observation = time_step.observation["observations"]
        else:
            observation = self._camera.render().copy()
        return time_step._replace(observation={"observation": observation})

    def _use_own_opengl(self, *_):
        """Draws where this environment draws, whatever the process rendered since.

        dm_control sees its own OpenGL contexts only: after an environment of Gymnasium it would
        draw in that one's, and after the end of one nowhere, which leaves the picture as it was.
        """
        context = self._env.physics.contexts.gl
        with context.make_current() as thread:
            thread.call(context._platform_make_current)

    def close(self):
        """Frees what MuJoCo has drawn with where it was made, not in another environment's."""
        if self._camera is not None:
            self._use_own_opengl()
            self._env.physics.free()
            self._camera = None
        self._env.close()

    def observation_spec(self):
        """The image or the flat state."""
        return {"observation": self._spec}

    def __getattr__(self, name):
        return getattr(self._env, name)


def make_suite_env(cfg, seeds):
    """A Control Suite task as a TorchRL environment; `UserError` names those that exist."""
    from dm_control import suite
    from dm_control.suite.wrappers import pixels

    domains = suite.TASKS_BY_DOMAIN
    if cfg.name not in domains:
        raise UserError(f"env.name={cfg.name}: choose one of {', '.join(sorted(domains))}")
    if cfg.task not in domains[cfg.name]:
        raise UserError(f"env.task={cfg.task}: choose one of {', '.join(domains[cfg.name])}")
    env = suite.load(cfg.name, cfg.task, None, {"flat_observation": not cfg.from_pixels})
    camera = None
    if cfg.from_pixels:
        camera = cfg.camera
        if camera < 0:
            camera = 2 if cfg.name == "quadruped" else 0
        if camera >= env.physics.model.ncam:
            cameras = env.physics.model.ncam
            raise UserError(f"env.camera={camera}: {cfg.name} has {cameras} cameras")
    env = SuiteEpisodes(env, seeds, cfg.action_repeat, camera)
    pixels.Wrapper.register(SuiteEpisodes)  # the one wrapper that TorchRL takes around a task
    return envs.DMControlWrapper(env)


def mujoco_viewer(env):
    """What draws a MuJoCo task of Gymnasium; None before its first picture and for other tasks."""
    return getattr(getattr(env, "mujoco_renderer", None), "viewer", None)


def gymnasium_episodes(env, cfg, seeds):
    """A Gymnasium task under our protocol; a class in a function, for the import is a late one."""
    import gymnasium

    class GymnasiumEpisodes(gymnasium.Wrapper):
        """Action repeat, own seeds, and 64 x 64 images by area averaging if asked for."""

        def reset(self, **_):
            """Starts the next episode, whose seed is its own."""
            observation, info = self.env.reset(seed=next(seeds))
            return self.observe(observation), info

        def step(self, action):
            """Repeats the action, and sums the rewards."""
            total = 0.0
            for _ in range(cfg.action_repeat):
                observation, reward, terminated, truncated, info = self.env.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
            return self.observe(observation), total, terminated, truncated, info

        def observe(self, observation):
            """The image if pixels are asked for, else the state."""
            if not cfg.from_pixels:
                return observation
            self.use_own_opengl()
            image = torch.as_tensor(self.env.render().copy()).movedim(-1, 0)[None].float()
            image = nn.functional.interpolate(image, IMAGE[:2], mode="area")[0]
            return image.round().byte().movedim(0, -1).contiguous().numpy()

        def use_own_opengl(self):
            """Draws where this environment draws, whatever the process rendered since."""
            viewer = mujoco_viewer(self.unwrapped)
            if viewer is not None:
                viewer.make_context_current()
            return viewer

        def close(self):
            """Frees what MuJoCo has drawn with while its own OpenGL context is there.

            Left to the garbage collector, it would delete the buffers of the same numbers in
            another environment's context, whose pictures would be black from then on.
            """
            viewer = self.use_own_opengl()
            if viewer is not None:
                viewer.con.free()
            super().close()

    return GymnasiumEpisodes(env)


def make_gymnasium_env(cfg, seeds):
    """A Gymnasium task with continuous actions; `UserError` if it cannot be used."""
    import gymnasium
    from gymnasium.spaces import Box

    try:
        words = {"render_mode": "rgb_array"} if cfg.from_pixels else {}
        env = gymnasium_episodes(gymnasium.make(cfg.name, **words), cfg, seeds)
    except Exception as error:  # unknown id, missing package: each backend raises its own kind
        reason = " ".join(str(error).split())
        raise UserError(f"env.name={cfg.name} cannot be made by gymnasium: {reason}") from None
    if not isinstance(env.action_space, Box) or not env.action_space.is_bounded():
        raise UserError(
            f"env.name={cfg.name} has discrete or unbounded actions, which are out of"
            " scope: choose a task with bounded continuous (Box) actions"
        )
    if cfg.from_pixels:
        env.observation_space = Box(0, 255, IMAGE, np.uint8)
        render_fixed_state(cfg, env)
    elif not isinstance(env.observation_space, Box) or len(env.observation_space.shape) != 1:
        raise UserError(f"env.name={cfg.name} has no flat state vector: use env.from_pixels=true")
    return envs.GymWrapper(env)


def render_fixed_state(cfg, env):
    """Renders a first time after a reset with seed 0; `UserError` if nothing can be rendered.

    Gymnasium's viewer points its free camera at the first state that a process renders. This one
    is the same in every process, so that all see the same pictures.
    """
    try:
        env.env.reset(seed=0)
        env.observe(None)
    except Exception as error:  # a missing package, say: each backend raises its own kind
        reason = " ".join(str(error).split())
        raise UserError(
            f"env.name={cfg.name} cannot be rendered ({reason}): install what is missing, or use"
            " env.from_pixels=false"
        ) from None


BACKENDS = {"dm_control": make_suite_env, "gymnasium": make_gymnasium_env}


def make_task(cfg, seeds):
    """One environment: actions in [-1, 1], float32, a truncation at the time limit.

    Args:
        cfg: the configuration's section `env`.
        seeds: `EpisodeSeeds` of this environment.
    """
    env = BACKENDS[cfg.backend](cfg, seeds)
    transforms = [
        envs.ActionScaling(),
        envs.DoubleToFloat(),
        envs.StepCounter(cfg.time_limit // cfg.action_repeat),
    ]
    if "pixels" in env.observation_spec.keys():  # TorchRL's name for an image of Gymnasium
        transforms.append(envs.RenameTransform(["pixels"], ["observation"]))
    return ResumableEnv(env, envs.Compose(*transforms), seeds)


class WorkerTask:
    """Builds a task in a process of its own, which ends with the process that made this object."""

    def __init__(self, cfg, seeds):
        self.cfg, self.seeds, self.parent = cfg, seeds, os.getpid()

    def __call__(self):
        if os.getpid() != self.parent:  # TorchRL also builds one in the parent, to look at it
            end_with(self.parent)
            quiet_libraries()
            # Mesa's own threads would want the cores of the other copies; pixels stay the same.
            os.environ.setdefault("LP_NUM_THREADS", "0")
        return make_task(self.cfg, self.seeds)


def quiet_libraries():
    """absl and TorchRL warn of what is meant here; their errors are still shown."""
    for name in ("absl", "torchrl"):
        logging.getLogger(name).setLevel(logging.ERROR)
