"""Dreamer from TorchRL's parts: one update made of its own modules and losses.

The baseline of throughput.py, whose tables call it the library. The parts are those of TorchRL's
example for this algorithm: `RSSMRollout` over a prior and a posterior inside a
`WorldModelWrapper`, imagination by `DreamerEnv.rollout`, three loss modules, and for each in turn
backward, clip and an Adam step. Layer sizes, batch, horizon, learning rates and clip come from the
same configuration as ours.

Where a choice was open it is the one that makes this baseline faster: images come as float32 in
[0, 1], channels first, so that no conversion is timed; reward and value heads return their mean
instead of going through a distribution; there is no loss scaling; on a GPU Adam is fused. Two
things are set so that it computes what it is meant to: `tanh_loc` of the action distribution, and
`time_dim` of the lambda-return, without which lambda is ignored.
"""

import functools

import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import DreamerEnv
from torchrl.modules import (
    MLP,
    DreamerActor,
    ObsDecoder,
    ObsEncoder,
    RSSMPosterior,
    RSSMPrior,
    RSSMRollout,
    TanhNormal,
    WorldModelWrapper,
)
from torchrl.objectives.dreamer import DreamerActorLoss, DreamerModelLoss, DreamerValueLoss

PRIOR_KEYS = [("next", "prior_mean"), ("next", "prior_std"), "_", ("next", "belief")]
POSTERIOR_KEYS = [("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")]
FEATURES = ["state", "belief"]


def observation_networks(net, shape, dense):
    """Encoder, decoder and embedding size for observations of `shape`, (64, 64, 3) or (n,)."""
    features = net.state_dim + net.belief_dim
    if len(shape) == 3:
        encoder = ObsEncoder(net.channels, in_channels=shape[-1])
        decoder = ObsDecoder(net.channels, latent_dim=features, out_channels=shape[-1])
        return encoder, decoder, net.channels * 8 * 2 * 2
    encoder = dense(shape[0], net.hidden_dim, depth=2)
    return encoder, dense(features, shape[0], depth=3), net.hidden_dim


