"""Disks that are full, read-only or not there, and sizes that cannot be: one sentence each."""

import contextlib
import errno
import fcntl
import multiprocessing.heap
import os
import resource
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

import common.run
import dreamer
import dreamer_utils as utils
from common.checkpoint import full_disks
from common.video import write_film
from fingerprint import fingerprint
from small_runs import ROOT, SMALL, before_phase, configure, small

SHORT = ["collector.total_steps=160", "checkpoint.every=40", "eval.every=0", "name=one"]
# 150 of 240 steps fit into the replay.
RING = [
    "collector.train_every=30",
    "checkpoint.every=30",
    "replay_buffer.capacity=150",
    "eval.every=0",
    "name=one",
]


class SmallDisk:
    """A disk of 16 MB that can be filled, freed and made read-only.

    Where nothing may be mounted, it is a directory, and a limit on the size of files fills it.
    """

    def __init__(self, path):
        self.path, self.ballast = path, path / "ballast"
        path.mkdir()
        self.mounted = self.mount("-t", "tmpfs", "-o", "size=16m", "tmpfs")
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def mount(self, *words):
        """Whether `mount` did it."""
        return subprocess.run(["mount", *words, self.path], capture_output=True).returncode == 0

    def fill(self, left):
        """Leaves so many bytes."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, self.limits[1]))
            return
        with self.ballast.open("wb") as file:
            with contextlib.suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(4096))
            file.truncate(file.tell() - left)

    def free(self):
        """Gives the space back."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        self.ballast.unlink(missing_ok=True)

    def make_read_only(self):
        """From now on nothing can be written."""
        assert self.mount("--bind", self.path) and self.mount("-o", "remount,bind,ro")

    def remove(self):
        """Ends it."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        while self.path.is_mount():
            subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.remove()


@pytest.fixture
def mounted(disk):
    """The same, but a disk: root may write wherever a mode forbids it, and size is a disk's."""
    if not disk.mounted:
        pytest.skip("mounting is not permitted here")
    return disk


def refused(run_dir, *overrides):
    """The one sentence that a start ends with; anything else is a traceback."""
    with pytest.raises((utils.UserError, OSError)) as caught:
        small(run_dir, *overrides)
    sentence = utils.user_message(caught.value)
    assert "\n" not in sentence
    return sentence


def contents(directory):
    """{path: bytes} of all files below."""
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


# Shared memory


def test_shared_memory_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    def forbidden(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "/dev/shm/pym-1")

    monkeypatch.setattr(multiprocessing.heap.Arena, "__init__", forbidden)
    # The one of this process may still have room.
    monkeypatch.setattr(multiprocessing.heap.BufferWrapper, "_heap", multiprocessing.heap.Heap())
    sentence = refused(tmp_path / "run", *SHORT)
    assert "(/dev/shm/pym-1)" in sentence and "chmod 1777" in sentence
    assert not (tmp_path / "run").exists()
    cfg = configure(*SMALL, *SHORT, f"run_dir={tmp_path / 'run'}")
    assert not utils.Doctor(cfg, utils.make_env, dreamer.train).examine()
    assert f"problem speed      {sentence}" in capsys.readouterr().out


# Full


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_checkpoint_on_a_full_disk_leaves_those_before(disk, tmp_path, monkeypatch, share):
    """Also if only half of it fits, where PyTorch's writer raises an error of its own."""
    small(tmp_path / "whole", *SHORT)
    run = disk.path / "run"
    before = {}

    def fill():
        before.update(contents(run / "checkpoints"))
        disk.fill(int(share * len(max(before.values(), key=len))))

    original = common.run.save_checkpoint
    saves = []

    def save_checkpoint(*args):
        saves.append(None)
        if len(saves) == 3:
            fill()
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "save_checkpoint", save_checkpoint)
        sentence = refused(run, *SHORT)
    assert "the checkpoint of step" in sentence and "free some space" in sentence
    assert contents(run / "checkpoints") == before and len(before) == 2
    disk.free()
    small(run, *SHORT)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("word", ["inline_container.cc:858", "basic_ios::clear: iostream error"])
def test_both_words_of_the_writer_for_a_full_disk_are_understood(word):
    with pytest.raises(utils.UserError, match="took only a part"):
        with full_disks("the checkpoint could not be written", "free some space"):
            raise RuntimeError(word)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        with full_disks("the checkpoint could not be written", "free some space"):
            raise RuntimeError("a mistake of ours")


def test_rows_that_a_full_ring_overwrites_are_kept_first_or_the_run_ends(disk, tmp_path):
    small(tmp_path / "whole", *RING)
    run = disk.path / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_phase(patch, 7, lambda collector: disk.fill(0))
        sentence = refused(run, *RING)
    assert "free some space" in sentence and "undo" in sentence
    assert not list((run / "replay" / "undo").glob(".*")), "a part that takes room"
    disk.free()
    small(run, *RING)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


