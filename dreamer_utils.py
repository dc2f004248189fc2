"""The builders that dreamer.py calls, one function or class for each part of the paper's App. A.

Networks, optimizers and the policy are here. Each chore behind `make_env`, `make_replay`,
`make_collector`, `make_evaluation`, `make_logger` and `make_run` has a room in common/.
"""

import contextlib
import math
import random

import numpy as np
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModuleBase
from torch import nn

from common.agents import export_agent, find_checkpoint, load_weights, take_over_config
from common.command_line import end_of_job
from common.config import load_config, register_configs
from common.dashboard import check_wandb
from common.device import (
    bring_together,
    compile_steps,
    make_autocast,
    move_together,
    resolve_device,
    resolve_precision,
    tune_process,
)
from common.diagnostics import Diagnostics
from common.doctor import Doctor
from common.envs import WorkerTask, make_task, quiet_libraries
from common.episodes import (
    EVALUATION,
    EpisodeSeeds,
    ResumableCollector,
    ResumedMemory,
    resumed_episodes,
    workers_of,
)
from common.errors import UserError, user_message
from common.evaluation import Evaluation, write_evaluation
from common.layers import (
    Convolution,
    Deconvolution,
    FullPrecision,
    GRUCell,
    with_parameters_of,
)
from common.logger import Logger
from common.memory import check_memory
from common.opengl import no_opengl, prepare_gl
from common.replay import Replay
from common.report import check_versions, run_metadata
from common.rows import place_rows, replay_layout
from common.run import Run
from common.signals import children_without_signals

with no_opengl():
    import torchrl
    from torchrl import envs, modules
    from torchrl.collectors import Collector
    from torchrl.data import Unbounded

__all__ = [  # what dreamer.py takes from common/ as it is
    "Diagnostics",
    "Doctor",
    "UserError",
    "compile_steps",
    "end_of_job",
    "export_agent",
    "load_config",
    "make_autocast",
    "register_configs",
    "run_metadata",
    "user_message",
]


# --- Networks (App. A) ---------------------------------------------------------------------------
def make_mlp(inputs, outputs, depth, units):
    """A dense network with `depth` hidden ELU layers; several inputs are concatenated."""
    net = modules.MLP(inputs, outputs, depth=depth, num_cells=units, activation_class=nn.ELU)
    return net.append(FullPrecision())


def feature_size(net):
    """Numbers of a model state: the stochastic part and the belief."""
    return net.state_dim + net.belief_dim


def is_image(observation_shape):
    """Whether observations are images [64, 64, 3], not state vectors [n]."""
    return len(observation_shape) == 3


def embedding_size(net, observation_shape):
    """Numbers of an encoded observation."""
    return net.channels * 8 * 2 * 2 if is_image(observation_shape) else net.hidden_dim


def make_encoder(net, observation_shape):
    """Four convolutions for images, a dense network of two layers for state vectors.

    Args:
        net: the configuration's section `networks`, here and below.
    """
    if is_image(observation_shape):
        encoder = modules.ObsEncoder(net.channels, in_channels=observation_shape[-1])
        encoder.encoder[-2] = with_parameters_of(encoder.encoder[-2], Convolution)
        return encoder
    return make_mlp(observation_shape[0], net.hidden_dim, depth=2, units=net.hidden_dim)


def make_decoder(net, observation_shape):
    """The mean of the observation: four deconvolutions, or a dense network of three layers."""
    features = feature_size(net)
    if not is_image(observation_shape):
        return make_mlp(features, observation_shape[0], depth=3, units=net.hidden_dim)
    decoder = modules.ObsDecoder(net.channels, latent_dim=features)
    decoder.state_to_latent[1] = nn.Identity()  # officially no activation here
    for index in range(0, len(decoder.decoder), 2):
        decoder.decoder[index] = with_parameters_of(decoder.decoder[index], Deconvolution)
    decoder.decoder.append(FullPrecision())
    return decoder


def make_prior(net, action_dim):
    """The transition model q(s_t | s_{t-1}, a_{t-1})."""
    units = net.belief_dim
    prior = TransitionModel(
        torch.zeros(action_dim), units, units, net.state_dim, action_dim=action_dim
    )
    prior.rnn = GRUCell.like(prior.rnn)
    prior.rnn_to_prior_projector[-1] = latent_gaussian(net.min_std)
    return prior


