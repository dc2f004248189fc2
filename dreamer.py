# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "torchrl==0.14.1", "tensordict==0.14.3", "dm_control==1.0.50", "mujoco==3.17.0",
#   "gymnasium==1.4.0", "hydra-core==1.3.8", "wandb==0.31.0", "moviepy==2.2.1", "tqdm==4.70.1",
# ]
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""Dreamer V1 (Hafner et al., Dream to Control: Learning Behaviors by Latent Imagination, 2020), in one page.

The file follows the paper: Eqs. (1) to (10) as small functions, then Algorithm 1. What the paper puts in its
appendix (environments, networks, replay, precision, logging) is in `dreamer_utils.py`.

Shapes. B sequences, L steps, N = B * L start states, H imagination horizon, A action size, S latent state size,
D belief size. Batch first, time second, always. A model state is the pair (state, belief): the stochastic s_t of the
paper and the deterministic recurrent part that summarises the past.

The one time grid. A replay row holds what an agent knows on arrival: the action that led here, the observation and the
reward that came with it. The row of a reset holds action 0 and reward 0.

    replay row      (0, o_0, 0)   (a_0, o_1, r_1)   (a_1, o_2, r_2)   ...      slices of L rows, never across episodes
    model state         s_0 ---------> s_1 -----------> s_2           ...      s_t ~ p(s_t | s_{t-1}, a_{t-1}, o_t)

    the dream         s_0  --a_0-->  s_1  --a_1-->  s_2  ...  s_{H-1}  --a_{H-1}-->  s_H      s_0 is any s_t from above
    reward, value                  r_1, v_1       r_2, v_2  ... r_{H-1}, v_{H-1}   v_H        v_1 counts r_1
    value target                   V_1            V_2       ... V_{H-1}            -          V_{H-1} = r_{H-1} + c v_H
"""

import functools
import math

import hydra
import torch
from torch.distributions import Independent, Normal, kl_divergence

import dreamer_utils as utils

# --------------------------------------------------------------------------------------------------------------------
# Latent dynamics: Eqs. (1), (9) and (10)


def observe(world_model, embedding, action, noise):
    """Eqs. (1), (9): filters s_t ~ p(s_t | s_{t-1}, a_{t-1}, o_t) along a sequence, from the zero state.

    Args:
        world_model: holds `prior` (transition model) and `posterior` (representation model).
        embedding: [B, L, E] encoded observations o_t.
        action: [B, L, A]; row t is the action that led to o_t.
        noise: `prior` and `posterior`, standard normal [B, L, S] each.
    Returns:
        prior, posterior: two dicts of `mean`, `std`, `state` [B, L, S] and `belief` [B, L, D].
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
    """Turns a list over time of (mean, std, state, belief) into a dict of tensors with time as second dimension."""
    return {
        name: torch.stack(part, 1)
        for name, part in zip(("mean", "std", "state", "belief"), zip(*steps))
    }


def log_normal(target, mean, event_dims=0):
    """ln N(target; mean, 1), summed over the last `event_dims` dimensions: minus half the squared error and a constant."""
    log_prob = -0.5 * (target - mean).square() - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(-event_dims).sum(-1) if event_dims else log_prob


def latent_kl(prior, posterior):
    """Eq. (10), J_D: KL(posterior || prior) in nats, summed over the latent dimensions: [B, L]."""
    gaussians = (
        Independent(Normal(x["mean"], x["std"], validate_args=False), 1)
        for x in (posterior, prior)
    )
    return kl_divergence(*gaussians)


def model_loss(observation_log_prob, reward_log_prob, kl, kl_scale, free_nats):
    """Eq. (10): minus (J_O + J_R + J_D). All inputs [B, L], in nats.

    The KL is averaged first and clipped at `free_nats` second, so a batch is regularised as long as its average is above
    (App. A). free_nats=0 leaves the plain KL; below the floor the KL gives no gradient at all.
    """
    return (
        kl_scale * kl.mean().clamp(min=free_nats)
        - observation_log_prob.mean()
        - reward_log_prob.mean()
    )


