"""Do a model's dreams follow the actions? `python benchmarks/check_dreams.py CHECKPOINTS...`.

Fresh episodes with random actions, the same for all checkpoints of a task; every second episode
holds each action for five agent steps. The model sees an episode up to one of its rows. Then it
dreams H steps with the real actions alone. A dream that ignores the actions can have the right
mean of the rewards, but no correlation with the real ones from episode to episode.

A checkpoint is also a run, whose newest one counts, or an exported agent.
"""

import argparse
import sys
from pathlib import Path

import torch
from torchrl.envs import step_mdp

# A script finds modules in its own directory only; dreamer.py is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dreamer  # noqa: E402
import dreamer_utils as utils  # noqa: E402
from common.agents import find_checkpoint, load_weights, take_over_config  # noqa: E402
from common.envs import make_task  # noqa: E402
from common.episodes import EVALUATION, EpisodeSeeds  # noqa: E402
from common.opengl import prepare_gl  # noqa: E402
from markdown_tables import markdown_table  # noqa: E402
from measuring import configuration  # noqa: E402

STARTS = (3, 5, 10, 20)  # the last row that is seen, in agent steps
HELD = (1, 5)  # agent steps with the same action, by turns
DRAWS = 8  # dreams from each state; what they foresee is averaged
COLUMNS = (
    *("agent", "step", "rewards of seen states: correlation", "seen up to row"),
    *("sum of dreamed rewards", "real", "correlation"),
    "error of observations, times that of repeating the last: first half, second half of H",
)


def play(cfg, count, length):
    """Episodes with random actions, as the replay keeps them.

    Returns:
        observation, action, reward: [count, length, ...]; the row of a reset has action 0.
    """
    utils.quiet_libraries()
    prepare_gl(cfg.env.from_pixels)
    env = make_task(cfg.env, EpisodeSeeds(cfg.seed, EVALUATION))
    size = env.action_spec.shape[-1]
    generator = torch.Generator().manual_seed(cfg.seed)
    episodes = []
    for number in range(count):
        actions = torch.rand(length, size, generator=generator) * 2 - 1
        actions = actions.repeat_interleave(HELD[number % len(HELD)], 0)[: length - 1]
        now = env.reset()
        rows = [(now["observation"], torch.zeros(size), torch.zeros(()))]
        for action in actions:
            step = env.step(now.set("action", action))
            after = step["next"]
            rows.append((after["observation"], action, after["reward"].squeeze(-1)))
            if after["done"].any() and len(rows) < length:
                raise utils.UserError(
                    f"an episode of {cfg.env.name} ended after {len(rows) - 1} agent steps, and"
                    f" {length - 1} are needed: choose a task without an early end"
                )
            now = step_mdp(step)
        episodes.append([torch.stack(column) for column in zip(*rows, strict=True)])
    env.close()
    return tuple(torch.stack(column) for column in zip(*episodes, strict=True))


def dream(world_model, posterior, action, start, horizon):
    """H steps from row `start` with the real actions: state, belief [DRAWS * n, H, ...]."""
    state, belief = (posterior[name][:, start].repeat(DRAWS, 1) for name in ("state", "belief"))
    action = action[:, start + 1 : start + 1 + horizon].repeat(DRAWS, 1, 1)
    noise = torch.randn(len(state), horizon, state.shape[-1])
    return dreamer.imagine(world_model, lambda t, *_: (action[:, t],), state, belief, noise)


def correlation(a, b):
    """Of two tensors of the same shape; nan if one is constant."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def observation_errors(world_model, dreamed, observation, start, horizon):
    """Squared errors of dreamed observations, and of repeating the last one: [H] each."""
    n = len(observation)
    mean = world_model.decoder(*(part[:n] for part in dreamed))  # one dream from each state
    real = observation[:, start + 1 : start + 1 + horizon]
    last = observation[:, start, None]
    return tuple((guess - real).square().flatten(2).mean((0, 2)) for guess in (mean, last))


@torch.no_grad()
def check(world_model, rows, horizon):
    """The cells of one checkpoint, from the third column on: a line for each of `STARTS`."""
    observation, action, reward = rows
    observation = world_model.preprocess(observation)
    shape = *reward.shape, world_model.sizes["state"]
    noise = {"prior": torch.randn(shape), "posterior": torch.randn(shape)}
    embedding = world_model.encoder(observation)
    _, posterior = dreamer.observe(world_model, embedding, action, noise)
    seen = world_model.reward(posterior["state"], posterior["belief"]).squeeze(-1)
    seen = correlation(seen[:, 1:], reward[:, 1:])
    for start in STARTS:
        dreamed = dream(world_model, posterior, action, start, horizon)
        guess = world_model.reward(*dreamed).squeeze(-1).unflatten(0, (DRAWS, -1)).mean(0).sum(1)
        real = reward[:, start + 1 : start + 1 + horizon].sum(1)
        model, last = observation_errors(world_model, dreamed, observation, start, horizon)
        middle = horizon // 2
        halves = [
            model[part].sum() / last[part].sum() for part in (slice(middle), slice(middle, None))
        ]
        yield (
            *(f"{seen:.2f}", f"{start}", f"{guess.mean():.1f}", f"{real.mean():.1f}"),
            *(f"{correlation(guess, real):.2f}", f"{halves[0]:.2f}, {halves[1]:.2f}"),
        )


def label(name):
    """The run of a checkpoint, or the folder of an agent."""
    path = Path(name).resolve()
    return path.parents[1].name if path.parent.name == "checkpoints" else path.name


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--episodes", type=int, default=120)
    options = parser.parse_args()
    if options.episodes < 2:
        parser.error("--episodes: a correlation needs at least 2")
    played, lines = {}, []
    for name in options.checkpoints:
        path, metadata, states = find_checkpoint(name)
        cfg = take_over_config(configuration(), metadata["config"])
        horizon = cfg.optimization.horizon
        task = cfg.env.model_dump_json(), cfg.seed, horizon
        if task not in played:
            played[task] = play(cfg, options.episodes, max(STARTS) + 1 + horizon)
        rows = played[task]
        agent = dreamer.make_agent(cfg, rows[0].shape[2:], rows[1].shape[2])
        load_weights(agent, states.get("agent"), path)
        utils.set_seeds(cfg.seed)
        cells = check(agent.world_model, rows, horizon)
        lines += [(label(name), f"{metadata['step']:,}", *line) for line in cells]
    print(markdown_table(COLUMNS, lines))


if __name__ == "__main__":
    try:
        main()
    except utils.UserError as error:
        raise SystemExit(f"error: {error}") from None
