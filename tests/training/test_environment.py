"""Environments: the official protocol, at half the rendering."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from dm_control.rl.control import Environment
from torchrl.envs import check_env_specs

import dreamer_utils as utils
from common import opengl
from common.episodes import EpisodeSeeds
from common.errors import UserError
from common.run import Run
from small_runs import ROOT, configure, small


def environment(*overrides):
    """What training builds for these command-line overrides."""
    return utils.make_env(configure(*overrides))


def plain_episode(domain, task, camera, actions, repeat=2):
    """Pixels and rewards of the simplest possible loop over the same task, same initial state."""
    from dm_control import suite

    env = suite.load(domain, task)
    env.task._random = np.random.RandomState(next(EpisodeSeeds(0, 0)))
    env.reset()
    frames, rewards = [env.physics.render(64, 64, camera)], []
    for action in actions:
        rewards.append(0.0)
        for _ in range(repeat):
            rewards[-1] += env.step(action).reward
        frames.append(env.physics.render(64, 64, camera))
    return np.stack(frames), np.array(rewards)


@pytest.mark.parametrize(
    "domain, task, camera", [("cartpole", "balance", 0), ("quadruped", "walk", 2)]
)
def test_one_render_per_agent_step_gives_the_pixels_and_rewards_of_the_plain_way(
    domain, task, camera
):
    env = environment(f"env.name={domain}", f"env.task={task}")
    bounds = env.base_env.full_action_spec_unbatched["action"].space
    low, high = bounds.low.double().numpy(), bounds.high.double().numpy()
    torch.manual_seed(1)
    rollout = env.rollout(5)
    scaled = rollout["action"].double().numpy()
    actions = low + (scaled + 1) / 2 * (high - low)
    frames, rewards = plain_episode(domain, task, camera, actions)
    ours = torch.cat([rollout["observation"][:1], rollout["next", "observation"]]).numpy()
    assert ours.shape == (6, 64, 64, 3) and ours.dtype == np.uint8
    assert (ours == frames).all()
    np.testing.assert_allclose(rollout["next", "reward"].flatten().numpy(), rewards, rtol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["env.name=walker", "env.task=walk", "env.from_pixels=false"],
        ["env.name=cartpole", "env.task=balance"],
        ["env.backend=gymnasium", "env.name=Hopper-v5", "env.task=''", "env.from_pixels=false"],
    ],
    ids=["suite, states", "suite, pixels", "gymnasium, states"],
)
def test_torchrl_finds_every_value_as_its_spec_says(flags):
    with contextlib.closing(environment(*flags)) as env:
        check_env_specs(env)


def test_actions_are_scaled_to_one_and_the_policy_sees_the_scaled_one():
    env = environment("env.name=quadruped", "env.task=walk", "env.from_pixels=false")
    space = env.action_spec.space
    assert (space.low == -1).all() and (space.high == 1).all()
    bounds = env.base_env.full_action_spec_unbatched["action"].space
    assert not (bounds.high == 1).all()

    def policy(tensordict):
        action = torch.linspace(-1, 1, 12)
        tensordict["action"] = action
        return tensordict.set(("next", "previous_action"), action)

    rollout = env.rollout(3, policy)
    assert (rollout["previous_action"][0] == 0).all()
    torch.testing.assert_close(rollout["previous_action"][1:], rollout["action"][:-1])
    torch.testing.assert_close(rollout["action"][0], torch.linspace(-1, 1, 12))


def test_an_episode_is_a_thousand_steps_and_ends_in_a_truncation():
    rollout = environment("env.name=walker", "env.task=walk", "env.from_pixels=false").rollout(600)
    assert len(rollout) == 500
    assert rollout["next", "truncated"][-1] and not rollout["next", "terminated"].any()


def test_an_episode_depends_on_its_seed_and_on_nothing_else():
    flags = "env.name=cartpole", "env.task=swingup", "env.from_pixels=false"
    first = environment(*flags)
    one, two = (first.reset()["observation"] for _ in range(2))
    second = environment(*flags)
    second.rollout(7)
    assert not torch.equal(one, two)
    assert torch.equal(second.reset()["observation"], two)
    assert not torch.equal(environment(*flags, "seed=1").reset()["observation"], one)


def test_states_never_import_opengl(tmp_path):
    code = (
        "import sys; from small_runs import small;"
        f"small({str(tmp_path / 'run')!r}); assert 'dm_control' in sys.modules;"
        "print([name for name in sys.modules if name.startswith(('OpenGL', 'glfw'))])"
    )
    env = os.environ | {"MUJOCO_GL": "", "PYTHONPATH": ".:tests"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout.decode().splitlines()[-1] == "[]", done.stderr.decode()[-2000:]


def test_a_backend_that_does_not_render_is_refused_and_not_replaced(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "vulkan")
    with pytest.raises(UserError, match="=vulkan does not render.*unset it.*apt-get"):
        opengl.select_gl()
    assert os.environ["MUJOCO_GL"] == "vulkan"


def test_a_machine_without_opengl_gets_the_line_that_installs_it(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(opengl, "PROBE", "raise SystemExit('no libEGL')")
    with pytest.raises(UserError, match="no OpenGL renders: `apt-get .*no libEGL"):
        opengl.select_gl()


def test_gymnasium_from_states_honors_terminations(tmp_path):
    flags = "env.backend=gymnasium", "env.name=InvertedPendulum-v5", "env.task=''"
    env = environment(*flags, "env.from_pixels=false", "env.action_repeat=1")
    rollout = env.rollout(200)
    assert rollout["next", "terminated"][-1] and len(rollout) < 200
    flags = *flags, "replay_buffer.batch_length=3", "optimization.predict_discount=true"
    _, rows = small(tmp_path / "run", *flags)
    assert rows[-1]["updates"] > 0 and np.isfinite(rows[-1]["world_model/discount_loss"])


def test_gymnasium_from_pixels():
    flags = "env.backend=gymnasium", "env.name=HalfCheetah-v5", "env.task=''"
    with contextlib.closing(environment(*flags)) as env:
        pixels = env.rollout(2)["next", "observation"]
    assert pixels.shape == (2, 64, 64, 3) and pixels.dtype == torch.uint8
    assert pixels.float().std() > 5


@pytest.mark.parametrize(
    "name, words",
    [("CartPole-v1", "has discrete or unbounded actions, which"), ("Nothing-v0", "made")],
)
def test_gymnasium_tasks_out_of_scope_are_one_sentence(name, words):
    with pytest.raises(UserError, match=words):
        environment("env.backend=gymnasium", f"env.name={name}", "env.from_pixels=false")


def test_parallel_copies_keep_the_ratio_of_updates_to_steps(tmp_path):
    flags = "env.n_parallel_envs=2", "collector.random_steps=160", "collector.total_steps=320"
    _, rows = small(tmp_path / "run", *flags)
    assert rows[-1]["environment_steps"] == 320
    assert rows[-1]["updates"] == 2 + int((320 - 160) * 0.025)


@pytest.mark.parametrize("repeat", [2, 4])
def test_environment_steps_are_those_of_the_simulator(tmp_path, monkeypatch, repeat):
    """Action repeat is counted, in the counter, in the rows and in the length of an episode."""
    counted, original = [], Environment.step

    def step(self, action):
        time_step = original(self, action)
        if not time_step.first():  # which a step after an episode's last one gives
            counted.append(id(self))
        return time_step

    monkeypatch.setattr(Environment, "step", step)
    monkeypatch.setattr(Run, "start", forgetting(counted, Run.start))
    _, rows = small(tmp_path / "run", f"env.action_repeat={repeat}", "eval.every=0")
    assert len(counted) == rows[-1]["environment_steps"] == 240
    assert rows[-1]["agent_steps"] == 240 // repeat
    assert rows[-1]["train/length"] == 40


def forgetting(counted, start):
    """`start`, which first forgets the steps that TorchRL took to look at the environment."""

    def forget_and_start(*args, **kwargs):
        counted.clear()
        return start(*args, **kwargs)

    return forget_and_start