def discount_log_prob(logits, target):
    """ln Bernoulli(target; logits) for soft targets in [0, 1], any shape (App. A; only for tasks that terminate)."""
    return -torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")


# --------------------------------------------------------------------------------------------------------------------
# Behaviour: Eqs. (2) to (8)


def act(mean, std, noise):
    """Eq. (3): a = tanh(mean + std * noise), a reparameterised sample of the action model; every shape [..., A]."""
    return torch.tanh(mean + std * noise)


def action_log_prob(mean, std, noise):
    """ln of the density of `act(mean, std, noise)`, from the value before the tanh, so that saturation is harmless."""
    raw = mean + std * noise
    log_det = 2 * (math.log(2) - raw - torch.nn.functional.softplus(-2 * raw))
    return (Normal(mean, std, validate_args=False).log_prob(raw) - log_det).sum(-1)


def imagine(world_model, actor, state, belief, noise):
    """Eqs. (1), (2): dreams H steps from N states with the transition model and the action model alone.

    The action model sees the state through a stop-gradient: values reach it through actions and dynamics only.

    Args:
        state, belief: [N, S], [N, D]; where each dream starts.
        noise: `action` [N, H, A] and `state` [N, H, S], standard normal.
    Returns:
        state [N, H, S] and belief [N, H, D] of s_1 .. s_H (the start is excluded); action mean and std [N, H, A].
    """
    states, beliefs, means, stds = [], [], [], []
    for t in range(noise["action"].shape[1]):
        mean, std = actor(state.detach(), belief.detach())
        _, _, state, belief = world_model.prior(
            state, belief, act(mean, std, noise["action"][:, t]), noise["state"][:, t]
        )
        for steps, value in zip((states, beliefs, means, stds), (state, belief, mean, std)):
            steps.append(value)
    return tuple(torch.stack(steps, 1) for steps in (states, beliefs, means, stds))


def lambda_return(reward, value, discount, lambda_):
    """Eq. (6): V_lambda(s_t) = r_t + c_t ((1 - lambda) v_{t+1} + lambda V_lambda(s_{t+1})), from V_lambda(s_H) = v_H.

    Eqs. (4) and (5) are its limits: lambda=1 sums all rewards and one last value, lambda=0 is r_t + c_t v_{t+1}.

    Args:
        reward, value, discount: [N, H] for s_1 .. s_H; `discount` is gamma, or the predicted c_t.
    Returns:
        [N, H-1] for s_1 .. s_{H-1}.
    """
    target, targets = value[:, -1], []
    for t in reversed(range(reward.shape[1] - 1)):
        target = reward[:, t] + discount[:, t] * (
            (1 - lambda_) * value[:, t + 1] + lambda_ * target
        )
        targets.append(target)
    return torch.stack(targets[::-1], 1)


def discount_weight(discount):
    """How likely the dream is still going on: the product of c_1 .. c_{t-1}, [N, H] -> [N, H-1], a constant."""
    return torch.cat([torch.ones_like(discount[:, :1]), discount[:, :-2]], 1).cumprod(1).detach()


def actor_loss(target, weight):
    """Eq. (7): minus the mean value target over all dreamed states; `target` carries the gradient, both [N, H-1]."""
    return -(weight * target).mean()


def value_loss(value, target, weight):
    """Eq. (8): minus the mean log-likelihood ln N(target; value, 1), half the squared error up to a constant; [N, H-1]."""
    return -(weight * log_normal(target.detach(), value)).mean()


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1, one update: two learning blocks, then three optimizer steps


