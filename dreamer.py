"""Dreamer V1 (Hafner et al., Dream to Control: Learning Behaviors by Latent Imagination, 2020).

The file follows the paper: Eqs. (1) to (10) as small functions, then Algorithm 1, whose `train`
builds every part in sight. The builders are in dreamer_utils.py, the chores in common/.

Shapes. B sequences of L steps, N = B * L start states, horizon H, action size A, latent state size
S, belief size D. Batch first, time second, always. A model state is a pair: the stochastic `state`
and the deterministic recurrent `belief`, together the s_t of the paper.

Time. A replay row holds what is known on arrival: the action that led here, the observation and
the reward that came with it. The row of a reset holds action 0 and reward 0.

    replay row    (0, o_0, 0)  (a_0, o_1, r_1)  (a_1, o_2, r_2) ...   L rows of one episode
    model state       s_0 --------> s_1 ----------> s_2 ...           every s_t starts a dream:

    dream         s_0 --a_0--> s_1 --a_1--> s_2 ... s_{H-1} --a_{H-1}--> s_H
    reward, value             r_1 v_1      r_2 v_2  r_{H-1} v_{H-1}      v_H      v_1 counts r_1
    target                     V_1          V_2     V_{H-1}                       last: r + c v_H
"""

import contextlib
import math

from common.signals import end_at_once_on_ctrl_c

if __name__ in ("__main__", "__mp_main__"):  # the latter in worker processes
    end_at_once_on_ctrl_c()  # also while the libraries below are imported, which takes seconds

import hydra
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, softplus

import dreamer_utils as utils


# --- Latent dynamics: Eqs. (1), (9), (10) --------------------------------------------------------
def observe(world_model, embedding, action, noise):
    """Eqs. (1), (9).

    Filters s_t ~ p(s_t | s_{t-1}, a_{t-1}, o_t) from the zero state.

    Args:
        world_model: its `prior` is the transition model, its `posterior` the representation model.
        embedding: [B, L, E], encoded observations o_t.
        action: [B, L, A]; row t is the action that led to o_t.
        noise: `prior` and `posterior`, standard normal [B, L, S].
    Returns:
        prior and posterior, each a dict of `mean`, `std`, `state` [B, L, S], `belief` [B, L, D].
    """
    state, belief = world_model.initial(len(action))
    prior, posterior = [], []
    for t in range(action.shape[1]):
        mean, std, guess, belief = world_model.prior(
            state, belief, action[:, t], noise["prior"][:, t]
        )
        prior.append((mean, std, guess, belief))
        mean, std, state = world_model.posterior(belief, embedding[:, t], noise["posterior"][:, t])
        posterior.append((mean, std, state, belief))
    return stack_time(prior), stack_time(posterior)


def stack_time(steps):
    """A list over time of (mean, std, state, belief) -> a dict of tensors with time second."""
    names = "mean", "std", "state", "belief"
    return {
        name: torch.stack(values, 1)
        for name, values in zip(names, zip(*steps, strict=True), strict=True)
    }


def log_normal(target, mean, event_dims=0):
    """ln N(target; mean, 1), summed over the last `event_dims` dimensions; any shape."""
    error = mse_loss(mean, target, reduction="none")  # one pass over the images, and one back
    size = math.prod(error.shape[error.dim() - event_dims :])
    if event_dims:
        error = error.sum(tuple(range(-event_dims, 0)))
    return -0.5 * (error + size * math.log(2 * math.pi))


def normal_entropy(std):
    """Entropy of a Gaussian with independent dimensions, in nats: [..., S] -> [...]."""
    return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def latent_kl(prior, posterior):
    """Eq. (10), J_D: KL(posterior || prior) in nats, summed over the state: [B, L]."""
    p = Normal(posterior["mean"], posterior["std"], validate_args=False)
    q = Normal(prior["mean"], prior["std"], validate_args=False)
    return kl_divergence(Independent(p, 1), Independent(q, 1))


