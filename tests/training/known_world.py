"""A world that is known exactly, as a world model."""

import torch


class KnownWorld:
    """A world model that knows the world s' = s + a, r = s, o = s; wrong as its arguments say."""

    sizes = {"state": 1, "belief": 1, "action": 1}

    def __init__(self, reward_bias=0.0, drift=0.0):
        self.reward_bias, self.drift = reward_bias, drift

    def preprocess(self, observation):
        return observation

    encoder = preprocess

    def initial(self, n):
        return torch.zeros(n, 1), torch.zeros(n, 1)

    def prior(self, state, belief, action, noise):
        return state, torch.ones_like(state), state + action + self.drift, belief

    def posterior(self, belief, embedding, noise):
        return embedding, torch.ones_like(embedding), embedding

    def decoder(self, state, belief):
        return state

    def reward(self, state, belief):
        return state + self.reward_bias
