"""The files of a replay: their layout, their space on disk, their checksums."""

import math
import os
import shutil
import zlib

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict

from common.errors import DamageError, UserError

UNDO = "[0-9]*.pt"  # not the hidden ones, of a write that was killed


def replay_layout(cfg, observation_shape, action_dim):
    """The number of rows that a run needs, and {name: (shape, dtype)} of one row."""
    steps = min(cfg.replay_buffer.capacity, cfg.collector.total_steps)
    resets = steps / cfg.env.time_limit
    rows = math.ceil(steps / cfg.env.action_repeat + resets)
    return rows, {
        "observation": (
            tuple(observation_shape),
            torch.uint8 if cfg.env.from_pixels else torch.float32,
        ),
        "action": ((action_dim,), torch.float32),
        "reward": ((), torch.float32),
        "terminated": ((), torch.bool),
        "episode": ((), torch.int64),
    }


def row_bytes(layout):
    """Bytes of one row."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())


def check_space(folder, needed):
    """`UserError` if less than `needed` bytes are free where `folder` is; else the free ones."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the replay needs {needed / 1e9:.2f} GB in {folder} and there are {free / 1e9:.2f} GB"
            " free: lower replay_buffer.capacity, or choose another run_dir"
        )
    return free


def reserve(path, size):
    """Makes a file at least `size` bytes long, on disk and not only by name.

    A memory-mapped file that meets a full disk later would end the process without a word.
    """
    with path.open("ab") as file:
        missing = size - file.tell()
        if missing > 0:
            check_space(path.parent, missing)
            os.posix_fallocate(file.fileno(), size - missing, missing)


def open_rows(directory, rows, layout):
    """The files of a replay as a TensorDict [rows]; missing or short ones are made."""
    (directory / "undo").mkdir(parents=True, exist_ok=True)
    files = TensorDict({}, [rows])
    for name, (shape, dtype) in layout.items():
        path = directory / f"{name}.memmap"
        reserve(path, rows * math.prod(shape) * dtype.itemsize)
        files[name] = MemoryMappedTensor.from_filename(path, dtype, (rows, *shape))
    return files


def checksum(rows):
    """CRC-32 of all bytes of some rows, name by name."""
    value = 0
    for name in sorted(rows.keys()):
        data = rows[name].contiguous().numpy().view(np.uint8).reshape(-1)
        value = zlib.crc32(data, value)
    return value


def restore_rows(directory, state):
    """Takes the files back to what they were when `state` was saved, and checks every episode.

    Args:
        state: of `Replay.state_dict`.
    Raises:
        DamageError: an episode is not what was saved. What is older can still be restored.
    """
    files = open_rows(directory, state["rows"], state["layout"])
    for path in sorted((directory / "undo").glob(UNDO), reverse=True):
        if int(path.stem) >= state["episodes"]:
            rows = torch.load(path)
            index = rows.pop("index")
            files[index] = TensorDict(rows, [len(index)])
    oldest = state["episodes"] - len(state["table"])
    for episode, (first, count, saved) in enumerate(state["table"], oldest):
        if checksum(files[(first + torch.arange(count)) % state["rows"]]) != saved:
            raise DamageError(f"{directory}: episode {episode} is damaged or missing")
