"""Checkpoints: one checksummed file each, complete or absent, and read without running code.

TorchRL writes them (manifest, rotation, atomic rename). Reading is ours, because TorchRL's falls
back to a pickle where a file is missing, and a pickle from a stranger runs code.
"""

import io
import os
import zipfile
import zlib

import torch

from common.errors import DamageError, UserError
from common.opengl import no_opengl

with no_opengl():
    from torchrl.checkpoint import Checkpoint, CheckpointRotation, StateDictCheckpointAdapter

# All that a damaged archive can lead to.
DAMAGE = (
    DamageError,
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def save_checkpoint(directory, keep, step, metadata, parts):
    """Writes the state of `parts` aside, then renames it; older ones than `keep` are deleted.

    Args:
        directory: of the checkpoints.
        parts: {name: an object with `state_dict`}.
    Returns:
        the metadata of all checkpoints that are kept.
    """
    checkpoint = Checkpoint(format="archive")
    for name, part in parts.items():
        checkpoint.register(name, part, adapter=StateDictCheckpointAdapter("torch"))
    rotation = CheckpointRotation(directory, keep_last=keep)
    try:
        path = rotation.save(checkpoint, step=step, metadata=metadata)
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            os.fsync(file.fileno())
            if archive.testzip():
                raise OSError(5, "what was read back is not what was written")
    except OSError as error:
        raise UserError(
            f"the checkpoint of step {step} could not be written to {directory}"
            f" ({error.strerror}): free some space; the same command then goes on"
            " from the one before"
        ) from None
    return [Checkpoint.manifest(path)["metadata"] for path in rotation.checkpoints()]


def read_checkpoint(path, names=None):
    """The metadata of a checkpoint, and {name: state} of its parts, or of those named.

    Raises:
        DamageError: the file is not what was saved, or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise DamageError(f"{broken} is damaged")
            manifest = Checkpoint.manifest(path)
            records = manifest["components"]
            states = {}
            for name in records if names is None else names:
                content = archive.read(f"{records[name]['path']}/state.pt")
                states[name] = torch.load(
                    io.BytesIO(content), map_location="cpu", weights_only=True
                )
    except DAMAGE as error:
        raise DamageError(str(error).splitlines()[0]) from None
    return manifest["metadata"], states


def checkpoint_paths(directory):
    """The checkpoints in a directory, the newest first."""
    return sorted(directory.glob("checkpoint-*"), reverse=True)


def newest_whole_checkpoint(paths, check=None):
    """The path, the metadata and the states of the first of `paths` that is whole.

    One line for each that is damaged; `UserError` if none is left.

    Args:
        paths: in the order in which they are tried.
        check: a function of the states that raises `DamageError`.
    """
    for path in paths:
        try:
            metadata, states = read_checkpoint(path)
            if check:
                check(states)
            return path, metadata, states
        except DamageError as error:
            print(f"checkpoint {path} cannot be used ({error}): trying the one before")
    tried = f"none of {', '.join(str(path) for path in paths)}" if paths else "no checkpoint"
    raise UserError(
        f"{tried} can be loaded: restore one from a backup, or start anew with another name=..."
    )
