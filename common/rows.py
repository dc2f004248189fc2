"""The files of a replay: their layout, their space on disk, their checksums."""

import math
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict

from common.checkpoint import load_tensors
from common.errors import DamageError, UserError

DELETED = "deleted.txt"  # in place of the files of a replay that was not to be kept
DROPPED = "dropped"  # in place of the checksum of an episode
REMEDY = "checkpoint.drop_damaged=true goes on without it"
UNDO = "[0-9]*.pt"  # not the hidden ones, of a write that was killed
NAMES = "observation", "action", "reward", "terminated", "episode"  # what a row holds


def replay_layout(cfg, observation_shape, action_dim):
    """The number of rows that a run needs, and {name: (shape, dtype)} of one row."""
    steps = min(cfg.replay_buffer.capacity, cfg.collector.total_steps)
    agent_steps = steps / cfg.env.action_repeat
    # Each episode has one row more than steps. Control Suite tasks end at the time limit; others
    # may end earlier, and those shorter than a sequence are not stored.
    shortest = cfg.env.time_limit // cfg.env.action_repeat
    if cfg.env.backend != "dm_control":
        shortest = min(shortest, cfg.replay_buffer.batch_length - 1)
    rows = math.ceil(agent_steps + agent_steps / shortest)
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
            " free: lower replay_buffer.capacity, or choose another run_dir or"
            " replay_buffer.directory"
        )
    return free


def place_rows(run_path, wanted):
    """The directory of a run's rows, `replay` in its own; a link if another one is wanted.

    Args:
        wanted: `replay_buffer.directory`; the rows go to a new directory in it, named as the run.
    """
    place = run_path / "replay"
    if not wanted:
        return place
    if place.exists() or place.is_symlink():
        if not place.is_symlink() or place.resolve().parent != Path(wanted).resolve():
            raise UserError(
                f"replay_buffer.directory={wanted}: the replay of this run is in"
                f" {place.resolve()}: leave this out, or move it and the link to it by hand"
            )
        return place
    names = (f"{run_path.name}{suffix}" for suffix in ("", *(f".{n}" for n in range(2, 1000))))
    target = next(path for path in (Path(wanted, name) for name in names) if not path.exists())
    target.mkdir(parents=True)
    place.symlink_to(target.resolve())
    return place


def delete_rows(place):
    """Deletes the files of a replay, and leaves a note in their place."""
    for path in (*place.glob("*.memmap"), *place.glob("undo/*")):
        path.unlink()
    (place / DELETED).write_text("The run has ended, and had replay_buffer.keep=false.\n")


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


def restore_rows(directory, state, drop_damaged=False):
    """Takes the files back to what they were when `state` was saved, and checks every episode.

    Args:
        state: of `Replay.state_dict`.
        drop_damaged: a damaged episode is taken out of `state`, and said, in place of an error.
    Raises:
        DamageError: an episode is not what was saved. The files are as before: what is older can
            still be restored.
        UserError: the replay was deleted when the run ended.
    """
    if (directory / DELETED).exists():
        raise UserError(
            f"the run in {directory.parent} has ended and its replay was deleted"
            " (replay_buffer.keep=false): eval.checkpoint=... still plays it, but it cannot go on;"
            " choose another name=..."
        )
    if set(state["layout"]) != set(NAMES):  # they become names of files
        raise DamageError("its layout is not ours")
    files, replaced = open_rows(directory, state["rows"], state["layout"]), []
    try:
        for index, rows in overwritten_rows(directory, state["episodes"], drop_damaged):
            replaced.append((index, files[index].clone()))
            files[index] = rows
        check_episodes(files, directory, state, drop_damaged)
    except Exception:  # a newer checkpoint may need the rows as they were
        for index, rows in reversed(replaced):
            files[index] = rows
        raise


def overwritten_rows(directory, episodes, drop_damaged):
    """Yields index and rows of what a full buffer overwrote after `episodes`, the newest first.

    Those that are damaged are an error, or left out: their episodes then have another checksum.
    """
    for path in sorted((directory / "undo").glob(UNDO), reverse=True):
        if int(path.stem) < episodes:
            continue
        try:
            rows = load_tensors(path)
        except DamageError as error:
            if not drop_damaged:
                raise DamageError(f"{path}: {error}; {REMEDY}") from None
            print(f"{path} is damaged ({error}): dropped")
            continue
        index = rows.pop("index")
        yield index, TensorDict(rows, [len(index)])


def check_episodes(files, directory, state, drop_damaged):
    """Compares every episode with its checksum; see `restore_rows`."""
    oldest = state["episodes"] - len(state["table"])
    for number, (first, count, saved) in enumerate(state["table"]):
        index = (first + torch.arange(count)) % state["rows"]
        if saved == DROPPED or checksum(files[index]) == saved:
            continue
        episode = f"episode {oldest + number} in {directory} is damaged or missing"
        if not drop_damaged:
            raise DamageError(f"{episode}; {REMEDY}")
        # Rows that are an episode each are too short to be sampled.
        files["episode"][index] = -1 - index
        state["table"][number] = (first, count, DROPPED)
        print(f"{episode}: dropped; the results are no longer the same to the bit")
