"""Every network of App. A with the official weights: official outputs, samples, gradients."""

import math

import pytest
import torch
from torch.distributions import Normal

import dreamer
from common.diagnostics import given_actions
from common.envs import IMAGE
from golden_weights import (
    GRADIENT,
    OUTPUT,
    channels_first,
    check,
    check_gradients,
    config,
    load_agent,
)


def split(agent, features):
    """Official features [stochastic, deterministic] -> (state, belief)."""
    size = agent.world_model.sizes
    return features.split([size["state"], size["belief"]], -1)


def test_encoder_equals_the_official_one(golden, dtype):
    data = golden("encoder", dtype)
    agent = load_agent(data)
    pixels = agent.world_model.preprocess(data["image_u8"])
    check(pixels[..., 0, :].movedim(-1, -2), data["image_row0"], OUTPUT[dtype], "image_row0")
    embed = agent.world_model.encoder(pixels)
    check(embed, data["embed_chw"], OUTPUT[dtype], "embed_chw")
    check(embed, channels_first(data["embed"]), OUTPUT[dtype], "embed")
    total = (channels_first(data["cot"]) * embed).sum()
    check(total, data["cot_total"], OUTPUT[dtype], "cot_total")
    total.backward()
    check_gradients(agent, data, GRADIENT[dtype])


def test_decoder_equals_the_official_one(golden, dtype):
    data = golden("decoder", dtype)
    agent, features = load_agent(data), data["feat"].requires_grad_()
    mean = agent.world_model.decoder(*split(agent, features))
    check(mean.movedim(-3, -1), data["mean"], OUTPUT[dtype], "mean")
    target = agent.world_model.preprocess(data["target_u8"])
    log_prob = dreamer.log_normal(target, mean, 3)
    check(log_prob, data["log_prob"], OUTPUT[dtype], "log_prob")
    check(log_prob.mean(), data["like"], OUTPUT[dtype], "like")
    log_prob.mean().backward()
    check(features.grad, data["g_feat"], GRADIENT[dtype], "g_feat")
    check_gradients(agent, data, GRADIENT[dtype])


def check_state(got, data, prefix, tolerance):
    """Checks (mean, std, state, belief) against the official _mean, _std, _stoch, _deter."""
    for part, value in zip(("mean", "std", "stoch", "deter"), got, strict=True):
        check(value, data[f"{prefix}_{part}"], tolerance, f"{prefix}_{part}")


def test_eq01_observe_filters_like_the_official_rssm(golden, dtype):
    data = golden("rssm", dtype)
    agent = load_agent(data)
    embed, action = data["embed"].requires_grad_(), data["action"].requires_grad_()
    noise = {"prior": data["prior_noise"], "posterior": data["post_noise"]}
    prior, posterior = dreamer.observe(agent.world_model, embed, action, noise)
    total = 0
    for prefix, got in (("prior", prior), ("post", posterior)):
        check_state(got.values(), data, prefix, OUTPUT[dtype])
        for part, value in zip(("mean", "std", "stoch", "deter"), got.values()):
            if f"cot_{prefix}_{part}" in data:  # the belief of both is the same and counts once
                total = total + (data[f"cot_{prefix}_{part}"] * value).sum()
    features = torch.cat([posterior["state"], posterior["belief"]], -1)
    check(features, data["feat"], OUTPUT[dtype], "feat")
    check(total, data["cot_total"], OUTPUT[dtype], "cot_total")
    total.backward()
    check(embed.grad, data["g_embed"], GRADIENT[dtype], "g_embed")
    check(action.grad, data["g_action"], GRADIENT[dtype], "g_action")
    check_gradients(agent, data, GRADIENT[dtype])


def test_eq01_one_step_of_both_models_equals_the_official_one(golden, dtype):
    data = golden("rssm", dtype)
    model = load_agent(data).world_model
    inputs = data["step_prev_stoch"], data["step_prev_deter"], data["step_action"]
    check_state(model.prior(*inputs, data["step_img_noise"]), data, "step_img", OUTPUT[dtype])
    prior = model.prior(*inputs, data["step_obs_prior_noise"])
    check_state(prior, data, "step_obs_prior", OUTPUT[dtype])
    belief = prior[-1]
    posterior = model.posterior(belief, data["step_embed"], data["step_obs_post_noise"])
    check_state((*posterior, belief), data, "step_obs_post", OUTPUT[dtype])


def test_eq01_dreams_of_given_actions_equal_the_official_ones(golden, dtype):
    data = golden("rssm", dtype)
    model, steps = load_agent(data).world_model, []
    model.prior.register_forward_hook(lambda module, inputs, outputs: steps.append(outputs))
    start = data["post_stoch"][:, 0], data["post_deter"][:, 0]
    choose_action = given_actions(data["imagine_action"])
    state, belief = dreamer.imagine(model, choose_action, *start, data["imagine_noise"])
    mean, std, _, _ = (torch.stack(values, 1) for values in zip(*steps))
    check_state((mean, std, state, belief), data, "imagine", OUTPUT[dtype])


