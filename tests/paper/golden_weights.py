"""Official weights, gradients and updated weights in our layout, and the metric that compares."""

from pathlib import Path

import torch
from omegaconf import OmegaConf

import dreamer
from common.envs import IMAGE

# Largest |got - want| / (1 + |want|)
OUTPUT = {torch.float64: 1e-8, torch.float32: 1e-5}
GRADIENT = {torch.float64: 1e-8, torch.float32: 1e-3}
UPDATED = {torch.float64: 1e-7, torch.float32: 1e-5}

# Official layers of the RSSM -> ours
RSSM = {
    "img1": "prior.action_state_projector.0",
    "gru": "prior.rnn",
    "img2": "prior.rnn_to_prior_projector.0",
    "img3": "prior.rnn_to_prior_projector.2",
    "obs1": "posterior.obs_rnn_to_post_projector.0",
    "obs2": "posterior.obs_rnn_to_post_projector.2",
}
# Every other official module is a stack of layers h0, h1, ..., hout -> ours, in the same order
STACKS = {
    "enc": "world_model.encoder",
    "dec": "world_model.decoder",
    "reward": "world_model.reward",
    "pcont": "world_model.discount",
    "actor": "actor",
    "value": "value",
}


def check(got, want, tolerance, name=""):
    """Asserts equal shapes and a small error in the golden metric."""
    got, want = torch.as_tensor(got).detach().cpu().double(), torch.as_tensor(want).double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    error = ((got - want).abs() / (1 + want.abs())).max().item()
    assert error <= tolerance, f"{name}: error {error:.2e} is above {tolerance:.0e}"


def config(data=()):
    """config.yaml, with the sizes of the networks whose weights are in `data`."""
    cfg = OmegaConf.load(Path(dreamer.__file__).with_name("config.yaml"))
    size = {name.removeprefix("w."): data[name].shape for name in data if name.startswith("w.")}
    heads = [name for name in ("actor", "reward", "value", "pcont") if f"{name}.h0.bias" in size]
    if "rssm.gru.bias" in size:
        state, belief = size["rssm.img3.bias"][0] // 2, size["rssm.gru.bias"][1] // 3
    else:  # only their sum is known, and only their sum matters
        first = ["dec.h1.kernel", *(f"{head}.h0.kernel" for head in heads)]
        inputs = [size[name][0] for name in first if name in size]
        state, belief = 1, max(inputs, default=2) - 1
    if heads:
        hidden = size[f"{heads[0]}.h0.bias"][0]
    else:  # with vector observations, an embedding has `hidden_dim` units
        hidden = size["rssm.obs1.kernel"][0] - belief if "rssm.obs1.kernel" in size else 1
    if "enc.h1.bias" in size:
        channels = size["enc.h1.bias"][0]
    else:
        channels = size["dec.h1.bias"][0] // 32 if "dec.h1.bias" in size else 1
    cfg.networks.update(state_dim=state, belief_dim=belief, hidden_dim=hidden, channels=channels)
    cfg.optimization.predict_discount = "pcont" in heads
    return cfg


def load_agent(data):
    """Our agent with the official weights in `data`, in their dtype; all others stay random."""
    cfg = config(data)
    if "w.actor.hout.bias" in data:
        action_dim = len(data["w.actor.hout.bias"]) // 2
    elif "w.rssm.img1.kernel" in data:
        action_dim = len(data["w.rssm.img1.kernel"]) - cfg.networks.state_dim
    else:
        action_dim = 1
    pixels = "w.enc.h1.kernel" in data or "w.dec.h1.kernel" in data
    agent = dreamer.make_agent(cfg, IMAGE if pixels else (1,), action_dim)
    agent.to(next(data[name].dtype for name in data if name.startswith("w.")))
    with torch.no_grad():
        for name, parameter, array in official(agent, data, "w"):
            assert parameter.shape == array.shape, name
            parameter.copy_(array)
    return agent


def official(agent, data, kind):
    """Yields (name, our parameter, the official array in its layout).

    kind: `w` weights, `g` gradients, `u` updated weights.
    """
    for name, layer in our_layers(agent, data).items():
        kernel, bias = data[f"{kind}.{name}.kernel"], data[f"{kind}.{name}.bias"]
        if name == "rssm.gru":
            recurrent = data[f"{kind}.{name}.recurrent_kernel"]
            arrays = {
                "weight_ih": kernel.T,
                "weight_hh": recurrent.T,
                "bias_ih": bias[0],
                "bias_hh": bias[1],
            }
            for part, array in arrays.items():
                update_gate, reset_gate, candidate = array.chunk(3)
                array = torch.cat([reset_gate, update_gate, candidate])
                yield f"{name}.{part}", getattr(layer, part), array
            continue
        if name == "rssm.obs1" and "w.enc.h1.kernel" in data:
            belief = len(data["w.rssm.gru.kernel"])
            kernel = torch.cat([kernel[:belief], channels_first(kernel[belief:].T).T])
        kernel = kernel.permute(3, 2, 0, 1) if kernel.dim() == 4 else kernel.T
        yield f"{name}.weight", layer.weight, kernel
        yield f"{name}.bias", layer.bias, bias


def our_layers(agent, data):
    """Official layer with weights in `data`, e.g. `rssm.img1` -> our layer."""
    modules = {}
    for name in data:
        if name.startswith("w.") and name.endswith(".kernel"):
            _, module, layer, _ = name.split(".")
            modules.setdefault(module, []).append(layer)
    table = {}
    for module, names in modules.items():
        if module == "rssm":
            ours = [agent.get_submodule(f"world_model.{RSSM[name]}") for name in names]
        else:
            names.sort()
            stack = agent.get_submodule(STACKS[module]).modules()
            ours = [layer for layer in stack if hasattr(layer, "weight")]
        table |= {f"{module}.{name}": x for name, x in zip(names, ours, strict=True)}
    return table


def channels_first(embedding):
    """[..., 4 * C] flattened (height, width, channel) -> flattened (channel, height, width)."""
    return embedding.unflatten(-1, (2, 2, -1)).movedim(-1, -3).flatten(-3)


def check_gradients(agent, data, tolerance):
    """Checks the gradients of all parameters with an official gradient in `data`."""
    for name, parameter, gradient in official(agent, data, "g"):
        check(parameter.grad, gradient, tolerance, f"g.{name}")
