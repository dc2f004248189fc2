"""Files that are either as before or complete, and rows of JSON."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path

import torch

COUNTERS = "environment_steps", "agent_steps", "updates"  # in every row of a run


@contextlib.contextmanager
def atomic_path(path):
    """Yields a path to write to, which then replaces `path`, also if the machine is killed.

    The ending of the name stays, because some writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # a part would only take room, on a disk that is full
        raise


def atomic_write(path, text):
    """Writes a text file completely or not at all."""
    with atomic_path(path) as aside:
        aside.write_text(text)


def save_tensors(path, value):
    """`torch.save`, completely or not at all; a full disk is an OSError as it is elsewhere."""
    with atomic_path(path) as aside:
        try:
            torch.save(value, aside)
        except RuntimeError as error:  # PyTorch's writer does not say why it failed
            raise disk_full(path) from error


def disk_full(path):
    """The error of a disk that took only a part."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def read_jsonl(path, needed=()):
    """The rows of a file with one JSON object a line; broken rows, or a missing file, are none.

    Args:
        needed: keys without which a row is broken.
    """
    path, rows = Path(path), []
    if not path.exists():
        return rows
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and all(key in row for key in needed):
                rows.append(row)
    return rows


def sayable(value):
    """The same with None in place of numbers that JSON cannot say: infinities and NaN."""
    if isinstance(value, dict):
        return {key: sayable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [sayable(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RowFile:
    """A file of JSON rows that is only ever appended to, a whole row at a time."""

    def __init__(self, path):
        self.path = path
        self.file = path.open("ab", buffering=0)

    def append(self, row):
        """Writes a row completely, or leaves the file as it was and raises OSError."""
        line = (json.dumps(sayable(row), allow_nan=False) + "\n").encode()
        start = self.file.tell()
        try:
            if self.file.write(line) != len(line):
                raise disk_full(self.path)
        except OSError:
            self.file.truncate(start)
            self.file.seek(start)
            raise

    def length(self):
        """Bytes in the file."""
        return self.file.tell()

    def cut(self, length):
        """Forgets what was written after `length` bytes; False if rows before it are missing.

        A file that somebody cut short is ended at its last whole row, never filled up.
        """
        content = self.path.read_bytes()
        whole = len(content) >= length
        self.file.truncate(length if whole else content.rfind(b"\n") + 1)
        self.file.seek(0, os.SEEK_END)
        return whole

    def close(self):
        """Ends it."""
        self.file.close()