def dynamics_learning(world_model, batch, noise, hp):
    """Algorithm 1, dynamics learning: the loss of theta and the model states of the batch.

    Args:
        batch: `observation` [B, L, ...], `action` [B, L, A], `reward` [B, L], `terminated` [B, L] (1 on a true end).
    """
    target = world_model.preprocess(batch["observation"])
    prior, posterior = observe(world_model, world_model.encoder(target), batch["action"], noise)
    features = posterior["state"], posterior["belief"]
    observation_log_prob = log_normal(target, world_model.decoder(*features), target.dim() - 2)
    reward_log_prob = log_normal(batch["reward"], world_model.reward(*features).squeeze(-1))
    kl = latent_kl(prior, posterior)
    loss = model_loss(observation_log_prob, reward_log_prob, kl, hp.kl_scale, hp.free_nats)
    metrics = {
        "world_model/loss": loss,
        "world_model/kl": kl.mean(),
        "world_model/observation_loss": -observation_log_prob.mean(),
        "world_model/reward_loss": -reward_log_prob.mean(),
        "world_model/prior_entropy": Normal(prior["mean"], prior["std"]).entropy().sum(-1).mean(),
        "world_model/posterior_entropy": Normal(posterior["mean"], posterior["std"])
        .entropy()
        .sum(-1)
        .mean(),
    }
    if world_model.discount is not None:
        target = hp.gamma * (1 - batch["terminated"].to(kl.dtype))
        log_prob = discount_log_prob(world_model.discount(*features).squeeze(-1), target).mean()
        loss = loss - hp.discount_scale * log_prob
        metrics |= {"world_model/loss": loss, "world_model/discount_loss": -log_prob}
    return loss, posterior, metrics


def behavior_learning(world_model, actor, value, posterior, noise, hp):
    """Algorithm 1, behaviour learning: the losses of phi and psi, from dreams that start in every posterior state."""
    last = (
        -1 if world_model.discount is not None else None
    )  # a last row may be a true end: nothing to dream from there
    start = (posterior[name][:, :last].detach().flatten(0, 1) for name in ("state", "belief"))
    state, belief, mean, std = imagine(world_model, actor, *start, noise)
    rewards, values = (
        world_model.reward(state, belief).squeeze(-1),
        value(state, belief).squeeze(-1),
    )
    discount = torch.full_like(rewards, hp.gamma)
    if world_model.discount is not None:
        discount = world_model.discount(state, belief).squeeze(-1).sigmoid()
    target, weight = (
        lambda_return(rewards, values, discount, hp.lambda_),
        discount_weight(discount),
    )
    losses = actor_loss(target, weight), value_loss(values[:, :-1], target, weight)
    metrics = {
        "behavior/actor_loss": losses[0],
        "behavior/value_loss": losses[1],
        "behavior/imagined_reward": rewards.mean(),
        "behavior/imagined_value": values.mean(),
        "behavior/value_target": target.mean(),
        "behavior/action_entropy": -action_log_prob(mean, std, noise["action"]).mean(),
    }
    return *losses, metrics


def compute_losses(agent, batch, noise, hp):
    """All three losses of Algorithm 1 at the same parameters: dict of scalars `world_model`, `actor`, `value`; metrics."""
    model, posterior, model_metrics = dynamics_learning(agent.world_model, batch, noise, hp)
    actor, value, metrics = behavior_learning(
        agent.world_model, agent.actor, agent.value, posterior, noise, hp
    )
    return {"world_model": model, "actor": actor, "value": value}, model_metrics | metrics


def update(losses_of, agent, optimizers, batch, noise, hp):
    """Algorithm 1, one of the C update steps: theta, phi and psi each follow the gradient of their own loss.

    `losses_of` is `compute_losses`, or the same function made fast. All gradients are taken before any of the steps.
    """
    losses, metrics = losses_of(agent, batch, noise, hp)
    optimizers["value"].differentiate(
        losses["value"], shared=True
    )  # the dream's values serve both losses
    optimizers["actor"].differentiate(losses["actor"])
    optimizers["world_model"].differentiate(losses["world_model"])
    for part, section in (
        ("world_model", "world_model"),
        ("actor", "behavior"),
        ("value", "behavior"),
    ):
        metrics[f"{section}/{part}_grad_norm"] = optimizers[part].step()
    return {name: metric.detach() for name, metric in metrics.items()}