def model_loss(observation_log_prob, reward_log_prob, kl, kl_scale, free_nats):
    """Eq. (10): minus (J_O + J_R + J_D), in nats; all inputs [B, L].

    First the mean of the KL, then the clip at `free_nats`: a batch whose mean is below gets no
    gradient from the KL (App. A). free_nats=0 is the plain KL.
    """
    regularizer = kl_scale * kl.mean().clamp(min=free_nats)
    return regularizer - observation_log_prob.mean() - reward_log_prob.mean()


def discount_log_prob(logits, target):
    """ln Bernoulli(target; logits) for soft targets in [0, 1]; any shape (App. A)."""
    return -binary_cross_entropy_with_logits(logits, target, reduction="none")


# --- Behavior: Eqs. (2) to (8) -------------------------------------------------------------------
def sample_action(mean, std, noise):
    """Eq. (3): a = tanh(mean + std * noise), reparameterized; every shape [..., A]."""
    return torch.tanh(mean + std * noise)


def action_log_prob(mean, std, noise):
    """ln of the density of `sample_action(mean, std, noise)`: [..., A] -> [...].

    Computed from the value before the tanh: inverting a saturated tanh would lose it.
    """
    raw = mean + std * noise
    log_slope = 2 * (math.log(2) - raw - softplus(-2 * raw))
    return (Normal(mean, std, validate_args=False).log_prob(raw) - log_slope).sum(-1)


def imagine(world_model, choose_action, state, belief, noise):
    """Eqs. (1), (2).

    Dreams H steps with the transition model alone.

    Args:
        choose_action: (t, state, belief) -> (a_t [N, A], anything else worth keeping of step t).
        state, belief: [N, S], [N, D], where the dreams start.
        noise: [N, H, S], standard normal.
    Returns:
        state [N, H, S], belief [N, H, D] of s_1 .. s_H; what else was kept of the steps 0 .. H-1.
    """
    steps = []
    for t in range(noise.shape[1]):
        action, *kept = choose_action(t, state, belief)
        _, _, state, belief = world_model.prior(state, belief, action, noise[:, t])
        steps.append((state, belief, *kept))
    return tuple(torch.stack(values, 1) for values in zip(*steps, strict=True))


def action_model_samples(actor, noise):
    """Eq. (3), as `imagine` wants it; noise [N, H, A] -> (action, mean, std) of step t.

    The action model sees a constant: its gradient flows through actions and dynamics only.
    """

    def choose_action(t, state, belief):
        mean, std = actor(state.detach(), belief.detach())
        return sample_action(mean, std, noise[:, t]), mean, std

    return choose_action


def lambda_return(reward, value, discount, lambda_):
    """Eq. (6).

    V_t = r_t + c_t ((1 - lambda) v_{t+1} + lambda V_{t+1}), where V_H = v_H. Eq. (5) is its limit
    lambda=0, r_t + c_t v_{t+1}; Eq. (4) is lambda=1, the sum of all rewards and v_H.

    Args:
        reward, value, discount: [N, H] at s_1 .. s_H; `discount` c_t is gamma, or predicted.
    Returns:
        [N, H-1], the targets V_1 .. V_{H-1}.
    """
    target, targets = value[:, -1], []
    for t in reversed(range(reward.shape[1] - 1)):
        bootstrap = (1 - lambda_) * value[:, t + 1] + lambda_ * target
        target = reward[:, t] + discount[:, t] * bootstrap
        targets.append(target)
    return torch.stack(targets[::-1], 1)


def discount_weight(discount):
    """The product c_1 .. c_{t-1}: how likely the dream still goes on at s_t, as a constant.

    [N, H] -> [N, H-1]; the first is 1.
    """
    start = torch.ones_like(discount[:, :1])
    return torch.cat([start, discount[:, :-2]], 1).cumprod(1).detach()


def actor_loss(target, weight):
    """Eq. (7): minus the mean value target, which carries the gradient; both [N, H-1]."""
    return -(weight * target).mean()


