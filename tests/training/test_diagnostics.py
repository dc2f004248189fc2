"""The diagnostics tell the truth: what they say about models with known errors."""

from types import SimpleNamespace

import pytest
import torch
from known_world import KnownWorld

import dreamer
from common.diagnostics import Diagnostics

GAMMA, LAMBDA, HORIZON, STEPS = 0.9, 0.8, 15, 120
HP = SimpleNamespace(gamma=GAMMA, lambda_=LAMBDA, horizon=HORIZON)
DIAGNOSTICS = Diagnostics(
    dreamer.observe, dreamer.imagine, dreamer.lambda_return, dreamer.mode_action
)


class KnownAgent:
    """Takes the action tanh(mean) in every step, and knows what a state is worth."""

    def __init__(self, mean, std, reward_bias, value_offset, drift):
        self.world_model = KnownWorld(reward_bias, drift)
        self.mean, self.std, self.value_offset = mean, std, value_offset
        self.action = torch.tanh(torch.tensor(mean)).item()

    def actor(self, state, belief):
        return torch.full_like(state, self.mean), torch.full_like(state, self.std)

    def value(self, state, belief):
        """The true one, the sum of gamma^k (s + k a), and its offset."""
        ahead = self.action * GAMMA / (1 - GAMMA) ** 2
        return state / (1 - GAMMA) + ahead + self.value_offset


def constructed(mean=0.3, std=1e-5, reward_bias=0.0, value_offset=0.0, drift=0.0):
    """An agent in a world that it knows, but for what the arguments say, and an episode."""
    agent = KnownAgent(mean, std, reward_bias, value_offset, drift)
    s = torch.arange(STEPS + 1).float()[:, None] * agent.action
    episode = {
        "observation": s,
        "action": torch.full((STEPS, 1), agent.action),
        "reward": s[1:, 0],
        "state": s[:-1],
        "belief": torch.zeros(STEPS, 1),
        "terminated": torch.tensor(False),
    }
    return agent, episode, agent.action


def diagnosed(**wrong):
    """Metrics and curves of a constructed agent, and its action."""
    agent, episode, action = constructed(**wrong)
    metrics, curves, _, _ = DIAGNOSTICS.diagnose(agent, episode, HP)
    return metrics, curves, action


def test_a_perfect_model_and_critic_have_no_error():
    metrics, curves, action = diagnosed()
    assert metrics["world_model/open_loop_observation_error"] < 1e-6
    assert metrics["world_model/open_loop_reward_error"] < 1e-4
    assert abs(metrics["behavior/return_gap"]) < 1e-2
    assert abs(metrics["behavior/value_bias"]) < 1e-2
    assert len(curves["observation_error"]) == len(curves["reward_error"]) == 45


def test_repeating_the_last_row_errs_as_far_as_the_world_moves():
    _, curves, action = diagnosed()
    moved = action * torch.arange(1, 46)
    torch.testing.assert_close(torch.tensor(curves["copied_observation"]), moved.square())
    torch.testing.assert_close(torch.tensor(curves["copied_reward"]), moved.abs())


