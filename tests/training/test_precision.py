"""Precision: autocast on the CPU, the fall-back, and what stays in float32."""

import math

import pytest
import torch

import dreamer
import dreamer_utils as utils
from common.device import make_autocast, resolve_precision, tune_process
from small_runs import SMALL, configure, small

CPU = torch.device("cpu")


def one_update(dtype, *overrides):
    """Losses, metrics and world-model gradients of one update from pixels, in `dtype`."""
    torch.manual_seed(0)
    cfg = configure(*SMALL, *overrides)
    agent = dreamer.make_agent(cfg, (64, 64, 3), 2)
    batch = {
        "observation": torch.randint(0, 255, (2, 4, 64, 64, 3), dtype=torch.uint8),
        "action": torch.rand(2, 4, 2),
        "reward": torch.rand(2, 4),
        "terminated": torch.zeros(2, 4, dtype=torch.bool),
    }
    hp = cfg.optimization
    noise = dreamer.draw_noise(2, 4, hp, agent.world_model)
    autocast = make_autocast(CPU, dtype)
    with autocast:
        loss, posterior, metrics = dreamer.dynamics_learning(agent.world_model, batch, noise, hp)
    with autocast:
        actor, value, more = dreamer.behavior_learning(agent, posterior, noise, hp)
    losses, metrics = {"world_model": loss, "actor": actor, "value": value}, metrics | more
    losses["world_model"].backward()
    gradients = [p.grad.flatten() for p in agent.world_model.parameters() if p.grad is not None]
    return losses, metrics, torch.cat(gradients)


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_reduced_precision_stays_close_and_losses_are_float32(dtype, bound):
    exact = one_update(torch.float32)
    losses, metrics, gradient = one_update(dtype)
    assert not torch.equal(gradient, exact[2]), "autocast did nothing"
    assert (gradient - exact[2]).norm() < bound * exact[2].norm()
    for name, value in (losses | metrics).items():
        assert value.dtype == torch.float32, name


def exact(value):
    """Whether float32 numbers would change if they were rounded to bfloat16: they never were."""
    return value.dtype == torch.float32 and not torch.equal(value, value.bfloat16().float())


def test_image_targets_and_the_reconstruction_loss_are_never_rounded(monkeypatch):
    seen, original = [], dreamer.log_normal

    def log_normal(target, mean, event_dims=0):
        seen.append((target, mean, event_dims, original(target, mean, event_dims)))
        return seen[-1][-1]

    monkeypatch.setattr(dreamer, "log_normal", log_normal)
    torch.manual_seed(0)
    one_update(torch.bfloat16)
    target, mean, event_dims, log_prob = next(call for call in seen if call[2] == 3)
    assert target.shape == (2, 4, 3, 64, 64) and exact(target) and mean.dtype == torch.float32
    levels = (target + 0.5) * 255
    assert (levels - levels.round()).abs().max() < 1e-4
    wanted = -0.5 * (target.double() - mean.double()).square().flatten(2).sum(2)
    wanted -= 3 * 64 * 64 / 2 * math.log(2 * math.pi)
    assert exact(log_prob)
    torch.testing.assert_close(log_prob.double(), wanted, rtol=1e-6, atol=0)


def test_the_gru_and_the_belief_are_never_rounded(monkeypatch):
    steps, forward = [], torch.nn.GRUCell.forward

    def spy(self, inputs, belief):
        steps.append((self, inputs, belief, forward(self, inputs, belief)))
        return steps[-1][-1]

    monkeypatch.setattr(torch.nn.GRUCell, "forward", spy)
    one_update(torch.bfloat16)
    monkeypatch.undo()
    assert len(steps) == 4 + 4  # of a sequence, and of a dream
    for number, (cell, inputs, belief, after) in enumerate(steps):
        assert exact(after) and belief.dtype == inputs.dtype == torch.float32
        torch.testing.assert_close(cell(inputs, belief), after, rtol=1e-6, atol=1e-7)
        if number in (1, 2, 3, 5, 6, 7):
            assert torch.equal(belief, steps[number - 1][-1]), "rounded on its way"


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_training_runs_in(tmp_path, name):
    _, rows = small(tmp_path / "run", f"optimization.autocast={name}")
    assert rows[-1]["updates"] > 0
    assert math.isfinite(rows[-1]["world_model/loss"])


def test_autocast_names():
    assert resolve_precision("false", CPU) == torch.float32
    assert resolve_precision("true", CPU) == torch.bfloat16
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    assert resolve_precision("float16", CPU) == torch.float16


AVX512 = {"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}


@pytest.mark.parametrize(
    "cpu, expected",
    [
        (AVX512, torch.bfloat16),
        ({**AVX512, "cpu_name": "Intel Xeon"}, torch.float32),
        ({**AVX512, "cpu_name": "Intel Xeon", "amx_bf16": True}, torch.bfloat16),
        ({**AVX512, "avx512_bf16": False}, torch.float32),
        ({"architecture": "aarch64"}, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_it_is_faster(monkeypatch, cpu, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert resolve_precision("auto", CPU) == expected


@pytest.mark.parametrize("size", [16, 320])
def test_float32_products_are_float32_on_every_processor(size):
    """With matrix tiles (AMX) PyTorch's "medium" would round them to bfloat16: 2e-3."""
    before = torch.get_float32_matmul_precision()
    try:
        tune_process(torch.device("cpu"))
        x = torch.randn(size, size, requires_grad=True)
        layer = torch.nn.Linear(size, size)
        exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        layer(x).sum().backward()
        column = layer.weight.double().sum(0).expand(size, size)
        for got, wanted in ((layer(x), exact), (x.grad, column)):
            assert (got - wanted).norm() < 1e-5 * wanted.norm()
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "broken, expected",
    [({torch.bfloat16}, torch.float16), ({torch.bfloat16, torch.float16}, torch.float32)],
)
def test_a_failing_precision_falls_back_with_one_line(monkeypatch, capsys, broken, expected):
    forward = torch.nn.GRUCell.forward

    def fail(self, *inputs):
        if torch.get_autocast_dtype("cpu") in broken:
            raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE")
        return forward(self, *inputs)

    monkeypatch.setattr(torch.nn.GRUCell, "forward", fail)
    assert resolve_precision("bfloat16", CPU) == expected
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(broken) and all("CUBLAS_STATUS_INVALID_VALUE" in line for line in said)


def test_float16_scales_the_loss_and_skips_a_step_that_overflows():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = utils.Optimizer([weight], 0.1, 1e-7, 100.0, float16=True)
    optimizer.backward(weight.sum() * float("inf"))
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))
    optimizer.backward(weight.sum())
    assert weight.grad[0] > 1000
    assert abs(optimizer.step() - 3**0.5) < 1e-5
    assert (weight < 1).all()
