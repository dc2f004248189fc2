"""Acting: three steps with the official weights in both policies, and what an agent remembers."""

import pytest
import torch
from tensordict import TensorDict

import dreamer
import dreamer_utils as utils
from golden_weights import OUTPUT, check, config, load_agent
from small_runs import SMALL, configure


def play(data, agent, mode):
    """Yields (step, what the policy made of it); the executed action goes into the next step."""
    model = agent.world_model
    posterior = {}
    model.posterior.register_forward_hook(
        lambda module, inputs, outputs: posterior.update(mean=outputs[0], std=outputs[1])
    )
    state, belief = model.initial(data["obs_u8"].shape[1])
    action = torch.zeros_like(data[f"{mode}_action"][0])
    for t, observation in enumerate(data["obs_u8"]):
        noise = {
            "prior": data[f"{mode}_prior_noise"][t],
            "posterior": data[f"{mode}_post_noise"][t],
            "action": data[f"{mode}_actor_noise"][t],
        }
        inputs = agent, observation, action, state, belief, noise
        if mode == "train":
            noise["exploration"] = data["train_expl_noise"][t]
            scale = config().collector.exploration_noise
            action, state, belief = dreamer.collection_policy(*inputs, scale)
        else:
            action, state, belief = dreamer.evaluation_policy(*inputs)
        yield t, {"action": action, "stoch": state, "deter": belief, **posterior}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_alg1_policies_act_like_the_official_ones(golden, dtype, mode):
    data = golden("policy", dtype)
    for t, got in play(data, load_agent(data), mode):
        for part, value in got.items():
            check(value, data[f"{mode}_{part}"][t], OUTPUT[dtype], f"step {t}: {part}")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_alg1_policies_treat_every_row_alone(golden, mode):
    """Several environments at once act as each of them would act alone, with its own noise."""
    data = golden("policy")
    agent, n = load_agent(data), len(data["obs_u8"])
    size, samples = agent.world_model.sizes, () if mode == "train" else (20,)
    shapes = {name: (n, size[name]) for name in ("action", "state", "belief")}
    action, state, belief = (torch.randn(s, dtype=torch.float64) for s in shapes.values())
    shapes = {
        "prior": shapes["state"],
        "posterior": shapes["state"],
        "exploration": shapes["action"],
        "action": (*samples, *shapes["action"]),
    }
    noise = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def act(rows):
        inputs = [x[rows] for x in (data["obs_u8"][:, 0], action, state, belief)]
        own = {name: x[..., rows, :] for name, x in noise.items()}
        if mode == "train":
            return dreamer.collection_policy(agent, *inputs, own, 0.3)
        return dreamer.evaluation_policy(agent, *inputs, own)

    alone = zip(*(act(slice(i, i + 1)) for i in range(n)))
    for got, want in zip(act(slice(n)), alone, strict=True):
        check(got, torch.cat(want), 1e-8)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_the_memory_travels_with_the_environment(n_envs):
    flags = f"env.n_parallel_envs={n_envs}", f"collector.random_steps={80 * n_envs}"
    cfg = configure(*SMALL, *flags)
    env = utils.make_env(cfg)
    agent = dreamer.make_agent(cfg, *utils.env_sizes(env))
    policy = utils.Policy(agent, dreamer.collection_policy, scale=0.3)
    collector = utils.make_collector(cfg, env, policy)
    try:
        phases = [collector.collect().reshape(n_envs, -1).clone() for _ in range(8)]
    finally:
        collector.close()
    seen = torch.cat(phases, 1)
    first = seen["step_count"].squeeze(-1) == 0
    assert (first.sum(1) >= 4).all(), "an environment was not reset"
    memory = {"previous_action": "action"}
    memory |= {name: ("next", name) for name in ("state", "belief")}
    for now, before in memory.items():
        assert (seen[now][first] == 0).all(), f"{now} outlives a reset"
        same_episode = ~first[:, 1:]
        carried, made = seen[now][:, 1:][same_episode], seen[before][:, :-1][same_episode]
        assert torch.equal(carried, made), f"{now} is lost on the way"
        assert (carried != 0).any()


def captured_policy(n, **settings):
    """A policy for n environments, and a list that gets the noise of each of its steps."""
    agent = dreamer.make_agent(configure(*SMALL), (5,), 3)
    seen = []

    def policy_fn(agent, observation, action, state, belief, noise):
        seen.append(noise)
        return action, state, belief

    policy = utils.Policy(agent, policy_fn, **settings)
    inputs = {"observation": torch.zeros(n, 5), "previous_action": torch.zeros(n, 3)}
    initial = dict(zip(("state", "belief"), agent.world_model.initial(n), strict=True))
    return policy, TensorDict(inputs | initial, [n]), seen


def test_all_noise_of_acting_is_standard_normal():
    """Also the exploration noise: uniform noise of the same spread never leaves +-1.74."""
    policy, steps, seen = captured_policy(20_000)
    policy(steps)
    assert set(seen[0]) == {"prior", "posterior", "action", "exploration"}
    for name, noise in seen[0].items():
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03, name
        for limit, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
            assert (noise.abs() > limit).float().mean() == pytest.approx(share, rel=0.15), name


def test_seed_actions_are_uniform_from_minus_one_to_one():
    policy, steps, _ = captured_policy(20_000)
    policy.random_steps = 20_000
    action = policy(steps)["action"]
    assert policy.random_steps == 0
    shares = action.flatten().histc(8, -1, 1) / action.numel()
    assert shares.sum() == pytest.approx(1) and (shares - 1 / 8).abs().max() < 0.01
    assert (policy(steps)["action"] == 0).all(), "the agent acts after the seed episodes"
