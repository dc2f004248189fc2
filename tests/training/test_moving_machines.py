"""A run that moves to another machine goes on; float16 overflows without harm, or stops."""

import json
import math

import pytest
import torch

import dreamer_utils as utils
from common import checkpoint
from common.errors import UserError
from small_runs import SMALL, configure, small

FLOAT16 = ["optimization.autocast=float16", "eval.every=0"]


# Other devices


def test_a_checkpoint_of_a_gpu_goes_on_without_one(tmp_path, monkeypatch, capsys):
    """As TorchRL would save it there: one generator state for each GPU."""
    original = checkpoint.GlobalRNGState.state_dict

    def with_gpus(self):
        return original(self) | {"torch_cuda": [torch.get_rng_state()] * 2}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.GlobalRNGState, "state_dict", with_gpus)
        small(tmp_path / "run", "collector.total_steps=160")
    capsys.readouterr()
    _, rows = small(tmp_path / "run", "collector.total_steps=240")
    assert rows[-1]["environment_steps"] == 240
    assert "random generators of 2 GPU(s), this machine has 0" in capsys.readouterr().out


@pytest.mark.parametrize("before, after", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_another_precision_takes_the_optimizers_over(before, after):
    """A machine may fall back to float16, whose loss scaling has a state of its own."""
    parameter = torch.ones(3, requires_grad=True)
    optimizers = [
        utils.Optimizer([parameter], 0.1, 1e-7, 100.0, float16=name == "float16")
        for name in (before, after)
    ]
    optimizers[0].backward(parameter.sum())
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    optimizers[1].backward(parameter.sum())
    assert optimizers[1].step() == pytest.approx(math.sqrt(3))


# float16


def test_a_gradient_that_never_fits_stops_the_run(tmp_path, monkeypatch):
    """A NaN in every update is no overflow: no loss scale can cure it."""
    monkeypatch.setattr(utils, "SMALLEST_LOSS_SCALE", 2.0**12)
    original = utils.Optimizer.backward

    def backward(self, loss, retain_graph=False):
        original(self, loss, retain_graph)
        self.parameters[0].grad[...] = float("nan")

    monkeypatch.setattr(utils.Optimizer, "backward", backward)
    with pytest.raises(UserError, match="float16: gradients overflow whatever the loss scale"):
        small(tmp_path / "run", *FLOAT16, "optimization.pretrain=20")


def test_an_overflow_is_skipped_and_json_can_say_the_row(tmp_path, monkeypatch):
    original, count = utils.Optimizer.backward, 0

    def backward(self, loss, retain_graph=False):
        nonlocal count
        count += 1
        original(self, loss, retain_graph)
        if count == 1:
            self.parameters[0].grad[...] = float("inf")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.Optimizer, "backward", backward)
        small(tmp_path / "run", *FLOAT16)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "Infinity" not in text and "NaN" not in text
    norms = [json.loads(line).get("world_model/grad_norm") for line in text.splitlines()]
    assert any(norm is not None and norm > 0 for norm in norms)


def test_a_skipped_step_is_not_counted():
    parameter = torch.ones(3, requires_grad=True)
    optimizer = utils.Optimizer([parameter], 0.1, 1e-7, 100.0, float16=True)
    for number, factor in enumerate([1.0, float("inf"), 1.0]):
        optimizer.backward(factor * parameter.sum())
        optimizer.step()
        (group,) = optimizer.adam.param_groups
        taken = int(optimizer.adam.state[parameter]["step"])
        assert group["steps"] == taken == (1, 1, 2)[number]


# Threads


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_copies_of_the_environment_take_no_threads_from_training(n_envs):
    threads = torch.get_num_threads()
    env = utils.make_env(configure(*SMALL, f"env.n_parallel_envs={n_envs}", *steps(n_envs)))
    try:
        env.reset()
        assert torch.get_num_threads() == threads
    finally:
        utils.close_env(env)


def steps(n_envs):
    """Seed episodes for all copies."""
    return [f"collector.random_steps={40 * n_envs}", "collector.total_steps=400"]
