"""Episodes that no stop can change: own seeds, and unfinished ones taken up again exactly.

A run that was stopped in the middle of an episode resets the environment with the episode's own
seed, repeats the actions that it had taken, and gives the agent back the memory that it had.
"""

import numpy as np
import torch
from tensordict import TensorDict

from common.device import one_thread
from common.errors import UserError
from common.opengl import check_picture, no_opengl

with no_opengl():
    from torchrl import envs

EVALUATION = 1_000_000  # as the number of an environment: the one that evaluates
MEMORY = ("state", "belief", "previous_action")


class EpisodeSeeds:
    """The seeds of the episodes of one environment: no reset depends on the past.

    Args:
        seed: of the run.
        number: of the environment.
        episode: how many episodes it has begun.
        replayed: the actions [T, A] of an unfinished episode, which the first reset repeats.
    """

    def __init__(self, seed, number, episode=0, replayed=()):
        self.seed, self.number, self.episode, self.replayed = seed, number, episode, replayed

    def __next__(self):
        self.episode += 1
        sequence = np.random.SeedSequence((self.seed, self.number, self.episode))
        return int(sequence.generate_state(1)[0])


class ResumableEnv(envs.TransformedEnv):
    """Resets to where an unfinished episode was: its seed and its actions bring it there."""

    def __init__(self, env, transform, seeds):
        super().__init__(env, transform)
        self.__dict__["seeds"] = seeds  # TorchRL would pass it on to the environment inside

    def _reset(self, tensordict=None, **kwargs):
        start, replayed = super()._reset(tensordict, **kwargs), self.seeds.replayed
        self.seeds.replayed = ()
        for action in replayed:
            start = envs.step_mdp(self.step(start.set("action", action)))
        return start


class ResumedMemory(envs.Transform):
    """Gives the agent the memory that it had in unfinished episodes, at the first reset only."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def _reset(self, tensordict, tensordict_reset):
        memory, self.memory = self.memory, None
        return tensordict_reset if memory is None else tensordict_reset.update(memory)


def workers_of(env):
    """The processes of several copies that are still known; TorchRL has no public way to them."""
    try:
        workers = env.base_env._workers
    except (AttributeError, RuntimeError):  # a single copy, or one that is closed
        return []
    return [worker for worker in workers if not worker._closed]


class ResumableCollector:
    """Phases of acting, and all that is needed to take an unfinished episode up again.

    Args:
        collector: TorchRL's; each of its batches is a phase.
        n_envs: environments that act side by side.
        from_pixels: whether the first observation is an image, which must show something.
    """

    def __init__(self, collector, n_envs, from_pixels):
        self.collector, self.phases = collector, iter(collector)
        self.workers = workers_of(collector.env)
        self.picture_unchecked = from_pixels
        self.episodes = [0] * n_envs  # finished
        self.actions = [[] for _ in range(n_envs)]  # of the unfinished one, pieces [t, A]
        self.memory = [None] * n_envs  # after the last of them

    def collect(self):
        """The transitions [T], or [n_envs, T], of the next phase; `UserError` if a task fails."""
        try:
            with one_thread():
                transitions = next(self.phases)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            for number, worker in enumerate(self.workers):
                if not worker._closed and worker.exitcode:
                    reason = f"copy {number} ended with exit code {worker.exitcode}"
            raise UserError(
                f"acting in the environment failed ({reason}); the same command goes on from the"
                " last checkpoint"
            ) from error
        if self.picture_unchecked:
            check_picture(transitions["observation"].flatten(0, -4)[0])
            self.picture_unchecked = False
        for number, steps in enumerate(transitions.reshape(-1, transitions.shape[-1])):
            ends = steps["next", "done"].flatten().nonzero().flatten().tolist()
            self.episodes[number] += len(ends)
            if ends:
                self.actions[number] = []
            rest = steps[ends[-1] + 1 :] if ends else steps
            self.actions[number].append(rest["action"].clone())
            self.memory[number] = {name: steps["next"][name][-1].clone() for name in MEMORY}
        return transitions

    def close(self):
        """Ends the collector, its environments and their processes."""
        self.collector.shutdown()

    def state_dict(self):
        """Episodes that are over, and the actions and the memory of those under way."""
        actions = [torch.cat(pieces) if pieces else None for pieces in self.actions]
        return {"episodes": self.episodes, "actions": actions, "memory": self.memory}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave; the environments were built with it already."""
        self.episodes, self.memory = list(state["episodes"]), list(state["memory"])
        self.actions = [[] if actions is None else [actions] for actions in state["actions"]]


def resumed_episodes(seed, n_envs, state):
    """`EpisodeSeeds` of each environment, and the agent's memory in unfinished episodes.

    Args:
        state: of a `ResumableCollector`, or None at the start of a run.
    Returns:
        a list of `EpisodeSeeds`; a TensorDict [] or [n_envs], or None if no episode is under way.
    """
    if state is None:
        return [EpisodeSeeds(seed, number) for number in range(n_envs)], None
    seeds, memories = [], []
    for number in range(n_envs):
        actions = state["actions"][number]
        under_way = actions is not None and len(actions) > 0
        replayed = actions if under_way else ()
        seeds.append(EpisodeSeeds(seed, number, state["episodes"][number], replayed))
        memories.append(state["memory"][number] if under_way else None)
    known = next((memory for memory in memories if memory), None)
    if known is None:
        return seeds, None
    fresh = {name: torch.zeros_like(value) for name, value in known.items()}
    memories = [TensorDict(memory or fresh) for memory in memories]
    return seeds, memories[0] if n_envs == 1 else torch.stack(memories)
