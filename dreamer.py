# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "torch==2.13.0", "torchrl==0.14.1", "tensordict==0.14.3", "dm_control==1.0.50",
#   "mujoco==3.17.0", "gymnasium==1.4.0", "hydra-core==1.3.8", "hydra-submitit-launcher==1.2.0",
#   "wandb==0.31.0", "moviepy==2.2.1", "matplotlib==3.11.2", "tqdm==4.70.1", "pytest==9.2.0",
#   "pytest-timeout==2.4.0", "hypothesis==6.170.15",
# ]
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""Dreamer V1 (Hafner et al., Dream to Control: Learning Behaviors by Latent Imagination, 2020).

The file follows the paper: Eqs. (1) to (10) as small functions, then Algorithm 1. What the paper
puts in its appendix (environments, networks, replay, precision, logging) is in dreamer_utils.py.

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

import functools
import math

import hydra
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, softplus

import dreamer_utils as utils

# --- Latent dynamics: Eqs. (1), (9), (10) --------------------------------------------------------
def observe(world_model, embedding, action, noise):
    """Eqs. (1), (9): filters s_t ~ p(s_t | s_{t-1}, a_{t-1}, o_t) from the zero state.

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
        past = state, belief, action[:, t]
        mean, std, guess, belief = world_model.prior(*past, noise["prior"][:, t])
        prior.append((mean, std, guess, belief))
        mean, std, state = world_model.posterior(belief, embedding[:, t], noise["posterior"][:, t])
        posterior.append((mean, std, state, belief))
    return along_time(prior), along_time(posterior)

def along_time(steps):
    """A list over time of (mean, std, state, belief) -> a dict of tensors with time second."""
    names = "mean", "std", "state", "belief"
    return {name: torch.stack(values, 1) for name, values in zip(names, zip(*steps))}

def log_normal(target, mean, event_dims=0):
    """ln N(target; mean, 1), summed over the last `event_dims` dimensions; any shape."""
    error = mse_loss(mean, target, reduction="none")  # one pass over the images, and one back
    size = math.prod(error.shape[error.dim() - event_dims :])
    error = error.flatten(-event_dims).sum(-1) if event_dims else error
    return -0.5 * (error + size * math.log(2 * math.pi))

def normal_entropy(std):
    """Entropy of a Gaussian with independent dimensions, in nats: [..., S] -> [...]."""
    return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

def latent_kl(prior, posterior):
    """Eq. (10), J_D: KL(posterior || prior) in nats, summed over the state: [B, L]."""
    p, q = (Normal(x["mean"], x["std"], validate_args=False) for x in (posterior, prior))
    return kl_divergence(Independent(p, 1), Independent(q, 1))

def model_loss(observation_log_prob, reward_log_prob, kl, kl_scale, free_nats):
    """Eq. (10): minus (J_O + J_R + J_D), in nats; all inputs [B, L].

    First the mean of the KL, then the clip at `free_nats`: a batch whose mean is below gets no
    gradient from the KL (App. A). free_nats=0 is the plain KL.
    """
    regulariser = kl_scale * kl.mean().clamp(min=free_nats)
    return regulariser - observation_log_prob.mean() - reward_log_prob.mean()

def discount_log_prob(logits, target):
    """ln Bernoulli(target; logits) for soft targets in [0, 1]; any shape (App. A)."""
    return -binary_cross_entropy_with_logits(logits, target, reduction="none")

# --- Behaviour: Eqs. (2) to (8) ------------------------------------------------------------------
def act(mean, std, noise):
    """Eq. (3): a = tanh(mean + std * noise), reparameterised; every shape [..., A]."""
    return torch.tanh(mean + std * noise)

def action_log_prob(mean, std, noise):
    """ln of the density of `act(mean, std, noise)`: [..., A] -> [...].

    Computed from the value before the tanh: inverting a saturated tanh would lose it.
    """
    raw = mean + std * noise
    log_slope = 2 * (math.log(2) - raw - softplus(-2 * raw))
    return (Normal(mean, std, validate_args=False).log_prob(raw) - log_slope).sum(-1)

def imagine(world_model, actor, state, belief, noise):
    """Eqs. (1), (2): dreams H steps with the transition model and the action model alone.

    The action model sees a constant: its gradient flows through actions and dynamics only.

    Args:
        state, belief: [N, S], [N, D], where the dreams start.
        noise: `action` [N, H, A], `state` [N, H, S], standard normal.
    Returns:
        state [N, H, S], belief [N, H, D] of s_1 .. s_H; mean, std [N, H, A] of a_0 .. a_{H-1}.
    """
    steps = []
    for t in range(noise["action"].shape[1]):
        mean, std = actor(state.detach(), belief.detach())
        action = act(mean, std, noise["action"][:, t])
        _, _, state, belief = world_model.prior(state, belief, action, noise["state"][:, t])
        steps.append((state, belief, mean, std))
    return tuple(torch.stack(values, 1) for values in zip(*steps))

def lambda_return(reward, value, discount, lambda_):
    """Eq. (6): V_t = r_t + c_t ((1 - lambda) v_{t+1} + lambda V_{t+1}), where V_H = v_H.

    lambda=0 is r_t + c_t v_{t+1}; lambda=1 sums all rewards and v_H, Eq. (5) with k = H.

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
    """The product c_1 .. c_{t-1}, how likely the dream still goes on at s_t, as a constant:
    [N, H] -> [N, H-1], the first is 1."""
    start = torch.ones_like(discount[:, :1])
    return torch.cat([start, discount[:, :-2]], 1).cumprod(1).detach()