def value_loss(value, target, weight):
    """Eq. (8): minus the mean ln N(V_t; v_t, 1), half the squared error and a constant.

    The target is a constant; all [N, H-1].
    """
    return -(weight * log_normal(target.detach(), value)).mean()


# --- Algorithm 1, one update: two blocks of learning, then three steps ---------------------------
def dynamics_learning(world_model, batch, noise, hp):
    """Algorithm 1, dynamics learning: the loss of theta, the model states, metrics.

    Args:
        batch: `observation` [B, L, ...], `action` [B, L, A], `reward`, `terminated` [B, L].
    """
    observation = world_model.preprocess(batch["observation"])
    embedding = world_model.encoder(observation)
    prior, posterior = observe(world_model, embedding, batch["action"], noise)
    features = posterior["state"], posterior["belief"]
    reconstruction = world_model.decoder(*features)
    observation_log_prob = log_normal(observation, reconstruction, observation.dim() - 2)
    reward_log_prob = log_normal(batch["reward"], world_model.reward(*features).squeeze(-1))
    kl = latent_kl(prior, posterior)
    loss = model_loss(observation_log_prob, reward_log_prob, kl, hp.kl_scale, hp.free_nats)
    metrics = {
        "world_model/observation_loss": -observation_log_prob.mean(),
        "world_model/reward_loss": -reward_log_prob.mean(),
        "world_model/kl": kl.mean(),
        "world_model/kl_at_floor": (kl.mean() <= hp.free_nats).to(kl.dtype),
        "world_model/prior_entropy": normal_entropy(prior["std"]).mean(),
        "world_model/posterior_entropy": normal_entropy(posterior["std"]).mean(),
    }
    if world_model.discount is not None:
        target = hp.gamma * (1 - batch["terminated"].to(kl.dtype))
        logits = world_model.discount(*features).squeeze(-1)
        discount_loss = -discount_log_prob(logits, target).mean()
        loss = loss + hp.discount_scale * discount_loss
        metrics["world_model/discount_loss"] = discount_loss
    metrics["world_model/loss"] = loss
    return loss, posterior, metrics


def behavior_learning(agent, posterior, noise, hp):
    """Algorithm 1, behavior learning: the losses of phi and psi, and metrics.

    Dreams start at every posterior state [B, L, ...].
    """
    world_model = agent.world_model
    predicts_discount = world_model.discount is not None
    rows = slice(None, -1 if predicts_discount else None)  # no dream starts at a possible end
    start = [posterior[name][:, rows].detach().flatten(0, 1) for name in ("state", "belief")]
    choose_action = action_model_samples(agent.actor, noise["action"])
    state, belief, mean, std = imagine(world_model, choose_action, *start, noise["state"])
    reward = world_model.reward(state, belief).squeeze(-1)
    value = agent.value(state, belief).squeeze(-1)
    discount = torch.full_like(reward, hp.gamma)
    if predicts_discount:
        discount = world_model.discount(state, belief).squeeze(-1).sigmoid()
    target = lambda_return(reward, value, discount, hp.lambda_)
    weight = discount_weight(discount)
    phi_loss = actor_loss(target, weight)
    psi_loss = value_loss(value[:, :-1], target, weight)
    metrics = {
        "behavior/actor_loss": phi_loss,
        "behavior/value_loss": psi_loss,
        "behavior/imagined_reward": reward.mean(),
        "behavior/imagined_value": value.mean(),
        "behavior/value_target": target.mean(),
        "behavior/action_entropy": -action_log_prob(mean, std, noise["action"]).mean(),
    }
    return phi_loss, psi_loss, metrics