def test_a_batch_that_does_not_fit_does_not_hide_what_went_wrong(disk, monkeypatch):
    original, count = utils.Optimizer.backward, 0

    def backward(self, loss, retain_graph=False):
        nonlocal count
        original(self, loss, retain_graph)
        count += 1
        if count == 9:  # three losses an update
            self.parameters[0].grad[0] = float("nan")
            disk.fill(0)

    monkeypatch.setattr(utils.Optimizer, "backward", backward)
    run = disk.path / "run"
    sentence = refused(run, *SHORT)
    assert "grad_norm is not finite in update 3: its batch could not be kept (" in sentence
    assert "lower the learning rates" in sentence
    assert not list(run.glob("*not_finite*")) and not list(run.glob(".*"))


def frames():
    """Noise, which no encoder makes small."""
    return torch.randint(0, 256, (60, 128, 128, 3), dtype=torch.uint8)


@pytest.mark.parametrize("left", [0, 40_000])
def test_a_cut_film_is_never_taken_for_a_whole_one(disk, left):
    whole, cut = disk.path / "whole.mp4", disk.path / "cut.mp4"
    write_film(whole, frames, 20)
    before = whole.read_bytes()
    assert len(before) > 2 * left
    disk.fill(left)
    for path in (cut, whole):
        with pytest.raises(utils.UserError, match="could not be written .* its disk has space"):
            write_film(path, frames, 20)
    disk.free()
    assert whole.read_bytes() == before and sorted(disk.path.iterdir()) == [whole]


def test_a_replay_that_does_not_fit_is_refused_before_anything_is_written(mounted):
    sentence = refused(
        mounted.path / "run", "env.from_pixels=true", "collector.total_steps=200000"
    )
    assert "lower replay_buffer.capacity" in sentence or "free some space" in sentence
    assert list(mounted.path.iterdir()) == []


# Read-only, or not a directory


def test_a_read_only_disk_is_one_sentence(mounted):
    small(mounted.path / "old", *SHORT)
    before = contents(mounted.path)
    mounted.make_read_only()
    for name in ("new", "old"):
        sentence = refused(mounted.path / name, *SHORT)
        assert "ead-only file system" in sentence and "choose another run_dir" in sentence
        assert "free some space" not in sentence
    assert contents(mounted.path) == before


@pytest.mark.parametrize("below", [[], ["run"]])
def test_a_run_dir_that_is_a_file_stays_what_it_is(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    sentence = refused(file.joinpath(*below))
    assert "choose another run_dir" in sentence and str(file) in sentence
    assert contents(tmp_path) == {file: b"mine"}
    assert list(tmp_path.iterdir()) == [file], "a lock was left"


def test_a_run_dir_below_proc_is_one_sentence():
    assert "choose another run_dir" in refused("/proc/run")
    assert "choose another run_dir" in refused("/proc/self/run")


def test_a_temporary_directory_that_is_missing_is_no_reason_to_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    small(tmp_path / "run", *SHORT, "logger.mode=offline")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_no_lock_is_left(tmp_path, monkeypatch, number):
    def fail(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    sentence = refused(tmp_path / "run")
    assert "cannot lock files" in sentence and "checkpoint.lock=false" in sentence
    assert "in use" not in sentence and list(tmp_path.iterdir()) == []


# The configuration of a run


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: text[:-3] + b"\x00\xff\xfe",
        lambda text: b"[]\n",
        lambda text: b"3\n",
        lambda text: b"\t" + text,
        lambda text: text.replace(b"env:", b"env: ]"),
        lambda text: text.replace(b"env:\n", b"env: 3\nother:\n"),
        lambda text: text.replace(b"seed: 0", b"seed: ${nothing}"),
        lambda text: text.replace(b"seed: 0", b"seed: !!python/object/apply:os.abort []"),
        lambda text: text.replace(b"seed: 0", b"seed: ???"),
        lambda text: text.replace(b"seed: 0", b"0: 1"),
    ],
    ids="empty half bytes list number tab bracket section reference code missing key".split(),
)
def test_a_damaged_config_is_one_sentence_and_nothing_is_touched(finished, damage):
    path = finished / "config.yaml"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    before = contents(finished)
    try:
        sentence = refused(finished, *SHORT)
        assert "config.yaml is damaged (" in sentence or "holds a run with" in sentence
        assert contents(finished) == before
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    small(run, *SHORT)
    return run


# What cannot be, seen before anything is written


