"""Finished episodes as rows on disk, and the sequences that are drawn from them.

A row holds an observation, the action that led to it, and the reward that came with it (see the
time grid in dreamer.py); every observation is stored once. The files are the only copy of the
experience. A checkpoint keeps where each episode is and its checksum; what a full buffer
overwrites after it is kept in `undo/` until the next checkpoints are there.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict

from common.errors import UserError
from common.files import save_tensors
from common.opengl import no_opengl
from common.rows import DROPPED, UNDO, checksum, open_rows

with no_opengl():
    from torchrl.data import ReplayBuffer, SliceSampler, TensorStorage


NUMBERS = {  # of transitions
    "observation": "an observation",
    ("next", "observation"): "an observation",
    ("next", "reward"): "a reward",
}


class Replay:
    """TorchRL's replay buffer over files; samples sequences that never cross an episode.

    Args:
        cfg: the configuration's section `replay_buffer`.
        rows: how many rows there is room for.
        layout: {name: (shape, dtype)} of a row, see common/rows.py.
        directory: where the files are.
        action_repeat: environment steps per row.
        device: where batches go.
        seed: of the random numbers that choose batches.
        learns_ends: whether the model learns when episodes end.
    """

    def __init__(
        self, cfg, rows, layout, directory, action_repeat, device, seed=0, learns_ends=True
    ):
        self.batch_length, self.device = cfg.batch_length, device
        self.action_repeat = action_repeat
        self.rows, self.layout, self.directory = rows, layout, directory
        self.files = open_rows(directory, rows, layout)
        self.episodes = 0
        self.table = []  # (first row, rows, checksum) of each episode that is stored
        self.left_out, self.said = 0, False  # episodes that were too short, and that this is known
        self.warn_of_ends = not learns_ends
        self.pending = {}  # {environment: rows of its unfinished episode, in pieces}
        self.buffer = ReplayBuffer(
            storage=TensorStorage(self.files),
            batch_size=cfg.batch_size,
            sampler=SliceSampler(
                slice_len=cfg.batch_length,
                traj_key="episode",
                truncated_key=None,
                strict_length=True,
                cache_values=True,
            ),
        )
        # Drawn with random numbers of its own, a batch is the same whichever thread draws it.
        self.generator = torch.Generator().manual_seed(seed)
        self.generator_state = self.generator.get_state()  # after the last batch that was used
        self.buffer.set_rng(self.generator)
        self.worker = ThreadPoolExecutor(1)
        self.set_cursor(0, 0)

    def set_cursor(self, stored, cursor):
        """Says how many rows are valid, and where the next one goes."""
        state = {"_storage": {}, "initialized": True, "_len": stored}  # TorchRL's own layout
        self.buffer.storage.load_state_dict(state)
        self.buffer.writer.load_state_dict({"_cursor": cursor})

    def cursor(self):
        """Where the next row goes."""
        return self.buffer.writer.state_dict()["_cursor"]

    def state_dict(self):
        """Everything but the rows: they are durable once this returns."""
        for path in self.directory.glob("*.memmap"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return {
            "episodes": self.episodes,
            "left_out": self.left_out,
            "table": self.table,
            "stored": len(self.buffer),
            "cursor": self.cursor(),
            "rows": self.rows,
            "layout": self.layout,
            "generator": self.generator_state,
            "pending": {
                number: torch.cat(pieces).to_dict() for number, pieces in self.pending.items()
            },
        }

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave; the rows themselves were restored before."""
        grown = self.rows > state["rows"]
        self.set_cursor(state["stored"], state["stored"] if grown else state["cursor"])
        self.episodes, self.left_out = state["episodes"], state["left_out"]
        self.said = self.left_out > 0
        self.table, self.generator_state = state["table"], state["generator"]
        self.generator.set_state(self.generator_state)
        self.pending = {
            number: [TensorDict(rows, [len(rows["action"])])]
            for number, rows in state["pending"].items()
        }

    def forget(self, episodes):
        """Deletes what is only needed to go back to less than `episodes` episodes."""
        for path in (self.directory / "undo").glob(UNDO):
            if int(path.stem) < episodes:
                path.unlink()

    def extend(self, transitions):
        """Adds transitions [T] or [n_envs, T].

        Returns:
            the return and the length in environment steps of every episode that they end.
        """
        ended = []
        for number, steps in enumerate(transitions.reshape(-1, transitions.shape[-1])):
            for key, what in NUMBERS.items():
                if not steps[key].isfinite().all():
                    raise UserError(
                        f"the environment gave {what} that is not finite: mend the task; the"
                        " same command then goes on from the last checkpoint"
                    )
            ends = steps["next", "done"].flatten().nonzero().flatten() + 1
            for piece in steps.tensor_split(ends.tolist()):
                if len(piece) == 0:
                    continue
                if number not in self.pending:
                    self.pending[number] = [reset_row(piece)]
                self.pending[number].append(step_rows(piece))
                if piece["next", "done"].any():
                    self.check_end(piece["next", "terminated"].any())
                    ended.append(self.add_episode(torch.cat(self.pending.pop(number))))
        return ended

    def check_end(self, terminated):
        """Says once if episodes truly end and the model takes them to go on for ever."""
        if terminated and self.warn_of_ends:
            self.warn_of_ends = False
            print(
                "an episode terminated before its time limit: the model does not learn when"
                " episodes end, optimization.predict_discount=true does"
            )

    def add_episode(self, rows):
        """Stores the rows [T + 1] of an episode; returns its return and its length.

        One that is shorter than a sequence could never be sampled, and is left out.
        """
        count = len(rows)
        if count < self.batch_length:
            self.left_out += 1
        else:
            self.store(rows)
        return float(rows["reward"][1:].double().sum()), (count - 1) * self.action_repeat

    def store(self, rows):
        """Writes the rows of an episode, over the oldest ones if the buffer is full."""
        first, count = self.cursor(), len(rows)
        rows["episode"] = torch.full((count,), self.episodes)
        index = (first + torch.arange(count)) % self.rows
        if len(self.buffer) + count > self.rows:
            self.keep_for_undo(index)
        self.buffer.extend(rows)
        self.table.append((first, count, checksum(rows)))
        self.episodes += 1

    def say_left_out(self):
        """Says once how many episodes cannot be learned from."""
        if self.left_out and not self.said:
            self.said, all_episodes = True, self.left_out + self.episodes
            print(
                f"{self.left_out} of {all_episodes} episodes so far"
                f" ({self.left_out / all_episodes:.0%}) have fewer rows than"
                f" replay_buffer.batch_length={self.batch_length}: such episodes are not stored, a"
                " lower one uses them"
            )

    def keep_for_undo(self, index):
        """Copies the rows at `index` aside, which are about to be overwritten."""
        replaced = self.files[index].clone().to_dict() | {"index": index}
        save_tensors(self.directory / "undo" / f"{self.episodes:09d}.pt", replaced)
        while self.table and sum(row[1] for row in self.table) + len(index) > self.rows:
            self.table.pop(0)

    def batches(self, count):
        """Yields `count` batches [B, L] on the training device.

        Each is drawn while the one before is in use; the first only when it is asked for, for
        until then it is not known which episodes are there.
        """
        ahead = self.worker.submit(self.sample) if count > 0 else None
        for following in reversed(range(count)):
            batch, self.generator_state = ahead.result(), self.generator.get_state()
            batch = batch.to(self.device, non_blocking=True)
            if following:  # last, for the two threads share one interpreter
                ahead = self.worker.submit(self.sample)
            yield batch

    def sample(self):
        """A batch [B, L] in memory, pinned for a GPU; `UserError` if no episode is that long."""
        self.say_left_out()
        if not any(saved != DROPPED for _, _, saved in self.table):
            raise UserError(
                f"no episode has replay_buffer.batch_length={self.batch_length} rows"
                f" ({self.left_out} were shorter): lower replay_buffer.batch_length, or"
                " raise collector.random_steps"
            )
        batch = self.buffer.sample().reshape(-1, self.batch_length)
        batch = batch.exclude("episode", "index")
        # Only pinned memory is copied while the GPU computes. TorchRL pins none here: our storage
        # names no device.
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def close(self):
        """Ends the thread that draws batches ahead."""
        self.worker.shutdown()


def reset_row(steps):
    """The row of the reset from which transitions [T] start: action 0, reward 0: [1]."""
    first = steps[:1]
    return TensorDict(
        {
            "observation": first["observation"],
            "action": torch.zeros_like(first["action"]),
            "reward": torch.zeros(1),
            "terminated": torch.zeros(1, dtype=torch.bool),
        },
        [1],
    ).clone()  # the collector writes over its batches


def step_rows(steps):
    """The rows [T] of transitions [T]: what is known on arrival."""
    after = steps["next"]
    return TensorDict(
        {
            "observation": after["observation"],
            "action": steps["action"],
            "reward": after["reward"].flatten(),
            "terminated": after["terminated"].flatten(),
        },
        [len(steps)],
    ).clone()