def update(agent, optimizers, batch, noise, hp, autocast):
    """Algorithm 1, one of the C update steps: theta, phi and psi follow their own losses.

    All gradients come before any step. That of theta comes before the dreams, so that the images
    need no memory any more. Networks compute in the precision of `autocast`; distributions,
    returns and losses stay in float32.
    """
    theta, phi, psi = (optimizers[name] for name in ("world_model", "actor", "value"))
    with autocast:
        theta_loss, posterior, metrics = dynamics_learning(agent.world_model, batch, noise, hp)
    theta.backward(theta_loss)
    with autocast, utils.freeze(agent):
        phi_loss, psi_loss, behavior_metrics = behavior_learning(agent, posterior, noise, hp)
    psi.backward(psi_loss, retain_graph=True)  # v_t is in both losses
    phi.backward(phi_loss)
    metrics |= behavior_metrics
    metrics["world_model/grad_norm"] = theta.step()
    metrics["behavior/actor_grad_norm"] = phi.step()
    metrics["behavior/value_grad_norm"] = psi.step()
    return {name: metric.detach() for name, metric in metrics.items()}


def draw_noise(B, L, hp, world_model):
    """The standard normal noise of one update: of `observe`, then of `imagine`."""
    S, A = world_model.sizes["state"], world_model.sizes["action"]
    N = B * (L if world_model.discount is None else L - 1)
    shapes = {
        "prior": (B, L, S),
        "posterior": (B, L, S),
        "action": (N, hp.horizon, A),
        "state": (N, hp.horizon, S),
    }
    kind = {"dtype": world_model.dtype, "device": world_model.device}
    return {name: torch.randn(shape, **kind) for name, shape in shapes.items()}


# --- Algorithm 1, environment interaction: n environments, all shapes [n, ...] -------------------
def filter_state(world_model, observation, action, state, belief, noise):
    """Eq. (1): one step of `observe`, with the action that was executed last."""
    _, _, _, belief = world_model.prior(state, belief, action, noise["prior"])
    embedding = world_model.encoder(world_model.preprocess(observation))
    _, _, state = world_model.posterior(belief, embedding, noise["posterior"])
    return state, belief


def add_exploration_noise(action, noise, scale):
    """Adds N(0, scale) to an action and clips it to [-1, 1] (App. A)."""
    return (action + scale * noise).clamp(-1, 1)


def mode_action(mean, std, noise):
    """The densest of K samples, row by row; noise [K, n, A] -> [n, A].

    As officially, the density is taken at a float32 inverse of the tanh, clipped just below 1:
    the exact one has no bound where the tanh saturates.
    """
    action = sample_action(mean, std, noise)
    raw = action.float().clamp(-0.99999997, 0.99999997).atanh().to(action.dtype)
    best = action_log_prob(mean, std, (raw - mean) / std).argmax(0)
    return action[best, torch.arange(len(best), device=best.device)]


def collection_policy(agent, observation, action, state, belief, noise, scale):
    """s_t from the history, a_t from the action model, exploration noise on top."""
    state, belief = filter_state(agent.world_model, observation, action, state, belief, noise)
    action = sample_action(*agent.actor(state, belief), noise["action"])
    return add_exploration_noise(action, noise["exploration"], scale), state, belief


def evaluation_policy(agent, observation, action, state, belief, noise):
    """The same with the most likely action and no exploration noise."""
    state, belief = filter_state(agent.world_model, observation, action, state, belief, noise)
    return mode_action(*agent.actor(state, belief), noise["action"]), state, belief


# --- Algorithm 1 ---------------------------------------------------------------------------------
def make_agent(cfg, observation_shape, action_dim):
    """theta (the world model), phi (the action model) and psi (the value model)."""
    net = cfg.networks
    world_model = utils.WorldModel(
        encoder=utils.make_encoder(net, observation_shape),
        decoder=utils.make_decoder(net, observation_shape),
        prior=utils.make_prior(net, action_dim),
        posterior=utils.make_posterior(net, observation_shape),
        reward=utils.make_reward(net),
        discount=utils.make_discount(net) if cfg.optimization.predict_discount else None,
    )
    return utils.Agent(world_model, utils.make_actor(net, action_dim), utils.make_value(net))


