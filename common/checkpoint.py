"""Checkpoints: one checksummed file each, complete or absent, and read without running code.

TorchRL writes them (manifest, rotation, atomic rename). Reading is ours, because TorchRL's falls
back to a pickle where a file is missing, and a pickle from a stranger runs code.
"""

import contextlib
import io
import os
import pickle
import zipfile
import zlib

import torch

from common.errors import DamageError, UserError, first_line
from common.opengl import no_opengl

with no_opengl():
    from torchrl.checkpoint import (
        Checkpoint,
        CheckpointRotation,
        GlobalRNGState,
        StateDictCheckpointAdapter,
    )

# All that a damaged archive can lead to.
DAMAGE = (
    DamageError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    RuntimeError,
    TypeError,
    AttributeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)


# PyTorch's writer says so when it meets a full disk; other RuntimeErrors are mistakes here.
WRITER = ("inline_container", "iostream error")


def save_checkpoint(directory, keep, step, metadata, parts):
    """Writes the state of `parts` aside, then renames it; older ones than `keep` are deleted.

    Args:
        directory: of the checkpoints.
        parts: {name: an object with `state_dict`}.
    Returns:
        the metadata of all checkpoints that are kept.
    """
    checkpoint = make_archive(parts)
    rotation = CheckpointRotation(directory, keep_last=keep)
    remedy = "free some space; the same command then goes on from the one before"
    with full_disks(f"the checkpoint of step {step} could not be written to {directory}", remedy):
        check_written(rotation.save(checkpoint, step=step, metadata=metadata))
    return [Checkpoint.manifest(path)["metadata"] for path in rotation.checkpoints()]


def make_archive(parts):
    """TorchRL's writer of one file with the states of `parts`."""
    checkpoint = Checkpoint(format="archive")
    for name, part in parts.items():
        checkpoint.register(name, part, adapter=StateDictCheckpointAdapter("torch"))
    return checkpoint


def check_written(path):
    """Sees to it that a file is on the disk, and is what was written."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        os.fsync(file.fileno())
        if archive.testzip():
            raise OSError(5, "what was read back is not what was written")


@contextlib.contextmanager
def full_disks(what, remedy):
    """`UserError` "WHAT (reason): REMEDY" for what a disk does to the writer of an archive."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in WRITER):
            raise
        reason = getattr(error, "strerror", None) or "the disk took only a part of it"
        raise UserError(f"{what} ({reason}): {remedy}") from None


def read_checkpoint(path, names=None):
    """The metadata of a checkpoint, and {name: state} of its parts, or of those named.

    Raises:
        DamageError: the file is not what was saved, or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive.infolist())
            if broken := archive.testzip():
                raise DamageError(f"{broken} is damaged")
            manifest = Checkpoint.manifest(path)
            records = manifest["components"]
            states = {}
            for name in records if names is None else names:
                content = archive.read(f"{records[name]['path']}/state.pt")
                states[name] = load_tensors(io.BytesIO(content))
    except DAMAGE as error:
        raise DamageError(first_line(error)) from None
    return check_metadata(manifest.get("metadata")), states


def load_tensors(source):
    """What `torch.save` wrote to a path or a file in memory, on the CPU; runs no code.

    Raises:
        DamageError: it is not what was written, or holds more than tensors and numbers.
    """
    try:
        with zipfile.ZipFile(source) as tensors:
            check_members(tensors.infolist())
            if broken := tensors.testzip():
                raise DamageError(f"{broken} is damaged")
        if isinstance(source, io.BytesIO):
            source.seek(0)
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamageError("it holds something else than tensors and numbers") from None
    except DAMAGE as error:
        raise DamageError(first_line(error)) from None


def check_members(members):
    """`DamageError` if a member of an archive is packed: ours are stored, no bomb can hide."""
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise DamageError(f"{member.filename} is compressed, which no checkpoint of ours is")


def check_metadata(metadata):
    """The metadata of a checkpoint, if it has what we write; else `DamageError`."""
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
        raise DamageError("it does not say with which configuration it was made")
    step = metadata.get("step")
    if not isinstance(step, int) or not 0 <= step < 2**60:
        raise DamageError(f"it says that it was made at step {step}")
    return metadata


def load_random_state(state):
    """Takes over the state of all random generators, as far as this machine has them.

    A run that moves to a machine without its GPUs goes on, with other random numbers there.
    """
    gpus = len(state.get("torch_cuda", ()))
    if gpus and gpus != torch.cuda.device_count():
        state = {name: value for name, value in state.items() if name != "torch_cuda"}
        print(
            f"the checkpoint has the random generators of {gpus} GPU(s), this machine has"
            f" {torch.cuda.device_count()}: theirs start anew, the results are no longer the same"
            " to the bit"
        )
    GlobalRNGState().load_state_dict(state)


def checkpoint_paths(directory):
    """The checkpoints in a directory, the newest first; copies by another name are the user's."""
    return sorted(directory.glob("checkpoint-[0-9]*.torchrl"), reverse=True)


def newest_whole_checkpoint(paths, check=None):
    """The path, the metadata and the states of the first of `paths` that is whole.

    One line for each that is damaged; `UserError` if none is left.

    Args:
        paths: in the order in which they are tried.
        check: a function of the states that raises `DamageError`.
    """
    for number, path in enumerate(paths, 1):
        try:
            metadata, states = read_checkpoint(path)
            if check:
                check(states)
            return path, metadata, states
        except DamageError as error:
            then = ": trying the one before" if number < len(paths) else ""
            print(f"checkpoint {path} cannot be used ({error}){then}")
    tried = f"none of {', '.join(str(path) for path in paths)}" if paths else "no checkpoint"
    raise UserError(
        f"{tried} can be loaded: restore one from a backup, or start anew with another name=..."
    )