@pytest.mark.parametrize(
    "override, words",
    [
        ("networks.hidden_dim=10000000", "lower networks.* or replay_buffer.batch_size"),
        ("networks.belief_dim=10000000", "lower networks.* or replay_buffer.batch_size"),
        ("networks.state_dim=1000000000000", "lower networks.* or replay_buffer.batch_size"),
        ("env.from_pixels=true networks.channels=1000000", "lower networks.*"),
        ("replay_buffer.batch_size=80000000000", "lower networks.*"),
        ("optimization.horizon=100000000000", "lower"),
        (
            "collector.total_steps=1000000000000000 replay_buffer.capacity=1000000000000000",
            "lower",
        ),
        ("device=meta", "device=meta: choose auto, cpu, cuda or cuda:N"),
        ("device=''", "device=: "),
        ("env.backend=gymnasium env.name=Pendulum-v1 env.task='' env.from_pixels=true", "pygame"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    tmp_path, monkeypatch, override, words
):
    monkeypatch.setitem(sys.modules, "pygame", None)
    sentence = refused(tmp_path / "run", *override.split())
    assert words in sentence and "free some space" not in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "override, words",
    [
        ("seed=4294967296", "seed=4294967296: it should be less than 4294967296"),
        ("name=''", "name=: it should not be empty"),
        ("run_dir=''", "run_dir=: it should not be empty"),
        ("+foo=1", "foo: there is no such key"),
        ("checkpoint.overwrite=true", "does nothing without checkpoint.resume=false"),
        ("logger.project=a/b", "logger.project=a/b: it should"),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused(override, words):
    with pytest.raises(utils.UserError) as caught:
        configure(*SMALL, override)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_doctor_finds_a_read_only_directory(mounted, capsys):
    """Also where the directory itself is the disk, and the one above can be written."""
    mounted.make_read_only()
    for run_dir in (mounted.path, mounted.path / "run"):
        cfg = configure(*SMALL, *SHORT, f"run_dir={run_dir}")
        assert not utils.Doctor(cfg, utils.make_env, dreamer.train).examine()
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "run_dir " in line]
        assert line.startswith("problem") and "ead-only file system" in line


# The replay on another disk, or only for the time of the run


def test_the_replay_may_lie_in_another_directory(tmp_path):
    small(tmp_path / "whole", *SHORT)
    small(tmp_path / "whole", *SHORT, "collector.total_steps=240")
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    there = f"replay_buffer.directory={elsewhere}"
    small(run, *SHORT, there)
    assert (run / "replay").resolve() == elsewhere / "run"
    assert (elsewhere / "run" / "observation.memmap").stat().st_size > 0
    small(run, *SHORT, there, "collector.total_steps=200")
    small(run, *SHORT, "collector.total_steps=240")
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    sentence = refused(run, *SHORT, f"replay_buffer.directory={tmp_path / 'third'}")
    assert f"the replay of this run is in {elsewhere / 'run'}" in sentence
    before = contents(elsewhere)
    small(tmp_path / "other" / "run", *SHORT, there)  # of the same name: nothing is shared
    assert (tmp_path / "other" / "run" / "replay").resolve() == elsewhere / "run.2"
    assert {path: before[path] for path in before} == contents(elsewhere / "run")


def test_a_start_that_fails_leaves_nothing_in_the_other_directory(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"

    def fail(*args):
        raise utils.UserError("no evaluation today")

    monkeypatch.setattr(dreamer, "make_evaluation", fail)
    sentence = refused(tmp_path / "run", *SHORT, f"replay_buffer.directory={elsewhere}")
    assert sentence == "no evaluation today"
    assert not (tmp_path / "run").exists() and list(elsewhere.iterdir()) == []


def test_a_replay_that_is_not_kept_is_deleted_when_the_run_has_ended(tmp_path, monkeypatch, capfd):
    small(tmp_path / "whole", *SHORT)
    run = tmp_path / "run"
    weights, _ = small(run, *SHORT, "replay_buffer.keep=false")
    assert "go on:" not in capfd.readouterr().out.rsplit("finished at", 1)[1]
    assert [path.name for path in (run / "replay").rglob("*") if path.is_file()] == ["deleted.txt"]
    files = contents(run)
    sentence = refused(run, *SHORT, "collector.total_steps=400")
    assert "its replay was deleted" in sentence and contents(run) == files
    words = [f"eval.checkpoint={run}", "eval.episodes=1", "device=cpu", "logger.mode=disabled"]
    cfg = configure(*words)
    utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation)
    parts = fingerprint(tmp_path / "whole")
    assert {name: parts[name] for name in fingerprint(run)} == fingerprint(run)


def test_a_replay_that_is_not_kept_is_there_until_the_run_has_ended(tmp_path):
    small(tmp_path / "whole", *SHORT)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_IN_THE_MIDDLE, str(tmp_path / "run"), *SHORT],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ".:tests"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert list((tmp_path / "run" / "replay").glob("*.memmap"))
    small(tmp_path / "run", *SHORT, "replay_buffer.keep=false")
    assert not list((tmp_path / "run" / "replay").glob("*.memmap"))
    parts = fingerprint(tmp_path / "whole")
    assert {n: parts[n] for n in fingerprint(tmp_path / "run")} == fingerprint(tmp_path / "run")


STOPPED_IN_THE_MIDDLE = """
import os, signal, sys
from small_runs import before_phase, small
import pytest
before_phase(pytest.MonkeyPatch(), 3, lambda collector: os.kill(os.getpid(), signal.SIGTERM))
small(sys.argv[1], *sys.argv[2:], "replay_buffer.keep=false")
"""