class TorchRLBaseline:
    """The networks, losses and optimizers; `update` is one whole update.

    Args:
        cfg: our configuration, of which `networks` and `optimization` are read.
        shape: of one observation, (64, 64, 3) or (n,).
        actions: action size.
        autocast: a context that can be entered again and again; losses are computed inside.
        compiled: names whose losses go through `torch.compile`; in the example actor and value.
    """

    def __init__(self, cfg, shape, actions, device, autocast, compiled=()):
        net, self.hp = cfg.networks, cfg.optimization
        self.device, self.autocast = device, autocast
        self.pixels, features = len(shape) == 3, net.state_dim + net.belief_dim
        dense = functools.partial(MLP, num_cells=net.hidden_dim, activation_class=nn.ELU)
        encoder, decoder, embedding = observation_networks(net, shape, dense)
        action_spec = Bounded(-1, 1, (actions,))
        sizes = {"hidden_dim": net.belief_dim, "rnn_hidden_dim": net.belief_dim}
        prior = RSSMPrior(action_spec, state_dim=net.state_dim, action_dim=actions, **sizes)
        posterior = RSSMPosterior(state_dim=net.state_dim, obs_embed_dim=embedding, **sizes)
        reward = dense(features, 1, depth=2)
        self.world_model = self.build_world_model(encoder, decoder, prior, posterior, reward)
        self.world_model.to(device)
        self.env = self.build_env(prior, reward, net, action_spec)
        actor = DreamerActor(actions, depth=4, num_cells=net.hidden_dim)
        self.actor = ProbabilisticTensorDictSequential(
            TensorDictModule(actor, FEATURES, ["loc", "scale"]),
            ProbabilisticTensorDictModule(
                ["loc", "scale"],
                ["action"],
                distribution_class=TanhNormal,
                distribution_kwargs={"tanh_loc": True},
                default_interaction_type=InteractionType.RANDOM,
            ),
        ).to(device)
        value = dense(features, 1, depth=3).to(device)
        self.value = TensorDictModule(value, FEATURES, ["state_value"])
        zeros = {"state": net.state_dim, "belief": net.belief_dim}
        self.actor(  # sets the lazy first layer
            TensorDict({k: torch.zeros(1, n, device=device) for k, n in zeros.items()}, [1])
        )
        self.build_losses(compiled)
        self.initial = zeros

    def build_world_model(self, encoder, decoder, prior, posterior, reward):
        """Encoder, rollout and decoder, then reward head: the order the model loss relies on."""
        key = "pixels" if self.pixels else "observation"
        rollout = RSSMRollout(
            TensorDictModule(prior, [*FEATURES, "action"], PRIOR_KEYS),
            TensorDictModule(
                posterior, [("next", "belief"), ("next", "encoded_latents")], POSTERIOR_KEYS
            ),
        )
        after = [("next", name) for name in FEATURES]
        transition = TensorDictSequential(
            TensorDictModule(encoder, [("next", key)], [("next", "encoded_latents")]),
            rollout,
            TensorDictModule(decoder, after, [("next", f"reco_{key}")]),
        )
        return WorldModelWrapper(transition, TensorDictModule(reward, after, [("next", "reward")]))

    def build_env(self, prior, reward, net, action_spec):
        """The environment that dreams: prior and reward head, with specs given by hand."""
        model = WorldModelWrapper(
            TensorDictModule(prior, [*FEATURES, "action"], ["_", "_", *FEATURES]),
            TensorDictModule(reward, FEATURES, ["reward"]),
        )
        env = DreamerEnv(model, (net.state_dim,), (net.belief_dim,), device=self.device)
        latent = Composite(state=Unbounded((net.state_dim,)), belief=Unbounded((net.belief_dim,)))
        env.observation_spec = latent.to(self.device)
        env.state_spec = latent.clone().to(self.device)
        env.action_spec = action_spec.to(self.device)
        env.reward_spec = Unbounded((1,), device=self.device)
        return env

    def build_losses(self, compiled):
        """Three losses and three optimizers, by the names of the three updates."""
        hp, fused = self.hp, self.device.type == "cuda"
        model = DreamerModelLoss(self.world_model, free_nats=hp.free_nats)
        if not self.pixels:
            model.set_keys(pixels="observation", reco_pixels="reco_observation")
        actor = DreamerActorLoss(self.actor, self.value, self.env, imagination_horizon=hp.horizon)
        actor.make_value_estimator(gamma=hp.gamma, lmbda=hp.lambda_, time_dim=-2)
        value = DreamerValueLoss(self.value, gamma=hp.gamma)
        self.losses = {"world_model": model, "actor": actor, "value": value}
        for name in compiled:
            self.losses[name] = torch.compile(self.losses[name])
        self.parameters = {name: list(getattr(self, name).parameters()) for name in self.losses}
        self.optimizers = {
            name: torch.optim.Adam(parameters, getattr(hp, f"{name}_lr"), fused=fused)
            for name, parameters in self.parameters.items()
        }

    def make_batch(self, observation, action, reward):
        """Our rows, [B, L, ...], in the layout that TorchRL's replay yields."""
        size = action.shape[:2]
        if self.pixels:
            observation = (observation.movedim(-1, -3) / 255).contiguous()
        zeros = {k: torch.zeros(*size, n, device=self.device) for k, n in self.initial.items()}
        key = "pixels" if self.pixels else "observation"
        after = {key: observation, "reward": reward[..., None]}
        return TensorDict({**zeros, "action": action, "next": after}, size)

    def update(self, batch, clock):
        """One whole update; returns the losses. `clock(name)` is called at each phase's end."""
        loss, data = self.forward("world_model", batch.copy())
        clock("dynamics forward")
        self.backward("world_model", loss)
        clock("dynamics backward")
        self.step("world_model")
        clock("optimizer")
        losses, data = {"world_model": loss}, data.reshape(-1)
        for name in ("actor", "value"):
            losses[name], data = self.forward(name, data)
            clock("behavior forward")
            self.backward(name, losses[name])
            clock("behavior backward")
            self.step(name)
            clock("optimizer")
        return {name: loss.detach() for name, loss in losses.items()}

    def forward(self, name, data):
        """A loss under autocast, and the data that the next loss takes."""
        with self.autocast:
            losses, data = self.losses[name](data)
            parts = [value.sum() for key, value in losses.items() if key.startswith("loss")]
        return sum(parts), data

    def backward(self, name, loss):
        """Gradients of one of the three losses."""
        self.optimizers[name].zero_grad()
        loss.backward()

    def step(self, name):
        """Clips the gradients of one of the three, and steps."""
        nn.utils.clip_grad_norm_(self.parameters[name], self.hp.grad_clip)
        self.optimizers[name].step()