def actor_loss(target, weight):
    """Eq. (7): minus the mean value target, which carries the gradient; both [N, H-1]."""
    return -(weight * target).mean()

def value_loss(value, target, weight):
    """Eq. (8): minus the mean ln N(V_t; v_t, 1), half the squared error and a constant; the target
    is a constant; all [N, H-1]."""
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
    image_log_prob = log_normal(observation, world_model.decoder(*features), observation.dim() - 2)
    reward_log_prob = log_normal(batch["reward"], world_model.reward(*features).squeeze(-1))
    kl = latent_kl(prior, posterior)
    loss = model_loss(image_log_prob, reward_log_prob, kl, hp.kl_scale, hp.free_nats)
    metrics = {
        "world_model/observation_loss": -image_log_prob.mean(),
        "world_model/reward_loss": -reward_log_prob.mean(),
        "world_model/kl": kl.mean(),
        "world_model/kl_at_floor": (kl.mean() <= hp.free_nats).to(kl.dtype),
        "world_model/prior_entropy": normal_entropy(prior["std"]).mean(),
        "world_model/posterior_entropy": normal_entropy(posterior["std"]).mean(),
    }
    if world_model.discount is not None:
        target = hp.gamma * (1 - batch["terminated"].to(kl.dtype))
        logits = world_model.discount(*features).squeeze(-1)
        metrics["world_model/discount_loss"] = -discount_log_prob(logits, target).mean()
        loss = loss + hp.discount_scale * metrics["world_model/discount_loss"]
    return loss, posterior, metrics | {"world_model/loss": loss}

def behavior_learning(agent, posterior, noise, hp):
    """Algorithm 1, behaviour learning: the losses of phi and psi, and metrics, from dreams that
    start at every posterior state [B, L, ...]."""
    world_model, learned = agent.world_model, agent.world_model.discount is not None
    rows = slice(None, -1 if learned else None)  # a last row may be an end: no dream starts there
    start = (posterior[name][:, rows].detach().flatten(0, 1) for name in ("state", "belief"))
    state, belief, mean, std = imagine(world_model, agent.actor, *start, noise)
    reward = world_model.reward(state, belief).squeeze(-1)
    value = agent.value(state, belief).squeeze(-1)
    discount = torch.full_like(reward, hp.gamma)
    if learned:
        discount = world_model.discount(state, belief).squeeze(-1).sigmoid()
    target = lambda_return(reward, value, discount, hp.lambda_)
    weight = discount_weight(discount)
    losses = actor_loss(target, weight), value_loss(value[:, :-1], target, weight)
    return *losses, {
        "behavior/actor_loss": losses[0],
        "behavior/value_loss": losses[1],
        "behavior/imagined_reward": reward.mean(),
        "behavior/imagined_value": value.mean(),
        "behavior/value_target": target.mean(),
        "behavior/action_entropy": -action_log_prob(mean, std, noise["action"]).mean(),
    }

