"""All processes see the same pictures of the same states, whatever they rendered before."""

import contextlib
import gc

import pytest
import torch

import dreamer_utils as utils
from common.episodes import EpisodeSeeds
from small_runs import configure

TASKS = [
    "HalfCheetah-v5",
    "Ant-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "InvertedPendulum-v5",
    "InvertedDoublePendulum-v5",
]


def pictures(task, before):
    """Five frames of an episode, from an environment that has shown `before` others."""
    cfg = configure("env.backend=gymnasium", f"env.name={task}", "env.task=")
    seeds = EpisodeSeeds(0, 0)
    env = utils.build_env(cfg, [seeds])
    try:
        for _ in range(before):
            env.reset()
        seeds.episode = 7
        torch.manual_seed(0)
        return env.rollout(5)["next", "observation"]
    finally:
        utils.close_env(env)


@pytest.mark.parametrize("task", TASKS)
def test_the_camera_does_not_depend_on_the_first_episode(task):
    first = pictures(task, before=0)
    assert first.float().std() > 1
    for before in (1, 3):
        assert torch.equal(pictures(task, before), first)


def test_a_closed_environment_does_not_blacken_the_pictures_of_the_next():
    expected = pictures("Reacher-v5", before=0)
    cfg = configure("env.backend=gymnasium", "env.name=Reacher-v5", "env.task=")
    gc.disable()  # so that the closed one is collected when the other has begun to draw
    try:
        closed, other = (utils.build_env(cfg, [EpisodeSeeds(0, 0, 6)]) for _ in range(2))
        utils.close_env(closed)
        other.rollout(1)
        del closed
        gc.collect()
        torch.manual_seed(0)
        assert torch.equal(other.rollout(5)["next", "observation"], expected)
    finally:
        gc.enable()
        utils.close_env(other)


SUITE = "env.name=cartpole", "env.task=balance"
GYMNASIUM = "env.backend=gymnasium", "env.name=Reacher-v5", "env.task="


def build(flags):
    """What training builds for these command-line overrides, in its first episode."""
    env = utils.make_env(configure(*flags))
    env.reset()
    return env


@contextlib.contextmanager
def no_garbage_collection():
    """Garbage is collected only where the test says so."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def pictures_around(flags, event):
    """Frames of an episode in which something happens between two steps."""
    torch.manual_seed(0)
    with contextlib.closing(build(flags)) as env:
        before = env.rollout(2, auto_reset=True)
        event()
        after = env.rollout(3, auto_reset=False, tensordict=before[-1]["next"].clone())
    return torch.cat([before["next", "observation"], after["next", "observation"]])


@pytest.mark.parametrize("mine, others", [(SUITE, GYMNASIUM), (GYMNASIUM, SUITE)])
@pytest.mark.parametrize("event", ["draws", "is closed", "is dropped", "is collected"])
def test_what_another_library_draws_does_not_change_the_pictures(mine, others, event):
    expected = pictures_around(mine, lambda: None)
    assert (expected[1:] != expected[:-1]).flatten(1).any(1).all(), "nothing moves"
    kept = [build(others)]

    def happen():
        if event == "draws":
            kept[0].reset()
        elif event == "is closed":
            utils.close_env(kept[0])
        elif event == "is dropped":
            kept.clear()
        else:
            garbage = [kept.pop()]
            garbage.append(garbage)  # only the collector ends such a circle
            del garbage
            gc.collect()

    with no_garbage_collection():
        assert torch.equal(pictures_around(mine, happen), expected)
