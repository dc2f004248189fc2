"""Trains a small agent from states until it must have learned; test_learning.py runs it.

By hand:

    PYTHONPATH=.:tests python tests/training/learn.py DIRECTORY [--seed 3] [--without actor]

prints the mean return of ten evaluation episodes, about 280 if the actions are random. `--without`
spoils one part of the algorithm, after which the return must stay low.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

import dreamer
import dreamer_utils as utils

ENOUGH = 600  # random actions get 280; ten seeds got 829 to 977
FLAGS = """
--config-name config_state env.task=balance collector.total_steps=20000 eval.every=0
logger.mode=disabled logger.progress=false checkpoint.every=100000
""".split()


def cut_the_actors_gradient():
    """Dreamed actions are constants: nothing tells phi what they lead to."""
    original = dreamer.sample_action

    def action_model_samples(actor, noise):
        def choose_action(t, state, belief):
            mean, std = actor(state.detach(), belief.detach())
            return original(mean, std, noise[:, t]).detach() + 0 * mean, mean, std

        return choose_action

    dreamer.action_model_samples = action_model_samples


def freeze_the_world_model():
    """theta stays as it was at the start."""
    make_optimizers = utils.make_optimizers

    def without_theta(*args):
        optimizers = make_optimizers(*args)
        optimizers["world_model"].step = lambda: torch.zeros(())
        return optimizers

    utils.make_optimizers = without_theta


def shuffle_the_rewards():
    """Every batch has its rewards in another order."""
    update = dreamer.update

    def shuffled(agent, optimizers, batch, *rest):
        reward = batch["reward"]
        order = torch.randperm(reward.numel(), device=reward.device)
        batch = {name: batch[name] for name in batch.keys()}  # noqa: SIM118  (a TensorDict)
        batch["reward"] = reward.flatten()[order].view_as(reward)
        return update(agent, optimizers, batch, *rest)

    dreamer.update = shuffled


def maximize_the_negative_return():
    """The actor climbs down."""
    actor_loss = dreamer.actor_loss
    dreamer.actor_loss = lambda target, weight: -actor_loss(target, weight)


SPOILERS = {
    "actor": cut_the_actors_gradient,
    "world model": freeze_the_world_model,
    "rewards": shuffle_the_rewards,
    "sign": maximize_the_negative_return,
}


def learned_return(directory, seed, words=()):
    """The mean return of ten episodes after training, through the command line's `main`."""
    train = [*FLAGS, f"seed={seed}", f"run_dir={directory}", *words]
    for given in (train, [f"eval.checkpoint={directory}", "eval.episodes=10"]):
        call_main(given)
    [path] = Path(directory).glob("evaluation_*/10_episodes.json")
    return json.loads(path.read_text())["eval/return"]


def call_main(words):
    """What `python dreamer.py WORDS` does, in this process."""
    utils.register_configs()
    before = sys.argv
    with mock.patch.dict(os.environ, HYDRA_MAIN_MODULE="__main__"):
        sys.argv = ["dreamer.py", *words]
        try:
            dreamer.main()
        finally:
            sys.argv = before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without", choices=SPOILERS)
    parser.add_argument("--words", nargs="*", default=[], help="overrides")
    options = parser.parse_args()
    if options.without:
        SPOILERS[options.without]()
    value = learned_return(options.directory, options.seed, options.words)
    print(f"seed {options.seed}, without {options.without}: {value:.1f}")
