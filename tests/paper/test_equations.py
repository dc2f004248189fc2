"""Eqs. (3) to (10): official numbers, the paper's double sums, derivations by hand, TorchRL."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from torchrl.modules import DreamerActor, TanhNormal
from torchrl.objectives import DreamerModelLoss
from torchrl.objectives.value.functional import td_lambda_return_estimate

import dreamer
from golden_weights import GRADIENT, OUTPUT, check, config, load_agent

HP = config().optimization
LATENT = ("prior_mean", "prior_std", "post_mean", "post_std")


def dream(n=7, h=6):
    """Random reward, value and a varying discount of n dreams of h states, in float64."""
    reward, value = torch.randn(2, n, h, dtype=torch.float64)
    return reward, value, torch.rand(n, h, dtype=torch.float64)


def double_sum(reward, value, discount, lambda_):
    """Eqs. (4), (5), (6) as the paper writes them; s_1 .. s_H are columns 0 .. H-1."""
    h = reward.shape[1]

    def k_step(t, k):  # Eq. (5): rewards until the last state or k steps, then a value
        end = min(t + k, h - 1)
        weight = [discount[:, t:n].prod(1) for n in range(t, end + 1)]
        rewards = sum(weight[n - t] * reward[:, n] for n in range(t, end))
        return rewards + weight[-1] * value[:, end]

    targets = []
    for t in range(h - 1):
        mixed = sum(lambda_ ** (n - 1) * k_step(t, n) for n in range(1, h))
        targets.append((1 - lambda_) * mixed + lambda_ ** (h - 1) * k_step(t, h))
    return torch.stack(targets, 1)


# --- Eq. (3) -------------------------------------------------------------------------------------


def test_eq03_action_model_is_torchrl_tanh_normal(golden):
    data = golden("actor")
    agent = load_agent(data)
    size = agent.world_model.sizes
    features = (0.1 * data["feat"]).split([size["state"], size["belief"]], -1)
    mean, std = agent.actor(*features)
    raw_mean, raw_std = DreamerActor.forward(agent.actor, *features)
    oracle = TanhNormal(raw_mean, raw_std, upscale=agent.actor.mean_scale, tanh_loc=True)
    torch.manual_seed(1)
    sample, log_prob = oracle.rsample_and_log_prob()
    torch.manual_seed(1)
    noise = torch.normal(torch.zeros_like(mean), torch.ones_like(mean))
    action = dreamer.sample_action(mean, std, noise)
    check(action, sample, 2e-6, "sample")  # TorchRL stops 1e-6 short of +-1
    check(dreamer.action_log_prob(mean, std, noise), log_prob, 1e-5, "log_prob")


def test_eq03_density_of_actions_integrates_to_one():
    """Sum of the density of actions over a fine grid of the values before the tanh."""
    raw = torch.linspace(-12, 12, 100_001, dtype=torch.float64)[:, None]
    mean, std = torch.full_like(raw, 0.3), torch.full_like(raw, 0.8)
    density = dreamer.action_log_prob(mean, std, (raw - mean) / std).exp()
    check(torch.trapezoid(density, torch.tanh(raw[:, 0])), 1.0, 1e-6)


# --- Eqs. (4), (5), (6) --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["const", "var"])
def test_eq06_returns_equal_the_official_ones(golden, dtype, kind):
    data = golden("returns", dtype)
    reward, value, discount = data["reward"].T, data["value"].T, data[f"{kind}_pcont"].T
    target = dreamer.lambda_return(reward, value, discount, HP.lambda_)
    check(target, data[f"{kind}_returns"].T, OUTPUT[dtype])


@pytest.mark.parametrize("lambda_", [0, 1])
def test_eq06_returns_at_both_limits_equal_the_official_ones(golden, dtype, lambda_):
    data = golden("returns", dtype)
    reward, value = data["reward"].T, data["value"].T
    target = dreamer.lambda_return(reward, value, torch.full_like(reward, HP.gamma), lambda_)
    check(target, data[f"lam{lambda_}_returns"].T, OUTPUT[dtype])


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.95, 1.0])
def test_eq06_recursion_equals_the_double_sum(lambda_):
    inputs = *dream(), lambda_
    check(dreamer.lambda_return(*inputs), double_sum(*inputs), 1e-12)


def test_eq04_lambda_one_sums_all_rewards_and_one_last_value():
    reward, value, discount = dream(h=4)
    c1, c2, c3, _ = discount.unbind(1)
    r1, r2, r3, _ = reward.unbind(1)
    first = r1 + c1 * r2 + c1 * c2 * r3 + c1 * c2 * c3 * value[:, 3]
    check(dreamer.lambda_return(reward, value, discount, 1)[:, 0], first, 1e-12)


def test_eq05_lambda_zero_is_one_reward_and_the_next_value():
    reward, value, discount = dream()
    target = reward[:, :-1] + discount[:, :-1] * value[:, 1:]
    check(dreamer.lambda_return(reward, value, discount, 0), target, 1e-12)


@pytest.mark.parametrize("varying", [False, True])
def test_eq06_returns_equal_those_of_torchrl(varying):
    reward, value, discount = dream()
    discount = discount if varying else torch.full_like(discount, HP.gamma)
    r, v, c = reward[:, :-1, None], value[:, 1:, None], discount[:, :-1, None]
    never = torch.zeros_like(r, dtype=torch.bool)
    oracle = td_lambda_return_estimate(c, HP.lambda_, v, r, never)
    check(dreamer.lambda_return(reward, value, discount, HP.lambda_), oracle.squeeze(-1), 1e-12)


# --- Eqs. (7), (8) -------------------------------------------------------------------------------


def test_eq07_discount_weight_is_the_product_of_earlier_discounts():
    _, _, discount = dream(h=4)
    c1, c2, _, _ = discount.requires_grad_().unbind(1)
    weight = dreamer.discount_weight(discount)
    check(weight, torch.stack([torch.ones_like(c1), c1, c1 * c2], 1), 1e-12)
    assert not weight.requires_grad


@pytest.mark.parametrize("kind", ["const", "var"])
def test_eq07_actor_loss_and_gradients(golden, dtype, kind):
    data = golden("returns", dtype)
    names = "reward", "value", f"{kind}_pcont"
    reward, value, discount = inputs = [data[name].T.clone().requires_grad_() for name in names]
    target = dreamer.lambda_return(reward, value, discount, HP.lambda_)
    weight = dreamer.discount_weight(discount)
    check(weight, data[f"{kind}_discount"].T, OUTPUT[dtype], "weight")
    loss = dreamer.actor_loss(target, weight)
    check(loss, data[f"{kind}_actor_loss"], OUTPUT[dtype], "loss")
    loss.backward()
    for name, x in zip(("reward", "value", "pcont"), inputs):
        check(x.grad, data[f"{kind}_g_actor_{name}"].T, GRADIENT[dtype], name)


@pytest.mark.parametrize("kind", ["const", "var"])
def test_eq08_value_loss_and_gradient(golden, dtype, kind):
    data = golden("returns", dtype)
    value = data[f"{kind}_value_pred"].T.clone().requires_grad_()
    target = data[f"{kind}_returns"].T.clone().requires_grad_()
    loss = dreamer.value_loss(value[:, :-1], target, data[f"{kind}_discount"].T)
    check(loss, data[f"{kind}_value_loss"], OUTPUT[dtype], "loss")
    loss.backward()
    check(value.grad, data[f"{kind}_g_value_pred"].T, GRADIENT[dtype], "gradient")
    assert target.grad is None  # Eq. (8) moves the value towards its target, not the target


def test_eq07_gradient_on_linear_dynamics_is_the_hand_derived_one():
    """s' = a s + b tanh(w sg(s) + k + sigma e) + d e', r = p s + q: gradients written by hand.

    They pass through actions and dynamics. If they also passed through the actor's input, the
    slope ds would grow by a + b (1 - tanh^2) w per step, in place of a.
    """
    n, h, (a, b, d, p, q) = 5, 4, (0.9, 0.7, 0.2, 1.3, -0.4)
    w, k, sigma = theta = torch.tensor([0.5, -0.1, 0.3], dtype=torch.float64).requires_grad_()
    noise = {x: torch.randn(n, h, 1, dtype=torch.float64) for x in ("action", "state")}
    start = torch.randn(1, n, 1, dtype=torch.float64).requires_grad_()
    world_model = SimpleNamespace(
        prior=lambda s, m, u, e: (s, e, a * s + b * u + d * e, m),
        reward=lambda s, m: p * s + q,
        discount=None,
    )
    value_net = nn.Linear(1, 1).double()
    agent = SimpleNamespace(
        world_model=world_model,
        actor=lambda s, m: (w * s + k, sigma.expand_as(s)),
        value=lambda s, m: value_net(s),
    )
    posterior = {"state": start, "belief": torch.zeros_like(start)}
    actor_loss, value_loss, _ = dreamer.behavior_learning(agent, posterior, noise, HP)
    (got,) = torch.autograd.grad(actor_loss, theta, retain_graph=True)
    assert torch.autograd.grad(actor_loss, start, allow_unused=True, retain_graph=True) == (None,)
    got_value = torch.autograd.grad(value_loss, list(value_net.parameters()))

    with torch.no_grad():
        s, ds, states, slopes = start[0], torch.zeros(n, 3, dtype=torch.float64), [], []
        for t in range(h):
            u = torch.tanh(w * s + k + sigma * noise["action"][:, t])
            direct = torch.cat([s, torch.ones_like(s), noise["action"][:, t]], 1)  # of w, k, sigma
            ds = a * ds + b * (1 - u.square()) * direct
            s = a * s + b * u + d * noise["state"][:, t]
            states.append(s)
            slopes.append(ds)
        states, slopes = torch.cat(states, 1), torch.stack(slopes, 1)  # [n, h], [n, h, 3]
        discount = torch.full_like(states, HP.gamma)
        weight = HP.gamma ** torch.arange(h - 1, dtype=torch.float64)
        v = value_net.weight.item()
        gradient = [
            -(weight * double_sum(p * slope, v * slope, discount, HP.lambda_)).mean()
            for slope in slopes.unbind(2)
        ]  # targets are linear in rewards and values, and those in states
        check(got, torch.stack(gradient), 1e-10, "gradient")
        values = v * states + value_net.bias
        target = double_sum(p * states + q, values, discount, HP.lambda_)
        check(actor_loss, -(weight * target).mean(), 1e-10, "actor loss")
        squared = 0.5 * (values[:, :-1] - target).square() + 0.5 * math.log(2 * math.pi)
        check(value_loss, (weight * squared).mean(), 1e-10, "value loss")
        error = weight * (values[:, :-1] - target)
        check(got_value[0].squeeze(), (error * states[:, :-1]).mean(), 1e-10, "value slope")
        check(got_value[1].squeeze(), error.mean(), 1e-10, "value offset")


# --- Eq. (10) ------------------------------------------------------------------------------------


def kl_of(prior_mean, prior_std, post_mean, post_std):
    """`dreamer.latent_kl` of four tensors."""
    return dreamer.latent_kl(
        {"mean": prior_mean, "std": prior_std}, {"mean": post_mean, "std": post_std}
    )


def test_eq10_kl_and_free_nats_equal_the_official_ones(golden, dtype):
    data = golden("kl", dtype)
    floors = [match[1] for name in data if (match := re.fullmatch(r"free(.*)_div", name))]
    assert len(floors) > 1
    for floor in floors:
        inputs = [data[name].clone().requires_grad_() for name in LATENT]
        kl = kl_of(*inputs)
        check(kl, data["kl"], OUTPUT[dtype], "kl")
        zero = torch.zeros_like(kl)
        loss = dreamer.model_loss(zero, zero, kl, 1.0, float(floor))
        check(loss, data[f"free{floor}_div"], OUTPUT[dtype], f"free {floor}")
        loss.backward()
        for name, x in zip(LATENT, inputs):
            check(x.grad, data[f"free{floor}_g_{name}"], GRADIENT[dtype], f"free {floor}, {name}")


@pytest.mark.parametrize("floor", [0.5, 2])  # times the mean KL: one floor below it, one above
def test_eq10_kl_and_its_gradient_equal_those_of_torchrl(golden, floor):
    data = golden("kl")
    inputs, others = ([data[name].clone().requires_grad_() for name in LATENT] for _ in range(2))
    free_nats = floor * data["kl"].mean().item()
    unused = nn.Sequential(nn.Sequential(nn.Identity()), nn.Identity())
    oracle = DreamerModelLoss(unused, delayed_clamp=True, free_nats=free_nats).kl_loss(*others)
    zero = torch.zeros_like(data["kl"])
    loss = dreamer.model_loss(zero, zero, kl_of(*inputs), 1.0, free_nats)
    check(loss, oracle, 1e-8)
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(oracle, others)):
        check(got, want, 1e-8)


def test_eq10_loss_adds_scaled_kl_and_subtracts_both_likelihoods():
    observation, reward, kl = torch.randn(3, 4, 5, dtype=torch.float64)
    kl = kl.exp()
    loss = dreamer.model_loss(observation, reward, kl, 0.3, 0.0)
    check(loss, (0.3 * kl - observation - reward).mean(), 1e-12)
    loss = dreamer.model_loss(observation, reward, kl, 0.3, 100.0)
    check(loss, 30 - (observation + reward).mean(), 1e-12)


def test_eq10_log_normal_has_a_half_and_a_constant():
    target, mean = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    want = Normal(mean, 1).log_prob(target)
    check(dreamer.log_normal(target, mean), want, 1e-12)
    check(dreamer.log_normal(target, mean, 3), want.sum((-3, -2, -1)), 1e-12)
    check(dreamer.log_normal(torch.ones(()), torch.zeros(())), -0.5 - 0.9189385332046727, 1e-6)


def test_entropy_is_that_of_independent_gaussians():
    std = torch.rand(3, 5) + 0.1
    normal = Independent(Normal(0.0 * std, std), 1)
    torch.testing.assert_close(dreamer.normal_entropy(std), normal.entropy())
