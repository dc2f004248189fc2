"""All processes see the same pictures of the same states, whatever they rendered before."""

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
