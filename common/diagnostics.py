"""Is the dream true? Model and critic compared with a real episode.

Nothing here changes what is learned. What the paper defines is handed in (see `Diagnostics`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ERRORS = ("observation_error", "copied_observation", "reward_error", "copied_reward")


@dataclass
class Diagnostics:
    """The paper's functions, and what they say about an agent and an episode.

    An episode is a dict: `observation` [T + 1, ...], `action` [T, A], `reward` [T], and the
    agent's filtered `state` [T, S] and `belief` [T, D]; `reward[t]` came after `action[t]`.
    `terminated` [] says whether it truly ended there, not only at the time limit.
    """

    observe: Callable  # Eqs. (1), (9)
    imagine: Callable  # Eqs. (1), (2)
    lambda_return: Callable  # Eq. (6)
    mode_action: Callable  # of the evaluation policy

    def diagnose(self, agent, episode, hp, context=5, length=50, sequences=6):
        """Model and critic against an episode of the evaluation policy.

        Args:
            hp: `horizon`, `gamma` and `lambda_`.
            context: rows that the model sees before it is left alone.
            length: rows of each of the `sequences` that are predicted.
        Returns:
            metrics {name: float}, curves {name: list}, and the predicted observations with the
            rows of the episode at which they start.
        """
        world_model, reward, T = agent.world_model, episode["reward"], len(episode["reward"])
        L, H = min(length, T + 1), min(hp.horizon, T)
        first = torch.linspace(0, T + 1 - L, sequences).long()
        windows = replay_windows(episode, first, L)
        predicted, curves = self.open_loop_errors(world_model, *windows, min(context, L - 1))

        start = episode["state"][: T - H + 1], episode["belief"][: T - H + 1]
        noise = torch.randn(len(start[0]), H, start[0].shape[1], device=reward.device)
        policy = self.evaluation_actions(agent.actor, episode["action"].shape[1])
        dreams = self.imagine(world_model, policy, *start, noise)
        curves["imagined_return"] = world_model.reward(*dreams).flatten(1).sum(1)
        curves["real_return"] = reward.unfold(0, H, 1).sum(1)

        value = agent.value(episode["state"][1:], episode["belief"][1:]).squeeze(-1)
        ended = bool(episode["terminated"])
        if ended:  # the last state is worth its reward, and nothing comes after it
            value = torch.cat([value, reward[-1:]])
        curves["value"] = value
        inputs = reward[None, : len(value)], value[None], hp.gamma, hp.lambda_, ended
        curves["value_above_target"], bias = self.value_bias(*inputs)
        metrics = {f"world_model/open_loop_{name}": curves[name].mean() for name in ERRORS}
        gap = curves["imagined_return"].mean() - curves["real_return"].mean()
        metrics["behavior/return_gap"] = gap
        metrics["behavior/value_bias"] = bias
        saturated = (episode["action"].abs() > 0.99).to(reward.dtype)
        metrics["behavior/action_saturation"] = saturated.mean()
        metrics = {name: value.item() for name, value in metrics.items()}
        curves = {name: curve.flatten().tolist() for name, curve in curves.items()}
        return metrics, curves, predicted, first

    def evaluation_actions(self, actor, action_dim, samples=100):
        """The evaluation policy as `imagine` wants it: (t, state, belief) -> action."""

        def choose_action(t, state, belief):
            noise = torch.randn(samples, len(state), action_dim, device=state.device)
            return (self.mode_action(*actor(state, belief), noise),)

        return choose_action

    def value_bias(self, reward, value, gamma, lambda_, ended=False):
        """How far v_t is above the lambda-return, Eq. (6), of real rewards.

        It is 0 if all values are true, c if all are c too high. V_t contains later values, which
        hide a part of an error that all values share. So the mean is divided by the share of V_t
        for which the rewards alone account.

        Args:
            reward, value: [n, T].
            ended: whether the last value is no estimate, but the last reward of all.
        Returns:
            the difference [n, T - 1], and its mean.
        """
        discount = torch.full_like(value, gamma)
        target = self.lambda_return(reward, value, discount, lambda_)
        nothing, estimated = torch.zeros_like(reward), torch.ones_like(value)
        if ended:
            estimated[:, -1] = 0
        borrowed = self.lambda_return(nothing, estimated, discount, lambda_)
        above = value[:, :-1] - target
        return above, above.sum() / (1 - borrowed).sum()

    def open_loop_errors(self, world_model, observation, action, reward, context):
        """What the model predicts beyond `context` rows from the real actions, step by step.

        Args:
            observation: [n, L, ...], action [n, L, A], reward [n, L], rows of real episodes.
        Returns:
            predicted observations [n, L, ...], and {name: [L - context]}: mean squared errors of
            the observation and absolute ones of the reward, of the model and of repeating the
            last row.
        """
        truth = world_model.preprocess(observation)
        sizes = *action.shape[:2], world_model.sizes["state"]
        noise = {name: torch.randn(sizes, device=truth.device) for name in ("prior", "posterior")}
        embedding = world_model.encoder(truth[:, :context])
        _, seen = self.observe(world_model, embedding, action[:, :context], noise)
        last = seen["state"][:, -1], seen["belief"][:, -1]
        policy = given_actions(action[:, context:])
        state, belief = self.imagine(world_model, policy, *last, noise["prior"][:, context:])
        features = torch.cat([seen["state"], state], 1), torch.cat([seen["belief"], belief], 1)
        predicted = world_model.decoder(*features)
        predicted_reward = world_model.reward(*features).squeeze(-1)
        now = slice(context - 1, context)
        squared = (predicted - truth).square()
        copied = (truth[:, now] - truth).square()
        errors = {
            "observation_error": squared.flatten(2).mean((0, 2)),
            "copied_observation": copied.flatten(2).mean((0, 2)),
            "reward_error": (predicted_reward - reward).abs().mean(0),
            "copied_reward": (reward[:, now] - reward).abs().mean(0),
        }
        return predicted, {name: error[context:] for name, error in errors.items()}

    def predict_videos(self, agent, episode, row, length):
        """What the agent sees in an episode, and what it dreams from the state at `row` on.

        Returns:
            {name: (observation, reward)}: `filtered` of the rows 0 .. T - 1, and of the `length`
            rows after `row` the `open_loop` with the real actions, and the `dream` with those of
            the policy.
        """
        world_model, action = agent.world_model, episode["action"]
        filtered = episode["state"], episode["belief"]
        start = [value[row : row + 1] for value in filtered]
        noise = torch.randn(1, length, start[0].shape[1], device=action.device)
        policies = {
            "open_loop": given_actions(action[None, row:]),
            "dream": self.evaluation_actions(agent.actor, action.shape[1]),
        }
        features = {}
        for name, policy in policies.items():
            state, belief = self.imagine(world_model, policy, *start, noise)
            features[name] = state[0], belief[0]
        features["filtered"] = filtered
        return {
            name: (world_model.decoder(*inputs), world_model.reward(*inputs).squeeze(-1))
            for name, inputs in features.items()
        }


def given_actions(action):
    """Actions [n, K, A] as `imagine` wants them: (t, state, belief) -> action."""
    return lambda t, state, belief: (action[:, t],)


def replay_windows(episode, first, length):
    """Observation, action and reward of an episode as replay rows, [n, length, ...].

    Args:
        first: [n], the rows at which the windows start.
    """
    index = (first[:, None] + torch.arange(length)).to(episode["reward"].device)
    rows = [episode["observation"]]
    for name in ("action", "reward"):  # those of the reset row are 0
        rows.append(torch.cat([torch.zeros_like(episode[name][:1]), episode[name]]))
    return [values[index] for values in rows]