def make_posterior(net, observation_shape):
    """The representation model p(s_t | s_{t-1}, a_{t-1}, o_t), from belief and embedding."""
    posterior = modules.RSSMPosterior(
        net.belief_dim,
        net.state_dim,
        rnn_hidden_dim=net.belief_dim,
        obs_embed_dim=embedding_size(net, observation_shape),
    )
    posterior.obs_rnn_to_post_projector[-1] = latent_gaussian(net.min_std)
    return posterior


def latent_gaussian(min_std):
    """[..., 2 S] -> mean and std = softplus(raw) + min_std, each [..., S].

    TorchRL's own max(softplus(raw), min_std) has no gradient below.
    """
    mapping = f"biased_softplus_{math.log(2) + min_std}_{min_std}"
    return nn.Sequential(FullPrecision(), NormalParamExtractor(mapping, scale_lb=0.0))


def make_reward(net):
    """The mean of the reward q(r_t | s_t)."""
    return make_mlp(feature_size(net), 1, depth=2, units=net.hidden_dim)


def make_discount(net):
    """The logit of going on after s_t, for tasks that terminate."""
    return make_mlp(feature_size(net), 1, depth=3, units=net.hidden_dim)


def make_value(net):
    """The value model v(s_t), psi."""
    return make_mlp(feature_size(net), 1, depth=3, units=net.hidden_dim)


def make_actor(net, action_dim):
    """The action model q(a_t | s_t), phi."""
    actor = Actor(net, action_dim)
    actor(torch.zeros(1, net.state_dim), torch.zeros(1, net.belief_dim))  # sizes its first layer
    return actor


class TransitionModel(modules.RSSMPrior):
    """TorchRL's RSSM prior; its belief is never rounded below float32, and may be float64."""

    def forward(self, state, belief, action, noise):
        """Eq. (1), the transition model.

        Args:
            state, belief, action: s_{t-1} [n, S], [n, D], a_{t-1} [n, A].
            noise: [n, S], standard normal.
        Returns:
            mean, std and sample of s_t [n, S], next belief [n, D].
        """
        hidden = self.action_state_projector(torch.cat([state, action], -1))
        # A GRU in bfloat16 fails on some GPU and driver pairs (CUBLAS_STATUS_INVALID_VALUE).
        with torch.autocast(hidden.device.type, enabled=False):
            belief = self.rnn(hidden.to(belief.dtype), belief)
        mean, std = self.rnn_to_prior_projector(belief)
        return mean, std, mean + std * noise, belief


class Actor(modules.DreamerActor):
    """TorchRL's actor; gives mean (bounded) and std of the Gaussian under the tanh, [..., A]."""

    def __init__(self, net, action_dim):
        super().__init__(action_dim, 4, net.hidden_dim)
        # The official initial std leaves out its floor of 1e-4, and the bias is not a float32.
        self.backbone[-1].scale_mapping.bias = math.log(math.expm1(net.action_std))
        self.mean_scale = net.action_mean_scale
        self.backbone.insert(len(self.backbone) - 1, FullPrecision())

    def forward(self, state, belief):
        """mean and std [..., A] of s_t [..., S], [..., D]."""
        mean, std = super().forward(state, belief)
        return self.mean_scale * torch.tanh(mean / self.mean_scale), std


