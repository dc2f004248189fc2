"""check_dreams.py tells a model that knows what actions do from one that does not."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from known_world import KnownWorld

import check_dreams
from common.agents import find_checkpoint
from common.checkpoint import make_archive
from common.errors import UserError
from small_runs import ROOT, SMALL, configure

H = 15


class World(KnownWorld):
    """A world that shows its last action and pays it as a reward."""

    def prior(self, state, belief, action, noise):
        return state, torch.ones_like(state), action, belief


class Late(World):
    """Believes that every action arrives a step later."""

    def prior(self, state, belief, action, noise):
        return state, torch.ones_like(state), belief, action


class Deaf(World):
    """Expects the mean reward, whatever is done."""

    def prior(self, state, belief, action, noise):
        return state, torch.ones_like(state), 0.1 * noise, belief


def look_at(model):
    """The lines about a model, as numbers: [start][seen, row, dreamed, real, correlation]."""
    action = torch.rand(200, max(check_dreams.STARTS) + 1 + H, 1) * 2 - 1
    lines = check_dreams.check(model, (action, action, action[..., 0]), H)
    return [[float(cell) for cell in line[:5]] + [line[5]] for line in lines]


def test_a_true_model_dreams_the_real_rewards():
    lines = look_at(World())
    assert [line[1] for line in lines] == list(check_dreams.STARTS)
    for seen, _, dreamed, real, correlation, observations in lines:
        assert seen == 1 and dreamed == real and correlation == 1
        assert observations == "0.00, 0.00"


@pytest.mark.parametrize("model", [Deaf(), Late()])
def test_a_model_that_ignores_or_delays_actions_is_found_out(model):
    for seen, _, dreamed, real, correlation, observations in look_at(model):
        assert seen == 1, "it sees well: only its dreams are wrong"
        assert abs(dreamed - real) < 1, "and their mean does not show it"
        assert correlation < 0.98
        assert min(map(float, observations.split(", "))) > 0.3


def test_episodes_are_those_of_the_task_and_hold_every_second_action():
    cfg = configure(*SMALL)  # 20 agent steps an episode
    observation, action, reward = check_dreams.play(cfg, 2, 21)
    assert observation.shape == (2, 21, 5) and action.shape == (2, 21, 1)
    assert (action[:, 0] == 0).all() and (reward[:, 0] == 0).all() and (reward[:, 1:] > 0).all()
    changes = (action[:, 2:] != action[:, 1:-1]).squeeze(-1).sum(1)
    assert changes.tolist() == [19, 3]
    assert (check_dreams.play(cfg, 2, 21)[0] == observation).all()
    with pytest.raises(UserError, match="ended after 20 agent steps, and 21"):
        check_dreams.play(cfg, 1, 22)


def test_the_dreams_of_the_agent_that_comes_with_the_clone_follow_the_actions():
    agent = "benchmarks/agents/cartpole-balance"
    command = [sys.executable, "benchmarks/check_dreams.py", agent, "--episodes", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [line[0] for line in lines] == ["| cartpole-balance"] * len(check_dreams.STARTS)
    assert all(float(line[6]) > 0.9 for line in lines[:3])
    command[2] = "benchmarks/agents/nobody"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_of_another_network_end_in_a_sentence(tmp_path, monkeypatch):
    path, metadata, states = find_checkpoint(ROOT / "benchmarks/agents/cartpole-balance")
    metadata["config"]["networks.belief_dim"] += 1
    wrong = tmp_path / "wrong.torchrl"
    make_archive({"agent": SimpleNamespace(state_dict=lambda: states["agent"])}).save(
        wrong, metadata=metadata
    )
    monkeypatch.setattr(sys, "argv", ["", str(wrong), "--episodes", "2"])
    with pytest.raises(UserError, match="wrong.torchrl are not those of its configuration"):
        check_dreams.main()
