"""One whole update, by the function that the training loop calls: every official number."""

from types import SimpleNamespace

import pytest
import torch

import dreamer
import dreamer_utils as utils
from golden_weights import GRADIENT, OUTPUT, UPDATED, check, config, load_agent, official

EQUATIONS = "observe", "latent_kl", "imagine", "lambda_return", "discount_weight"
CASES = [
    pytest.param((name, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in ("train_step", "train_step_pcont")
    for dtype in (torch.float64, torch.float32)
]


def official_inputs(data):
    """The batch and the noise of an official training step, batch first."""
    end = 1 - data.get("discount_data", torch.ones_like(data["reward"]))
    batch = {
        "observation": data["image_u8"],
        "action": data["action"],
        "reward": data["reward"],
        "terminated": end.bool(),
    }
    noise = {
        "prior": data["prior_noise"],
        "posterior": data["post_noise"],
        "action": data["imag_action_noise"].transpose(0, 1),
        "state": data["imag_state_noise"].transpose(0, 1),
    }
    return batch, noise


def official_update(data, dtype, device):
    """One `dreamer.update`; keeps (arguments, result) of every equation, and raw gradients."""
    calls, gradients = {}, {}
    agent, cfg = load_agent(data).to(device), config(data).optimization
    cfg.horizon, cfg.free_nats = data["horizon"].item(), data["free_nats"].item()
    optimizers = utils.make_optimizers(cfg, agent)
    autocast = utils.make_autocast(device, torch.float32)
    batch, noise = (
        {name: value.to(device) for name, value in tensors.items()}
        for tensors in official_inputs(data)
    )

    def recorded(name, function):
        def call(*args):
            calls[name] = args, (result := function(*args))
            return result

        return call

    def recorded_step(optimizer, function=utils.Optimizer.step):
        gradients.update({p: p.grad.clone() for p in optimizer.parameters})
        return function(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        for equation in EQUATIONS:
            patch.setattr(dreamer, equation, recorded(equation, getattr(dreamer, equation)))
        patch.setattr(utils.Optimizer, "step", recorded_step)
        metrics = dreamer.update(agent, optimizers, batch, noise, cfg, autocast)
    return SimpleNamespace(
        data=data,
        dtype=dtype,
        agent=agent,
        cfg=cfg,
        calls=calls,
        gradients=gradients,
        metrics=metrics,
    )


@pytest.fixture(scope="module", params=CASES)
def step(request, golden):
    """An official training step on the CPU; test_on_gpu.py takes it on a GPU."""
    name, dtype = request.param
    return official_update(golden(name, dtype), dtype, torch.device("cpu"))


def test_eq01_latent_states_equal_the_official_ones(step):
    data, (arguments, states) = step.data, step.calls["observe"]
    embed = data["embed"].unflatten(-1, (2, 2, -1)).movedim(-1, -3).flatten(-3)
    check(arguments[1], embed, OUTPUT[step.dtype], "embed")
    for prefix, got in zip(("prior", "post"), states):
        for part, ours in (("mean",) * 2, ("std",) * 2, ("stoch", "state"), ("deter", "belief")):
            want = data["post_deter" if part == "deter" else f"{prefix}_{part}"]
            check(got[ours], want, OUTPUT[step.dtype], f"{prefix}_{part}")


def test_eq02_dreams_equal_the_official_ones(step):
    state, belief, _, _ = step.calls["imagine"][1]
    want = step.data["imag_feat"].transpose(0, 1)
    check(torch.cat([state, belief], -1), want, OUTPUT[step.dtype])


def test_eq06_returns_of_dreams_equal_the_official_ones(step):
    (reward, value, discount, _), target = step.calls["lambda_return"]
    for name, got in (
        ("imag_reward", reward[:, :-1]),
        ("imag_value", value[:, :-1]),
        ("imag_bootstrap", value[:, -1]),
        ("imag_pcont", discount[:, :-1]),
        ("returns", target),
        ("discount_weight", step.calls["discount_weight"][1]),
    ):
        want = step.data[name].movedim(0, -1)  # time-major
        check(got, want, OUTPUT[step.dtype], name)


def test_eq07_eq08_eq10_losses_equal_the_official_ones(step):
    check(step.calls["latent_kl"][1], step.data["kl"], OUTPUT[step.dtype], "kl")
    for name, sign, metric in (
        ("div_raw", 1, "world_model/kl"),
        ("image_like", -1, "world_model/observation_loss"),
        ("reward_like", -1, "world_model/reward_loss"),
        ("pcont_like", -1, "world_model/discount_loss"),
        ("model_loss", 1, "world_model/loss"),
        ("actor_loss", 1, "behavior/actor_loss"),
        ("value_loss", 1, "behavior/value_loss"),
    ):
        if name in step.data or name != "pcont_like":
            check(sign * step.metrics[metric], step.data[name], OUTPUT[step.dtype], name)


def test_alg1_every_gradient_equals_the_official_code(step):
    compared = set()
    for name, parameter, want in official(step.agent, step.data, "g"):
        check(step.gradients[parameter], want, GRADIENT[step.dtype], f"g.{name}")
        compared.add(parameter)
    assert compared == set(step.agent.parameters())


def test_alg1_every_gradient_norm_equals_the_official_code(step):
    for name, metric in (
        ("model_norm", "world_model/grad_norm"),
        ("actor_norm", "behavior/actor_grad_norm"),
        ("value_norm", "behavior/value_grad_norm"),
    ):
        check(step.metrics[metric], step.data[name], GRADIENT[step.dtype], name)


def test_alg1_every_updated_weight_equals_the_official_code(step):
    compared = set()
    for name, parameter, want in official(step.agent, step.data, "u"):
        check(parameter, want, UPDATED[step.dtype], f"u.{name}")
        compared.add(parameter)
    assert compared == set(step.agent.parameters())


def test_alg1_noise_is_standard_normal_in_the_official_shapes(step):
    """The same shapes as the official noise; standard normal, and different for every row."""
    _, official_noise = official_inputs(step.data)
    B, L = step.data["reward"].shape
    noise = dreamer.draw_noise(B, L, step.cfg, step.agent.world_model)
    for name, want in official_noise.items():
        assert noise[name].shape == want.shape and noise[name].dtype == want.dtype, name
        assert len(noise[name].unique()) == want.numel(), name
    noise = dreamer.draw_noise(400 * B, L, step.cfg, step.agent.world_model)
    for name, x in noise.items():
        assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1, name


@pytest.mark.parametrize("kind", ["clip", "small"])
def test_alg1_optimizer_steps_like_the_official_adam(golden, dtype, kind):
    """Adam with a global-norm clip; with gradients near eps, Keras and torch differ."""
    data, cfg = golden("adam", dtype), config().optimization
    parts = [x for x in "ab" if f"{kind}_{x}_0" in data]
    parameters = [data[f"{kind}_{x}_0"].clone().requires_grad_() for x in parts]
    optimizer = utils.Optimizer(parameters, cfg.world_model_lr, cfg.adam_eps, cfg.grad_clip)
    steps = sum(name.startswith(f"{kind}_norm_") for name in data)
    assert steps > 1
    for i in range(1, steps + 1):
        gradients = [data[f"{kind}_grad_{x}_{i}"] for x in parts]
        optimizer.backward(sum((p * g).sum() for p, g in zip(parameters, gradients)))
        check(optimizer.step(), data[f"{kind}_norm_{i}"], GRADIENT[dtype], f"norm {i}")
        for x, parameter in zip(parts, parameters):
            check(parameter, data[f"{kind}_{x}_{i}"], UPDATED[dtype], f"{x}, step {i}")


def test_alg1_backward_sets_the_gradients_of_its_own_parameters_only():
    mine, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = utils.Optimizer([mine], 0.1, 1e-7, 100.0)
    for _ in range(2):  # the second gradient replaces the first
        optimizer.backward((3 * mine * other).sum())
        check(mine.grad, torch.full((2,), 3.0), 1e-6)
    assert other.grad is None


def test_eq10_kl_at_floor_says_whether_the_kl_is_below_the_free_nats(step):
    """With pcont the official KL is below its 30 free nats, without it is above its 3."""
    at_floor = step.data["div_raw"].item() <= step.cfg.free_nats
    assert step.metrics["world_model/kl_at_floor"].item() == float(at_floor)
    assert at_floor == ("discount_data" in step.data)
