"""Faults that a person can mend, each said in one plain sentence."""

import errno


class UserError(Exception):
    """A mistake that one sentence explains and the user can mend; shown without a traceback."""


def first_line(error):
    """What an error says in one line; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class DamageError(Exception):
    """A checkpoint or its replay is not what was saved."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
)


SHARED_MEMORY = "/dev/shm"


def can_be_mended(error):
    """Whether it is a `UserError`, or a disk that is full, read-only, forbidden or failing."""
    return isinstance(error, UserError) or getattr(error, "errno", None) in DISK_ERRORS


def user_message(error):
    """One sentence about an error that the user can mend.

    Any other error is raised again, for it may be ours.
    """
    if not can_be_mended(error):
        raise error
    if isinstance(error, UserError):
        return str(error)
    place = error.filename or "while writing to run_dir"
    if str(place).startswith(SHARED_MEMORY):
        return (
            f"{error.strerror} ({place}): processes share memory in {SHARED_MEMORY}, make it"
            " writable (chmod 1777) and large enough (docker run --shm-size=1g)"
        )
    remedy = "free some space, or " if error.errno in FULL else ""
    return (
        f"{error.strerror or error} ({place}): {remedy}choose another run_dir;"
        " what was saved stays, the same command goes on"
    )