class WorldModel(nn.Module):
    """theta: encoder, decoder, RSSM (prior and posterior), reward, discount if it is predicted."""

    def __init__(self, encoder, decoder, prior, posterior, reward, discount=None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.prior, self.posterior = prior, posterior
        self.reward, self.discount = reward, discount
        state, belief = prior.state_dim, prior.rnn.hidden_size
        action = prior.action_state_projector[0].in_features - state
        self.sizes = {"state": state, "belief": belief, "action": action}
        self.from_pixels = isinstance(encoder, modules.ObsEncoder)

    @property
    def dtype(self):
        """The precision of the parameters."""
        return self.prior.rnn.weight_ih.dtype

    @property
    def device(self):
        """Where the parameters are."""
        return self.prior.rnn.weight_ih.device

    def preprocess(self, observation):
        """Network input and target.

        uint8 [..., 64, 64, 3] -> [..., 3, 64, 64] in +-0.5, or the state vector as it is; in the
        precision of the parameters.
        """
        if not self.from_pixels:
            return observation.to(self.dtype)
        return observation.movedim(-1, -3).to(self.dtype, copy=True).div_(255).sub_(0.5)

    def initial(self, n):
        """The zero state [n, S] and belief [n, D] that sequences and episodes start from."""
        like = self.prior.rnn.weight_ih
        return like.new_zeros(n, self.sizes["state"]), like.new_zeros(n, self.sizes["belief"])


class Agent(nn.Module):
    """theta (`world_model`), phi (`actor`) and psi (`value`), with the official initialization."""

    def __init__(self, world_model, actor, value):
        super().__init__()
        self.world_model, self.actor, self.value = world_model, actor, value
        self.compiled = False  # see common.device.compile_steps
        self.apply(initialize)
        self.to(memory_format=torch.channels_last)  # as images come from disk
        for model in (world_model.prior, world_model.posterior, actor):
            elu_in_place(model)


def elu_in_place(model):
    """Saves memory, and an exponential in every gradient.

    For inputs [n, I] only: a linear layer returns a view of anything longer, and to write into a
    view costs a copy.
    """
    for module in model.modules():
        if isinstance(module, nn.ELU):
            module.inplace = True


def initialize(module):
    """Glorot-uniform kernels, orthogonal recurrent matrix, zero biases: the official defaults."""
    for name, parameter in module.named_parameters(recurse=False):
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif name == "weight_hh":
            nn.init.orthogonal_(parameter)
        else:
            nn.init.xavier_uniform_(parameter)


@contextlib.contextmanager
def freeze(agent):
    """Holds theta constant inside, where steps are compiled.

    They would give its parameters gradients that nobody wants. Other steps leave those out by
    themselves, and would cast constants anew each time.
    """
    frozen = list(agent.world_model.parameters()) if agent.compiled else []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


SMALLEST_LOSS_SCALE = 2.0**-10  # far below the 2^16 at the start: every update overflows


# --- Optimization --------------------------------------------------------------------------------
class Optimizer:
    """Adam with a global-norm clip, as two verbs: `backward(loss)`, `step() -> grad_norm`."""

    def __init__(self, parameters, lr, eps, clip, float16=False):
        self.parameters, self.eps, self.clip = list(parameters), eps, clip
        device = self.parameters[0].device.type
        self.adam = torch.optim.Adam(self.parameters, lr, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=float16)

    def backward(self, loss, retain_graph=False):
        """Sets the gradients of its own parameters only."""
        self.adam.zero_grad()
        self.scaler.scale(loss).backward(inputs=self.parameters, retain_graph=retain_graph)

    def step(self):
        """Clips the gradients, steps, and returns their norm before the clip."""
        self.scaler.unscale_(self.adam)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        # Such a step is skipped. Only float16 waits here for a GPU: eps is a number of the CPU.
        overflowed = self.scaler.is_enabled() and not norm.isfinite()
        for group in self.adam.param_groups:  # Keras adds eps before the bias correction
            group["steps"] = group.get("steps", 0) + (not overflowed)
            steps = max(group["steps"], 1)
            group["eps"] = self.eps / math.sqrt(1 - group["betas"][1] ** steps)
        self.scaler.step(self.adam)
        self.scaler.update()
        if overflowed and self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise UserError(
                "float16: gradients overflow whatever the loss scale, so nothing is learned any"
                " more: use optimization.autocast=bfloat16 or false; the same command otherwise"
                " goes on from the last checkpoint"
            )
        return norm

    def state_dict(self):
        """All that the next step depends on, but for the parameters."""
        return {"adam": self.adam.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        if state["scaler"] and self.scaler.is_enabled():  # else the precision is another one now
            self.scaler.load_state_dict(state["scaler"])


def make_optimizers(hp, agent, precision=torch.float32):
    """One optimizer for each of theta, phi and psi; float16 brings loss scaling.

    Args:
        hp: the configuration's section `optimization`.
    """
    rest = hp.adam_eps, hp.grad_clip, precision == torch.float16
    return {
        "world_model": Optimizer(agent.world_model.parameters(), hp.world_model_lr, *rest),
        "actor": Optimizer(agent.actor.parameters(), hp.actor_lr, *rest),
        "value": Optimizer(agent.value.parameters(), hp.value_lr, *rest),
    }


SHUTDOWN_SECONDS = 5.0  # for workers to end by themselves; then they are killed
# For a step or a reset of all workers: one that was stopped or hangs ends the run in a sentence,
# not after TorchRL's 10 000 s. A reset may repeat an episode from pixels, so it is minutes.
ANSWER_SECONDS = 300.0


# --- Device, environment, policy, collector ------------------------------------------------------
def make_device(cfg):
    """The device and the precision of the networks, with the process tuned for them."""
    device = resolve_device(cfg.device)
    check_memory(cfg, device)
    tune_process(device)
    return device, resolve_precision(cfg.optimization.autocast, device)


def set_seeds(seed):
    """Seeds every generator that a part may draw from while it is built."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def make_env(cfg, saved=None):
    """`cfg.env.n_parallel_envs` environments, each in its own process if there are several.

    The agent's memory travels with them, 0 after a reset: `state` [S], `belief` [D] and the
    executed action [A].

    Args:
        saved: the state of a `ResumableCollector`, whose unfinished episodes go on.
    """
    seeds, memory = resumed_episodes(cfg.seed, cfg.env.n_parallel_envs, saved)
    return build_env(cfg, seeds, memory)


def build_env(cfg, seeds, memory=None):
    """An environment for each of `seeds`, with the agent's memory."""
    quiet_libraries()
    prepare_gl(cfg.env.from_pixels)
    if len(seeds) == 1:
        env = make_task(cfg.env, seeds[0])
    else:
        workers = [WorkerTask(cfg.env, each) for each in seeds]
        # TorchRL has no argument for it. Workers keep theirs: updates in between may take hours.
        torchrl._utils.BATCHED_PIPE_TIMEOUT = ANSWER_SECONDS
        # By itself it would take threads away from training.
        threads = torch.get_num_threads()
        env = envs.ParallelEnv(
            len(workers),
            workers,
            num_threads=threads,
            use_buffers=False,  # with them it spins while it waits, and takes a core from a copy
            shutdown_timeout=SHUTDOWN_SECONDS,
        )
        with children_without_signals():
            env.start()
        env = envs.TransformedEnv(env)
    sizes = {
        "state": cfg.networks.state_dim,
        "belief": cfg.networks.belief_dim,
        "previous_action": env.action_spec.shape[-1],
    }
    primer = {name: Unbounded(size) for name, size in sizes.items()}
    env.append_transform(envs.TensorDictPrimer(primer, expand_specs=True))
    return env.append_transform(ResumedMemory(memory))


def env_sizes(env):
    """The shape of an observation, and the number of actions."""
    return env.observation_spec["observation"].shape[env.ndim :], env.action_spec.shape[-1]


def close_env(env):
    """Ends an environment and its processes, if it is still open."""
    if not env.is_closed:
        workers = workers_of(env)
        # If a worker died, TorchRL complains again, and sends the others only what they ignore.
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            env.close()
        for worker in workers:
            if not worker._closed and worker.is_alive():
                worker.kill()
                worker.join()


class Policy(TensorDictModuleBase):
    """A TorchRL policy from a function of the paper; the memory travels with the environment.

    Noise is drawn on the CPU, so that a GPU gets one tensor for each step, and gives one back.

    Args:
        policy_fn: (agent, observation, previous action, state, belief, noise, **settings) ->
            (action, state, belief), all [n, ...].
        samples: (K,) if the function chooses from K actions.

    Attributes:
        random_steps: so many agent steps act at random, before the agent does.
    """

    in_keys = ["observation", "previous_action", "state", "belief"]
    out_keys = ["action", ("next", "previous_action"), ("next", "state"), ("next", "belief")]

    def __init__(self, agent, policy_fn, samples=(), **settings):
        super().__init__()
        self.agent, self.policy_fn, self.settings = agent, policy_fn, settings
        self.samples, self.random_steps = samples, 0

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # a single step is not worth another compilation
    def forward(self, tensordict):
        """One step of all environments."""
        lead = tensordict.batch_size
        n = lead.numel()
        inputs = {key: tensordict[key] for key in self.in_keys}
        inputs = inputs if lead else {key: value[None] for key, value in inputs.items()}
        action, *memory = self.ask_agent(inputs, self.draw_noise(n))
        if self.random_steps > 0:
            action = torch.rand_like(action) * 2 - 1
            self.random_steps -= n
        for key, value in zip(self.out_keys, (action, action, *memory), strict=True):
            tensordict.set(key, value.reshape(*lead, -1))
        return tensordict

    def draw_noise(self, n):
        """The standard normal noise of one step of n environments, on the CPU."""
        size = self.agent.world_model.sizes
        shapes = {
            "prior": (n, size["state"]),
            "posterior": (n, size["state"]),
            "action": (*self.samples, n, size["action"]),
            "exploration": (n, size["action"]),
        }
        return {name: torch.randn(shape) for name, shape in shapes.items()}

    def ask_agent(self, inputs, noise):
        """action, state, belief [n, ...] on the CPU, of inputs and noise there."""
        there = move_together(inputs | noise, self.agent.world_model.device)
        noise = {name: there.pop(name) for name in noise}
        return bring_together(self.policy_fn(self.agent, *there.values(), noise, **self.settings))

    def state_dict(self):
        """What the policy counts; the agent is saved on its own."""
        return {"random_steps": self.random_steps}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        self.random_steps = state["random_steps"]


def make_collector(cfg, env, policy):
    """Phases of T environment steps, with the seed episodes still to come."""
    repeat, n_envs = cfg.env.action_repeat, cfg.env.n_parallel_envs
    phase = math.ceil(cfg.collector.train_every / (n_envs * repeat)) * n_envs
    collector = Collector(
        env,
        policy,
        frames_per_batch=phase,
        total_frames=-1,
        trust_policy=True,
        auto_register_policy_transforms=False,
    )
    policy.random_steps = cfg.collector.random_steps // repeat  # now: the collector tried it
    return ResumableCollector(collector, n_envs, cfg.env.from_pixels)


# --- Replay, evaluation, logger, run -------------------------------------------------------------
def make_replay(cfg, env, run, device):
    """The dataset D in the directory of the run; it grows if the run was prolonged."""
    rows, layout = replay_layout(cfg, *env_sizes(env))
    saved = run.saved.get("replay")
    if saved:
        overwritten = saved["episodes"] > len(saved["table"])  # such a ring cannot grow
        rows = saved["rows"] if overwritten else max(rows, saved["rows"])
    place = place_rows(run.path, cfg.replay_buffer.directory)
    return Replay(
        cfg.replay_buffer,
        rows,
        layout,
        place,
        cfg.env.action_repeat,
        device,
        cfg.seed,
        cfg.optimization.predict_discount,
    )


def make_evaluation(cfg, agent, policy_fn, diagnostics):
    """Evaluation in an environment of its own, with the densest of 100 actions."""
    cfg = cfg.as_evaluated()
    seeds = EpisodeSeeds(cfg.seed, EVALUATION)
    env = build_env(cfg, [seeds])
    policy = Policy(agent, policy_fn, samples=(100,))
    return Evaluation(cfg, agent, policy, env, seeds, diagnostics)


def evaluate_checkpoint(cfg, make_agent, make_evaluation):
    """Evaluates the agent of `eval.checkpoint`, with the configuration that it brings."""
    path, metadata, states = find_checkpoint(cfg.eval.checkpoint)
    cfg = take_over_config(cfg, metadata["config"])
    device = resolve_device(cfg.device)
    check_memory(cfg, device)
    tune_process(device)
    env = build_env(cfg, [EpisodeSeeds(cfg.seed, EVALUATION)])
    sizes = env_sizes(env)
    env.close()
    agent = make_agent(cfg, *sizes).to(device)
    load_weights(agent, states.get("agent"), path)
    evaluation = make_evaluation(cfg, agent)
    try:
        write_evaluation(cfg, evaluation, path, metadata["step"])
    finally:
        evaluation.close()


def make_logger(cfg, run, device, metadata):
    """Rows of metrics in the directory of the run, the dashboard, the progress bar."""
    return Logger(cfg, run.path, device, metadata, run.step, run.updates, run.saved.get("logger"))


def make_run(cfg):
    """The directory of the run, checked; what is not as tested is said."""
    try:
        check_versions()
    except UserError as error:
        print(f"not the tested versions: {error}")
    check_wandb(cfg)
    return Run(cfg)
