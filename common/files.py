"""Files that are either as before or complete, and rows of JSON."""

import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path):
    """Yields a path to write to, which then replaces `path`, also if the machine is killed.

    The ending of the name stays, because some writers choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    yield aside
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def atomic_write(path, text):
    """Writes a text file completely or not at all."""
    with atomic_path(path) as aside:
        aside.write_text(text)


def read_jsonl(path):
    """The rows of a file with one JSON object a line; no rows if there is no such file."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
