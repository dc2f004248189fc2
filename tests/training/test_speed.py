"""Speed without a change of meaning: every fast setting against the plain one.

How fast they are is measured in benchmarks/throughput.py.
"""

import copy
import os

import pytest
import torch
from on_fake_gpu import find_compiler
from tensordict import TensorDict
from torch import nn

import dreamer
import dreamer_utils as utils
from common.device import compile_steps, make_autocast, say_if_crowded
from common.errors import UserError
from common.layers import Convolution, Deconvolution, GRUCell, with_parameters_of
from common.replay import Replay
from common.rows import replay_layout
from small_runs import SMALL, configure, small

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler is here")


def plain(agent):
    """The same agent with PyTorch's own convolutions and ELUs, and the channels first."""
    own = {Convolution: nn.Conv2d, Deconvolution: nn.ConvTranspose2d}
    replaced = []
    for layers in (agent.world_model.encoder.encoder, agent.world_model.decoder.decoder):
        for index, layer in enumerate(layers):
            if type(layer) in own:
                replaced.append(type(layer))
                layers[index] = with_parameters_of(layer, own[type(layer)])
    assert replaced == [Convolution, *[Deconvolution] * 4]
    for module in agent.modules():
        if isinstance(module, nn.ELU):
            module.inplace = False
    preprocess = agent.world_model.preprocess
    agent.world_model.preprocess = lambda observation: preprocess(observation).contiguous()
    return agent.to(memory_format=torch.contiguous_format)


def one_update(kind, dtype=torch.float32, device=CPU):
    """(change of all parameters, gradients) of one update from pixels, as flat vectors.

    Args:
        kind: plain, fast (the default of a run) or compiled.
    """
    torch.manual_seed(0)
    cfg = configure(*SMALL, "networks.channels=4", f"optimization.compile={kind == 'compiled'}")
    hp = cfg.optimization
    agent = dreamer.make_agent(cfg, (64, 64, 3), 2).to(device)
    batch = {
        "observation": torch.randint(0, 255, (3, 6, 64, 64, 3), dtype=torch.uint8),
        "action": torch.rand(3, 6, 2) * 2 - 1,
        "reward": torch.rand(3, 6),
        "terminated": torch.zeros(3, 6, dtype=torch.bool),
    }
    batch = {name: value.to(device) for name, value in batch.items()}
    noise = dreamer.draw_noise(3, 6, hp, agent.world_model)
    if kind == "plain":
        plain(agent)
    before = copy.deepcopy(agent.state_dict())
    compile_steps(agent, hp.compile, device)
    optimizers = utils.make_optimizers(hp, agent, dtype)
    for optimizer in optimizers.values():  # the default scale overflows, and is then lowered
        scaling = {"init_scale": 256.0, "enabled": dtype == torch.float16}
        optimizer.scaler = torch.amp.GradScaler(device.type, **scaling)
    dreamer.update(agent, optimizers, batch, noise, hp, make_autocast(device, dtype))
    delta = [(p - before[name]).flatten() for name, p in agent.named_parameters()]
    return torch.cat(delta).detach(), torch.cat([p.grad.flatten() for p in agent.parameters()])


def distance(one, other):
    """Of two vectors, relative to the other's length."""
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def reference():
    return one_update("plain")


@pytest.mark.parametrize("kind", ["fast", "compiled"])
def test_float32_fast_equals_plain(reference, kind):
    delta, gradient = one_update(kind)
    assert distance(gradient, reference[1]) < 1e-5
    assert distance(delta, reference[0]) < 1e-5


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("kind", ["fast", "compiled"])
def test_reduced_precision_stays_within_its_bound(reference, kind, dtype, bound):
    gradient = one_update(kind, dtype)[1]
    assert 0 < distance(gradient, reference[1]) < bound