def make_evaluation(cfg, agent):
    """Episodes of the evaluation policy, and what model and value model say about them."""
    diagnostics = utils.Diagnostics(observe, imagine, lambda_return, mode_action)
    return utils.make_evaluation(cfg, agent, evaluation_policy, diagnostics)


def updates_due(step, collector, hp):
    """Updates that belong to `step` environment steps.

    None before the seed episodes are there, `pretrain` with them, and `train_ratio` for each step
    that follows.
    """
    if step < collector.random_steps:
        return 0
    return hp.pretrain + int(round((step - collector.random_steps) * hp.train_ratio, 6))


def train(cfg):
    """Algorithm 1; returns the trained agent. A run that `cfg.run_dir` holds goes on."""
    hp = cfg.optimization
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(utils.make_run(cfg))
        device, precision = utils.make_device(cfg)
        autocast = utils.make_autocast(device, precision)
        utils.set_seeds(cfg.seed)

        # Initialize theta, phi and psi.
        env = utils.make_env(cfg, run.saved.get("collector"))
        stack.callback(utils.close_env, env)
        agent = make_agent(cfg, *utils.env_sizes(env)).to(device)
        optimizers = utils.make_optimizers(hp, agent, precision)

        # Initialize the dataset D and what fills it. All that can be wrong was seen by now.
        run.directory.claim()
        replay = utils.make_replay(cfg, env, run, device)
        stack.callback(replay.close)
        policy = utils.Policy(agent, collection_policy, scale=cfg.collector.exploration_noise)
        utils.compile_steps(agent, hp.compile, device)
        collector = utils.make_collector(cfg, env, policy)
        stack.callback(collector.close)

        # What watches.
        evaluation = make_evaluation(cfg, agent)
        stack.callback(evaluation.close)
        metadata = utils.run_metadata(cfg, device, precision)
        logger = stack.enter_context(utils.make_logger(cfg, run, device, metadata))
        parts = {"policy": policy, "replay": replay, "collector": collector, "logger": logger}
        run.start(metadata, agent=agent, **optimizers, **parts)

        while True:
            # Dynamics learning and behavior learning, C update steps. They come first, because a
            # run that was stopped between two of them makes up for the rest before it acts.
            with logger.clock("update"):
                due = updates_due(run.step, cfg.collector, hp)
                for batch in replay.batches(due - run.updates):
                    noise = draw_noise(*batch.shape, hp, agent.world_model)
                    metrics = update(agent, optimizers, batch, noise, hp, autocast)
                    logger.add_update(metrics)
                    run.count_update(batch, metrics)
                    if run.stop_signal:
                        break

            # Nothing from here to the interaction changes what is learned.
            if run.report_due:
                if run.evaluation_due:
                    with logger.clock("evaluate"):
                        result = evaluation(run.step, films=logger.films_due)
                    logger.add_evaluation(run.step, result)
                if run.row_due:
                    logger.write_row(run.step, run.updates)
                run.reported()
            run.check_weights(agent)
            run.save_if_due()
            if run.finished:
                return agent

            # Environment interaction; the S seed episodes take random actions.
            with logger.clock("collect"):
                transitions = collector.collect()
                logger.add_episodes(replay.extend(transitions))
            run.count_steps(transitions)
            logger.show_progress(run.step)


@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    """Trains with the configuration of the command line; a user's mistake ends in one sentence."""
    try:
        cfg = utils.load_config(cfg)
        if cfg.doctor:
            if not utils.Doctor(cfg, utils.make_env, train).examine():
                raise utils.end_of_job("error: the doctor found a problem")
        elif cfg.export:
            utils.export_agent(cfg)
        elif cfg.eval.checkpoint:
            utils.evaluate_checkpoint(cfg, make_agent, make_evaluation)
        else:
            train(cfg)
    except (utils.UserError, OSError) as error:
        raise utils.end_of_job(f"error: {utils.user_message(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    utils.register_configs()
    main()