def update(learning, agent, optimizers, batch, noise, hp):
    """Algorithm 1, one of the C update steps: theta, phi and psi follow their own losses.

    `learning` is `LEARNING`, or the same made fast. All gradients come before any step, that of
    theta before the dreams: by then its images need no memory any more.
    """
    dynamics_of, behavior_of = learning
    loss, posterior, dynamics = dynamics_of(agent.world_model, batch, noise, hp)
    optimizers["world_model"].differentiate(loss)
    actor, value, behavior = behavior_of(agent, posterior, noise, hp)
    optimizers["value"].differentiate(value, shared=True)  # v_t is in both losses
    optimizers["actor"].differentiate(actor)
    metrics = dynamics | behavior
    metrics["world_model/grad_norm"] = optimizers["world_model"].step()
    metrics["behavior/actor_grad_norm"] = optimizers["actor"].step()
    metrics["behavior/value_grad_norm"] = optimizers["value"].step()
    return {name: metric.detach() for name, metric in metrics.items()}

LEARNING = dynamics_learning, behavior_learning

def draw_noise(B, L, hp, world_model):
    """The standard normal noise of one update: of `observe`, then of `imagine`."""
    S, A = world_model.sizes["state"], world_model.sizes["action"]
    N = B * (L if world_model.discount is None else L - 1)
    shapes = {"prior": (B, L, S), "posterior": (B, L, S),
              "action": (N, hp.horizon, A), "state": (N, hp.horizon, S)}  # fmt: skip
    like = world_model.prior.rnn.weight_ih
    return {name: torch.randn(shape, dtype=like.dtype, device=like.device)
            for name, shape in shapes.items()}  # fmt: skip

# --- Algorithm 1, environment interaction: n environments, all shapes [n, ...] -------------------
def filter_state(world_model, observation, action, state, belief, noise):
    """Eq. (1): one step of `observe`, with the action that was executed last."""
    _, _, _, belief = world_model.prior(state, belief, action, noise["prior"])
    embedding = world_model.encoder(world_model.preprocess(observation))
    _, _, state = world_model.posterior(belief, embedding, noise["posterior"])
    return state, belief

def explore(action, noise, scale):
    """Adds N(0, scale) to an action and clips it to [-1, 1] (App. A)."""
    return (action + scale * noise).clamp(-1, 1)

def most_likely_action(mean, std, noise):
    """The densest of K samples, row by row; noise [K, n, A] -> [n, A].

    As officially, the density is taken at a float32 inverse of the tanh, clipped just below 1:
    the exact one has no bound where the tanh saturates.
    """
    action = act(mean, std, noise)
    raw = action.float().clamp(-0.99999997, 0.99999997).atanh().to(action.dtype)
    best = action_log_prob(mean, std, (raw - mean) / std).argmax(0)
    return action[best, torch.arange(len(best), device=best.device)]

def collection_policy(agent, observation, action, state, belief, noise, scale):
    """s_t from the history, a_t from the action model, exploration noise on top."""
    state, belief = filter_state(agent.world_model, observation, action, state, belief, noise)
    action = act(*agent.actor(state, belief), noise["action"])
    return explore(action, noise["exploration"], scale), state, belief

def evaluation_policy(agent, observation, action, state, belief, noise):
    """The same with the most likely action and no exploration noise."""
    state, belief = filter_state(agent.world_model, observation, action, state, belief, noise)
    return most_likely_action(*agent.actor(state, belief), noise["action"]), state, belief

# --- Is the dream true? Compared with a real episode; nothing here changes what is learned -------
def follow(world_model, choose, state, belief, noise):
    """Eq. (1), the transition model alone: [n, S], [n, D], noise [n, K, S] -> states [n, K, S],
    beliefs [n, K, D] after the actions `choose(t, state, belief)` [n, A]."""
    steps = []
    for t in range(noise.shape[1]):
        past = state, belief, choose(t, state, belief)
        _, _, state, belief = world_model.prior(*past, noise[:, t])
        steps.append((state, belief))
    return tuple(torch.stack(values, 1) for values in zip(*steps))

