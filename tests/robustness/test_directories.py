"""The directory of a run belongs to one process, and steps may be lowered and raised again."""

import errno
import fcntl
import time

import pytest

from common.errors import UserError
from common.lock import DirectoryLock
from fingerprint import fingerprint
from small_runs import SMALL, small, start

LONG = ["collector.total_steps=1200", "optimization.train_ratio=0.1", "name=one"]


def start_long(run_dir):
    """A training process of its own, through the command line."""
    return start("dreamer.py", *SMALL, f"run_dir={run_dir}", *LONG)


@pytest.fixture(scope="module")
def whole_long(tmp_path_factory):
    """The fingerprint of the long run, undisturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    small(run, *LONG)
    return fingerprint(run)


@pytest.mark.parametrize("gap", [0, 0.5, 1, 2.5])
def test_of_two_starts_one_trains_and_the_other_is_refused(tmp_path, whole_long, gap):
    run = tmp_path / "run"
    first = start_long(run)
    time.sleep(gap)
    second = start_long(run)
    ends = [process.communicate(timeout=120) for process in (first, second)]
    codes = [process.returncode for process in (first, second)]
    said = [out + error for out, error in ends]
    assert sorted(codes) == [0, 1], said
    assert "in use by another process" in said[codes.index(1)]
    assert "Traceback" not in "".join(said)
    assert fingerprint(run) == whole_long
    assert list(tmp_path.iterdir()) == [run]


def test_a_running_directory_is_never_set_aside(tmp_path, whole_long):
    run = tmp_path / "run"
    process = start_long(run)
    end = time.monotonic() + 60
    while not (run / "config.yaml").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    with pytest.raises(UserError, match="in use by another process"):
        small(run, "name=one", "checkpoint.resume=false", "checkpoint.overwrite=true")
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert fingerprint(run) == whole_long


def test_steps_may_be_lowered_and_raised_again(tmp_path, capsys):
    run, flags = tmp_path / "run", ["eval.every=0", "name=one"]
    small(run, *flags, "collector.total_steps=320")
    before = fingerprint(run)
    rows = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    small(run, *flags, "collector.total_steps=160")
    assert "cannot be used" not in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == rows
    small(run, *flags, "collector.total_steps=320")
    assert fingerprint(run) == before
    small(run, *flags, "collector.total_steps=400")
    small(tmp_path / "whole", *flags, "collector.total_steps=320")
    small(tmp_path / "whole", *flags, "collector.total_steps=400")
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_called_that(tmp_path, monkeypatch, number):
    def fail(file, operation):
        raise OSError(number, "not here")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match="cannot lock files .*checkpoint.lock=false"):
        small(tmp_path / "run")
    assert list(tmp_path.glob("run*")) == []
    small(tmp_path / "run", "checkpoint.lock=false")
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_lock_that_was_deleted_meanwhile_is_not_held(tmp_path, monkeypatch):
    """Between opening and locking, its holder deletes the file: the next one counts."""
    lock, original, deleted = DirectoryLock(tmp_path / "run"), fcntl.flock, []

    def delete_first(file, operation):
        if not deleted:
            lock.path.unlink()
            deleted.append(True)
        original(file, operation)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    lock.take()
    other = DirectoryLock(tmp_path / "run")
    with pytest.raises(UserError, match="in use"):
        other.take()
    lock.release()
    other.take()
    other.release()
    assert list(tmp_path.iterdir()) == []