def test_recurrent_cell_equals_the_official_one(golden, dtype):
    data = golden("rssm", dtype)
    cell = load_agent(data).world_model.prior.rnn
    check(cell(data["gru_x"], data["gru_h"]), data["gru_out"], OUTPUT[dtype], "gru_out")


@pytest.mark.parametrize("head", ["reward", "value", "pcont"])
def test_reward_value_and_discount_models_equal_the_official_ones(golden, dtype, head):
    data = golden("heads", dtype)
    agent, features = load_agent(data), data["feat"].requires_grad_()
    heads = {
        "reward": agent.world_model.reward,
        "value": agent.value,
        "pcont": agent.world_model.discount,
    }
    output = heads[head](*split(agent, features)).squeeze(-1)
    if head == "pcont":
        check(output, data["pcont_logits"], OUTPUT[dtype], "logits")
        check(output.sigmoid(), data["pcont_mean"], OUTPUT[dtype], "mean")
        log_prob = dreamer.discount_log_prob(output, data["pcont_target"])
    else:
        check(output, data[f"{head}_mode"], OUTPUT[dtype], "mode")
        log_prob = dreamer.log_normal(data[f"{head}_target"], output)
    check(log_prob, data[f"{head}_log_prob"], OUTPUT[dtype], "log_prob")
    check(log_prob.mean(), data[f"{head}_like"], OUTPUT[dtype], "like")
    log_prob.mean().backward()
    check(features.grad, data[f"{head}_g_feat"], GRADIENT[dtype], "g_feat")
    own = {name: array for name, array in data.items() if name[2:].startswith(f"{head}.")}
    check_gradients(agent, own, GRADIENT[dtype])


def test_eq03_actor_samples_the_official_actions(golden, dtype):
    data = golden("actor", dtype)
    agent = load_agent(data)
    mean, std = agent.actor(*split(agent, data["feat"]))
    check(mean, data["mean"], OUTPUT[dtype], "mean")
    check(std, data["std"], OUTPUT[dtype], "std")
    action = dreamer.sample_action(mean, std, data["noise"])
    check(action, data["action"], OUTPUT[dtype], "action")
    (data["cot"] * action).sum().backward()
    check_gradients(agent, data, GRADIENT[dtype])


def test_exploration_noise_equals_the_official_one(golden, dtype):
    data = golden("actor", dtype)
    scale = config().collector.exploration_noise
    explored = dreamer.add_exploration_noise(data["action"], data["expl_noise"], scale)
    check(explored, data["expl_action"], OUTPUT[dtype], "expl_action")


def official_inverse(action):
    """The value before the tanh as the official code finds it: in float32, clipped."""
    return action.float().clamp(-0.99999997, 0.99999997).atanh().to(action.dtype)


@pytest.mark.parametrize("kind", ["action", "given"])
def test_eq03_log_prob_of_an_action_equals_the_official_one(golden, kind):
    data = golden("actor")
    action = data["action" if kind == "action" else "given_action"]
    noise = (official_inverse(action) - data["mean"]) / data["std"]
    log_prob = dreamer.action_log_prob(data["mean"], data["std"], noise)
    check(log_prob, data[f"{kind}_log_prob"], {"action": 1e-5, "given": 1e-4}[kind])


def test_mode_action_is_the_densest_sample_of_its_own_row(golden, dtype):
    """Each row takes its own best sample; officially all rows take the sample of row 0."""
    data = golden("actor", dtype)
    mean, std, noise = data["mean"], data["std"], data["mode_batch_noise"]
    one = dreamer.mode_action(mean[:1], std[:1], data["mode_noise"])
    check(one, data["mode"], OUTPUT[dtype], "mode")
    batch = dreamer.mode_action(mean, std, noise)
    check(batch[0], data["mode_batch_official"][0], OUTPUT[dtype], "mode_batch_official")
    samples = torch.tanh(mean + std * noise)
    for row, got in enumerate(batch):
        raw = official_inverse(samples[:, row])
        log_prob = Normal(mean[row], std[row]).log_prob(raw) - (1 - raw.tanh().square()).log()
        check(got, samples[log_prob.sum(-1).argmax(), row], OUTPUT[dtype], f"row {row}")


def test_initialization_is_glorot_orthogonal_and_zero():
    cfg = config()
    cfg.networks.update(state_dim=10, belief_dim=40, hidden_dim=50, channels=4)
    cfg.optimization.predict_discount = True
    for name, parameter in dreamer.make_agent(cfg, IMAGE, 3).named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
        elif name.endswith("weight_hh"):
            check(parameter.T @ parameter, torch.eye(parameter.shape[1]), 1e-5, name)
        else:
            fans = parameter[0].numel() + parameter[:, 0].numel()
            limit = math.sqrt(6 / fans)
            assert 0.9 * limit < parameter.abs().max() <= limit, name
            uniform = limit / math.sqrt(3)
            assert 0.8 * uniform < parameter.square().mean().sqrt() < 1.2 * uniform, name