def given(action):
    """Actions [n, K, A] as `follow` wants them."""
    return lambda t, state, belief: action[:, t]

def chosen(actor, action_dim, samples=100):
    """Those of the evaluation policy."""

    def choose(t, state, belief):
        noise = torch.randn(samples, len(state), action_dim, device=state.device)
        return most_likely_action(*actor(state, belief), noise)

    return choose

def calibration(reward, value, gamma, lambda_):
    """How far v_t is above the lambda-return, Eq. (6), of real rewards: 0 if all values are true,
    c if all are c too high. [n, T] each -> the difference [n, T-1], and its mean.

    V_t contains later values, which hide a part of an error that all values share. So the mean
    is divided by the share of V_t for which the rewards alone account.
    """
    discount = torch.full_like(value, gamma)
    target = lambda_return(reward, value, discount, lambda_)
    borrowed = lambda_return(torch.zeros_like(reward), torch.ones_like(value), discount, lambda_)
    above = value[:, :-1] - target
    return above, above.sum() / (1 - borrowed).sum()

def open_loop_errors(world_model, observation, action, reward, context):
    """What the model predicts beyond `context` rows from the real actions, step by step.

    Args:
        observation: [n, L, ...], action [n, L, A], reward [n, L], rows of real episodes.
    Returns:
        predicted observations [n, L, ...], and {name: [L - context]}: mean squared errors of the
        observation and absolute ones of the reward, of the model and of repeating the last row.
    """
    truth = world_model.preprocess(observation)
    sizes = *action.shape[:2], world_model.sizes["state"]
    noise = {name: torch.randn(sizes, device=truth.device) for name in ("prior", "posterior")}
    embedding = world_model.encoder(truth[:, :context])
    _, seen = observe(world_model, embedding, action[:, :context], noise)
    last = (seen[name][:, -1] for name in ("state", "belief"))
    after = follow(world_model, given(action[:, context:]), *last, noise["prior"][:, context:])
    features = [torch.cat([seen[name], then], 1) for name, then in zip(("state", "belief"), after)]
    predicted, gain = world_model.decoder(*features), world_model.reward(*features).squeeze(-1)
    now = slice(context - 1, context)
    errors = {"observation_error": predicted - truth, "copied_observation": truth[:, now] - truth}
    errors = {name: error.square().flatten(2).mean((0, 2)) for name, error in errors.items()}
    errors["reward_error"] = (gain - reward).abs().mean(0)
    errors["copied_reward"] = (reward[:, now] - reward).abs().mean(0)
    return predicted, {name: error[context:] for name, error in errors.items()}

def diagnose(agent, episode, hp, context=5, length=50, sequences=6):
    """Model and critic against an episode of the evaluation policy.

    Args:
        episode: `observation` [T+1, ...], `action` [T, A], `reward` [T], and the agent's filtered
            `state` [T, S], `belief` [T, D]; `reward[t]` came after `action[t]`.
    Returns:
        metrics, {name: list} curves, and the predicted observations with their first rows.
    """
    world_model, reward, T = agent.world_model, episode["reward"], len(episode["reward"])
    rows = {name: torch.cat([torch.zeros_like(episode[name][:1]), episode[name]])
            for name in ("action", "reward")}  # fmt: skip
    L, H = min(length, T + 1), min(hp.horizon, T)
    first = torch.linspace(0, T + 1 - L, sequences).long()
    index = first[:, None] + torch.arange(L)
    windows = episode["observation"][index], rows["action"][index], rows["reward"][index]
    predicted, curves = open_loop_errors(world_model, *windows, min(context, L - 1))

    start = episode["state"][: T - H + 1], episode["belief"][: T - H + 1]
    noise = torch.randn(len(start[0]), H, start[0].shape[1], device=reward.device)
    dreams = follow(world_model, chosen(agent.actor, rows["action"].shape[1]), *start, noise)
    curves["imagined_return"] = world_model.reward(*dreams).flatten(1).sum(1)
    curves["real_return"] = reward.unfold(0, H, 1).sum(1)

    curves["value"] = agent.value(episode["state"][1:], episode["belief"][1:]).squeeze(-1)
    inputs = reward[None, : T - 1], curves["value"][None], hp.gamma, hp.lambda_
    curves["value_above_target"], bias = calibration(*inputs)
    metrics = {f"world_model/open_loop_{name}": curves[name].mean() for name in (
        "observation_error", "copied_observation", "reward_error", "copied_reward")}  # fmt: skip
    gap = curves["imagined_return"].mean() - curves["real_return"].mean()
    saturated = (episode["action"].abs() > 0.99).to(reward.dtype).mean()
    metrics |= {"behavior/return_gap": gap, "behavior/value_bias": bias,
                "behavior/action_saturation": saturated}  # fmt: skip
    metrics = {name: value.item() for name, value in metrics.items()}
    return metrics, {k: curve.flatten().tolist() for k, curve in curves.items()}, predicted, first