def draw_noise(B, L, hp, world_model):
    """All noise of one update, standard normal: for the model states of the batch, and for the dreams' actions and states."""
    S, A = world_model.sizes["state"], world_model.sizes["action"]
    N = B * (L if world_model.discount is None else L - 1)
    shapes = {
        "prior": (B, L, S),
        "posterior": (B, L, S),
        "action": (N, hp.horizon, A),
        "state": (N, hp.horizon, S),
    }
    like = world_model.prior.rnn.weight_ih
    return {
        name: torch.randn(shape, dtype=like.dtype, device=like.device)
        for name, shape in shapes.items()
    }


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1, environment interaction


def filter_state(world_model, observation, action, state, belief, noise):
    """Eq. (1): one step of `observe` while acting: s_t from s_{t-1}, the executed a_{t-1} and o_t; [n, ...] each."""
    _, _, _, belief = world_model.prior(state, belief, action, noise["prior"])
    embedding = world_model.encoder(world_model.preprocess(observation))
    _, _, state = world_model.posterior(belief, embedding, noise["posterior"])
    return state, belief


def explore(action, noise, scale):
    """Adds N(0, scale) to an action and clips it to [-1, 1] (App. A); shapes [n, A]."""
    return (action + scale * noise).clamp(-1, 1)


def most_likely_action(mean, std, noise):
    """The best by density of K samples, each row its own (the official evaluation action): noise [K, n, A] -> [n, A]."""
    best = action_log_prob(mean, std, noise).argmax(0)
    return act(mean, std, noise)[best, torch.arange(len(best), device=best.device)]


def collection_policy(agent, observation, action, state, belief, noise, scale):
    """Algorithm 1, environment interaction: s_t from history, a_t from the action model, exploration noise on top."""
    state, belief = filter_state(agent.world_model, observation, action, state, belief, noise)
    mean, std = agent.actor(state, belief)
    return explore(act(mean, std, noise["action"]), noise["exploration"], scale), state, belief


def evaluation_policy(agent, observation, action, state, belief, noise):
    """The same with the most likely action and without exploration noise."""
    state, belief = filter_state(agent.world_model, observation, action, state, belief, noise)
    return most_likely_action(*agent.actor(state, belief), noise["action"]), state, belief


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def updates_due(step, collector, hp):
    """How many updates belong to `step` environment steps: none before the S seed episodes are there, then C every T."""
    if step < collector.random_steps:
        return 0
    return hp.pretrain + int((step - collector.random_steps) * hp.train_ratio)


def train(cfg):
    """Algorithm 1."""
    explore_by = functools.partial(collection_policy, scale=cfg.collector.exploration_noise)
    run = utils.Run(cfg, explore_by, evaluation_policy)
    hp, agent, replay, logger = cfg.optimization, run.agent, run.replay, run.logger
    losses_of = utils.accelerate(compute_losses, run.device, run.autocast)
    step = updates = 0

    for transitions in logger.timed("collect", run.collector):
        # Environment interaction (random actions for the S seed episodes)
        episodes = replay.extend(transitions)
        before, step = step, step + transitions.numel() * cfg.env.action_repeat

        # C update steps
        with logger.clock("update"):
            while updates < updates_due(step, cfg.collector, hp):
                batch = replay.sample()
                noise = draw_noise(*batch.shape, hp, agent.world_model)
                logger.add(update(losses_of, agent, run.optimizers, batch, noise, hp))
                updates += 1

        # Nothing below this line changes what is learned.
        logger.report(step, before, updates, episodes, run.evaluation)
        if step >= cfg.collector.total_steps:
            break
    run.close()


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    """Runs Algorithm 1 with the configuration of the command line; a user's mistake ends in one sentence."""
    try:
        train(utils.load_config(cfg))
    except utils.UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
