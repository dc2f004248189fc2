"""Whether a configuration can fit into memory at all: a bound from below."""

import os

from common.errors import UserError


def needed_bytes(cfg):
    """Bytes that weights, their gradients and Adam's moments, and one batch surely take."""
    net, replay = cfg.networks, cfg.replay_buffer
    hidden_layers = 1 + 2 + 3  # between hidden layers of reward, value and action model
    weights = hidden_layers * net.hidden_dim**2 + 6 * net.belief_dim**2
    features = replay.batch_size * (net.belief_dim + net.state_dim + net.hidden_dim)
    if cfg.env.from_pixels:
        weights += 16 * (2 + 8 + 32) * net.channels**2  # the encoder's last three convolutions
        features += replay.batch_size * (64 * 64 * 3 + 31 * 31 * net.channels)
    dreams = replay.batch_size * cfg.optimization.horizon * (net.belief_dim + net.hidden_dim)
    return 4 * (4 * weights + features + dreams)


def check_memory(cfg, device):
    """`UserError` if a run on a CPU needs more memory than the machine has."""
    if device.type != "cpu":
        return "a GPU says so itself"
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = needed_bytes(cfg)
    if needed > there:
        raise UserError(
            f"these sizes need at least {needed / 1e9:.0f} GB of memory and there are"
            f" {there / 1e9:.0f} GB: lower networks.* or replay_buffer.batch_size"
        )
    return f"at least {needed / 1e9:.1f} GB of {there / 1e9:.0f} GB"