def picture(agent, episode, row, length):
    """What the agent sees in an episode, and what it dreams from the state at `row` on: {name:
    (observation, reward)}, `filtered` of rows 0 .. T-1, and of the `length` rows after `row` the
    `open_loop` with the real actions, and the `dream` with those of the policy."""
    world_model, action = agent.world_model, episode["action"]
    states = episode["state"], episode["belief"]
    start = [value[row : row + 1] for value in states]
    noise = torch.randn(1, length, states[0].shape[1], device=action.device)
    ways = {"open_loop": given(action[None, row:]), "dream": chosen(agent.actor, action.shape[1])}
    ways = {name: follow(world_model, way, *start, noise) for name, way in ways.items()}
    ways = {name: [value[0] for value in way] for name, way in ways.items()} | {"filtered": states}
    return {name: (world_model.decoder(*way), world_model.reward(*way).squeeze(-1))
            for name, way in ways.items()}  # fmt: skip

EVALUATION = evaluation_policy, diagnose, picture

# --- Algorithm 1 ---------------------------------------------------------------------------------
def updates_due(step, collector, hp):
    """Updates that belong to `step` environment steps: none before the seed episodes are there,
    `pretrain` with them, and `train_ratio` for each step that follows."""
    if step < collector.random_steps:
        return 0
    return hp.pretrain + int(round((step - collector.random_steps) * hp.train_ratio, 6))

def train(cfg):
    """Algorithm 1; returns the trained agent."""
    collect = functools.partial(collection_policy, scale=cfg.collector.exploration_noise)
    with utils.Run(cfg, collect, EVALUATION) as run:
        hp, agent, replay, clock = cfg.optimization, run.agent, run.replay, run.logger.clock
        learning = utils.accelerate(LEARNING, run.device, run.autocast)

        while True:
            # Dynamics learning and behaviour learning, C update steps.
            with clock("update"):
                due = updates_due(run.step, cfg.collector, hp)
                for batch in replay.batches(due - run.updates):
                    noise = draw_noise(*batch.shape, hp, agent.world_model)
                    metrics = update(learning, agent, run.optimizers, batch, noise, hp)
                    run.learned(batch, metrics)
                    if run.signal:
                        break

            # Nothing between here and the interaction changes what is learned.
            if not run.signal:
                run.report()
            if not run.goes_on():
                return agent

            # Environment interaction; the S seed episodes take random actions.
            with clock("collect"):
                run.collect()

@hydra.main(version_base="1.3", config_path=None, config_name="config")
def main(cfg):
    """Trains with the configuration of the command line; a user's mistake ends in one sentence."""
    try:
        cfg = utils.load_config(cfg)
        if cfg.doctor:
            raise SystemExit(0 if utils.doctor(cfg, train) else 1)
        if cfg.eval.checkpoint:
            utils.evaluate(cfg, EVALUATION)
        else:
            train(cfg)
    except (utils.UserError, OSError) as error:
        raise SystemExit(f"error: {utils.explain(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

if __name__ == "__main__":
    main()
