"""One process at a time: a lock beside the directory of a run, gone when nobody holds it."""

import errno
import fcntl
import os

from common.errors import UserError

WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class DirectoryLock:
    """Held from `take` to `release`, or until the process ends, however it ends.

    It is a file beside the directory: one inside would move along when the directory is renamed,
    and could only be looked at after the directory itself.
    """

    def __init__(self, directory):
        path = directory.absolute()
        self.directory, self.path, self.file = (
            directory,
            path.with_name(f".{path.name}.lock"),
            None,
        )

    def take(self):
        """Locks; `UserError` if another process holds the lock, or files cannot be locked here."""
        while True:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = self.path.open("w")
            except OSError as error:  # said of the directory, which the user has named
                number = errno.ENOTDIR if error.errno == errno.EEXIST else error.errno
                raise OSError(number, os.strerror(number), str(self.directory)) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                if error.errno in WITHOUT_LOCKS:
                    self.path.unlink(missing_ok=True)  # nobody can hold it
                raise UserError(self.refusal(error)) from None
            if self.is_current(file):
                self.file = file
                return
            file.close()  # whoever held it has just deleted it: lock the next one

    def is_current(self, file):
        """Whether the open file is still the one that others would find."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def refusal(self, error):
        """One sentence about a lock that could not be taken."""
        if error.errno in WITHOUT_LOCKS:
            return (
                f"the file system of {self.directory} cannot lock files ({error.strerror}): choose"
                " a run_dir on another one, or, if surely no other process uses this directory,"
                " checkpoint.lock=false"
            )
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return (
                f"{self.directory} is in use by another process: wait for its end, or"
                " choose another name=..."
            )
        return f"{self.path} cannot be locked ({error.strerror}): choose another run_dir"

    def release(self):
        """Lets other processes use the directory."""
        if self.file:
            self.path.unlink(missing_ok=True)  # while it is held, so that no other is deleted
            self.file.close()
            self.file = None