@pytest.mark.parametrize(
    "own, size, kernel",
    [(Convolution, size, 4) for size in (4, 6, 7)]
    + [(Deconvolution, *sizes) for sizes in ((1, 5), (5, 5), (13, 6), (30, 6))],
)
def test_own_convolutions_equal_pytorchs(own, size, kernel, dtype):
    layer = own.__base__(6, 4, kernel, stride=2).to(dtype)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(3, 6, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    inputs = x, layer.weight, layer.bias
    image = layer(x)
    upstream = torch.randn_like(image)
    wanted = torch.autograd.grad(image, inputs, upstream)
    got = with_parameters_of(layer, own)(x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, image, atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def test_the_gru_cell_written_out_equals_pytorchs(dtype):
    """What is compiled for a GPU computes what everything else computes."""
    cell = nn.GRUCell(5, 7, dtype=dtype)
    own = GRUCell.like(cell)
    x = torch.randn(4, 5, dtype=dtype, requires_grad=True)
    belief = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    inputs = x, belief, *cell.parameters()
    wanted = cell(x, belief)
    upstream = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, inputs, upstream)
    assert torch.equal(own(x, belief), wanted)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    got = own.written_out(x, belief)
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
    for mine, theirs in zip(torch.autograd.grad(got, inputs, upstream), gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("discount", [True, False])
def test_an_update_is_one_graph_of_static_shapes(pixels, discount):
    """No branch of the losses depends on data, which CUDA graphs need."""
    cfg = configure(*SMALL, f"optimization.predict_discount={discount}")
    hp = cfg.optimization
    shape = (64, 64, 3) if pixels else (5,)
    agent = dreamer.make_agent(cfg, shape, 2)
    observation = torch.rand(2, 4, *shape)
    observation = (observation * 255).byte() if pixels else observation
    batch = {
        "observation": observation,
        "action": torch.rand(2, 4, 2),
        "reward": torch.rand(2, 4),
        "terminated": torch.rand(2, 4) > 0.5,
    }
    noise = dreamer.draw_noise(2, 4, hp, agent.world_model)

    def losses():
        model, posterior, _ = dreamer.dynamics_learning(agent.world_model, batch, noise, hp)
        actor, value, _ = dreamer.behavior_learning(agent, posterior, noise, hp)
        return model, actor, value

    wanted = losses()
    for loss, same in zip(torch.compile(losses, fullgraph=True, backend="aot_eager")(), wanted):
        torch.testing.assert_close(loss, same)


@needs_compiler
def test_training_runs_compiled_and_acts_without_compiling(tmp_path):
    from torch._dynamo.utils import counters

    counters.clear()
    weights, rows = small(tmp_path / "run", "optimization.compile=true", "logger.mode=disabled")
    assert rows[-1]["updates"] > 0
    assert counters["stats"]["unique_graphs"] > 0
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 8, "acting was compiled as well"


def is_compiled(agent):
    """Whether the steps are compiled, and the agent knows it."""
    world_model = agent.world_model
    # PyTorch has no public way to ask.
    steps = {
        module._compiled_call_impl is not None
        for module in (world_model.prior, world_model.posterior, agent.actor)
    }
    assert steps == {agent.compiled}
    return agent.compiled


@needs_compiler
def test_compile_is_chosen_by_device():
    def compiled(*overrides):
        cfg = configure(*SMALL, *overrides)
        agent = dreamer.make_agent(cfg, (5,), 2)
        compile_steps(agent, cfg.optimization.compile, CPU)
        return is_compiled(agent)

    assert not compiled()
    assert not compiled("optimization.compile=false")
    assert compiled("optimization.compile=True")
    assert compiled("optimization.compile=reduce-overhead")


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("InvalidCxxCompiler: none found")

    cfg = configure(*SMALL, "optimization.compile=true")
    agent = dreamer.make_agent(cfg, (5,), 2)
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    compile_steps(agent, cfg.optimization.compile, CPU)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and "InvalidCxxCompiler" in said[0]
    assert not is_compiled(agent)


def empty_replay(directory, device=CPU):
    """A replay for observations and actions of one number."""
    cfg = configure(*SMALL)
    _, layout = replay_layout(cfg, (1,), 1)
    return Replay(cfg.replay_buffer, 200, layout, directory, 1, device)


def filled_replay(directory, device=CPU):
    """A replay with one episode whose observation o_t is t."""
    replay = empty_replay(directory, device)
    t = torch.arange(60).float()[:, None]
    after = {"observation": t + 1, "reward": t, "terminated": t < 0, "done": t == 59}
    steps = {"observation": t, "action": t, "terminated": t < 0, "next": TensorDict(after, [60])}
    replay.extend(TensorDict(steps, [60]))
    return replay


def test_batches_drawn_ahead_are_those_drawn_in_turn(tmp_path):
    one, other = (filled_replay(tmp_path / name) for name in "ab")
    ahead = [batch["observation"] for batch in one.batches(5)]
    ahead += [batch["observation"] for batch in one.batches(2)]
    in_turn = [other.sample()["observation"] for _ in range(7)]
    assert all(map(torch.equal, ahead, in_turn)) and len(ahead) == 7
    assert not torch.equal(ahead[0], ahead[1])


def test_drawing_ahead_leaves_all_other_randomness_alone(tmp_path):
    replay = filled_replay(tmp_path / "replay")
    state = torch.get_rng_state()
    assert len(list(replay.batches(3))) == 3 and list(replay.batches(0)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_mistake_found_while_drawing_ahead_is_reported(tmp_path):
    replay = empty_replay(tmp_path / "replay")
    with pytest.raises(UserError, match="no episode has"):
        next(replay.batches(2))


@pytest.mark.parametrize(
    ("load", "threads", "said"), [(0.4, 4, ""), (3.9, 4, "=1 "), (1.2, 4, "=3 "), (3.9, 1, "")]
)
def test_a_start_says_that_cores_are_busy(monkeypatch, load, threads, said):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    sentence = say_if_crowded()
    assert bool(sentence) == bool(said) and said in sentence