def test_an_error_of_the_model_grows_with_every_step_left_alone():
    _, curves, _ = diagnosed(drift=0.01)
    drifted = 0.01 * torch.arange(1, 46)
    got = torch.tensor(curves["observation_error"])
    torch.testing.assert_close(got, drifted.square(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("bias", [0.5, -0.25])
def test_an_over_optimistic_reward_gives_the_injected_bias(bias):
    metrics, curves, _ = diagnosed(reward_bias=bias)
    assert metrics["behavior/return_gap"] == pytest.approx(HORIZON * bias, abs=1e-2)
    assert metrics["world_model/open_loop_reward_error"] == pytest.approx(abs(bias), abs=1e-4)
    assert len(curves["imagined_return"]) == len(curves["real_return"]) == STEPS - HORIZON + 1


@pytest.mark.parametrize("offset", [7.0, -2.0])
def test_a_value_that_is_off_by_c_shows_c(offset):
    metrics, curves, _ = diagnosed(value_offset=offset)
    assert metrics["behavior/value_bias"] == pytest.approx(offset, abs=1e-2)
    assert len(curves["value_above_target"]) == STEPS - 2


@pytest.mark.parametrize("length, offset", [(5, 0.0), (5, 3.0), (60, -2.0)])
def test_after_a_true_end_nothing_is_worth_anything(length, offset):
    """A reward of 1 a step, then the end: the true values, and those that are off by c."""
    left = torch.arange(length, 0, -1.0)  # rewards still to come at s_1 .. s_T
    true = (1 - GAMMA**left) / (1 - GAMMA)
    values = true[:-1] + offset
    value = torch.cat([values, torch.ones(1)])[None]  # the last state is worth its reward
    above, bias = DIAGNOSTICS.value_bias(torch.ones(1, length), value, GAMMA, LAMBDA, ended=True)
    assert bias == pytest.approx(offset, abs=1e-3) and above.shape == (1, length - 1)


def test_a_critic_that_says_0_of_short_episodes_is_off_by_what_they_are_worth():
    """It was -1 / (1 - gamma), the value of a task without an end."""
    agent, episode, _ = constructed()
    agent.value = lambda state, belief: torch.zeros_like(state)
    short = {name: value[:6] for name, value in episode.items() if name != "terminated"}
    short |= {name: short[name][:5] for name in ("action", "state", "belief")}
    short |= {"reward": torch.ones(5), "terminated": torch.tensor(True)}
    metrics, curves, _, _ = DIAGNOSTICS.diagnose(agent, short, HP)
    assert -5 < metrics["behavior/value_bias"] < -1
    assert len(curves["value"]) == len(curves["value_above_target"]) + 1 == 5
    without_end, _, _, _ = DIAGNOSTICS.diagnose(
        agent, short | {"terminated": torch.tensor(False)}, HP
    )
    assert without_end["behavior/value_bias"] == pytest.approx(-1 / (1 - GAMMA), abs=1e-3)


def test_every_action_leads_to_its_own_row():
    agent, _, _ = constructed()
    action = torch.randn(2, 12, 1)
    s = action.cumsum(1)  # row t is where action t led
    predicted, errors = DIAGNOSTICS.open_loop_errors(agent.world_model, s, action, s[..., 0], 5)
    torch.testing.assert_close(predicted, s)
    assert max(errors["observation_error"].max(), errors["reward_error"].max()) < 1e-4


def test_dreams_take_the_actions_that_evaluation_would_take():
    """A sample of this wide policy is 0.46 on average, the mode is 0.98."""
    agent, episode, _ = constructed(mean=0.5, std=1.0)
    _, curves, _, _ = DIAGNOSTICS.diagnose(agent, episode, HP)
    first = torch.tensor(curves["imagined_return"][0])  # from s = 0: a + 2 a + ... + H a
    assert first / (HORIZON * (HORIZON + 1) / 2) == pytest.approx(0.98, abs=0.02)


def test_saturated_actions_are_counted():
    assert diagnosed(mean=0.3)[0]["behavior/action_saturation"] == 0
    assert diagnosed(mean=4.0)[0]["behavior/action_saturation"] == 1


def test_open_loop_sees_the_context_and_nothing_after_it():
    agent, episode, action = constructed()
    rows = episode["observation"][None, :10].clone()
    actions, reward = torch.full((1, 10, 1), action), torch.zeros(1, 10)
    other_future = torch.cat([rows[:, :5], rows[:, 5:] + 100], 1)
    predicted = [
        DIAGNOSTICS.open_loop_errors(agent.world_model, x, actions, reward, 5)[0]
        for x in (rows, other_future)
    ]
    assert torch.equal(*predicted)
    changed = torch.cat([rows[:, :4], rows[:, 4:5] + 1, rows[:, 5:]], 1)
    other, _ = DIAGNOSTICS.open_loop_errors(agent.world_model, changed, actions, reward, 5)
    torch.testing.assert_close(other[:, 4:], predicted[0][:, 4:] + 1)
