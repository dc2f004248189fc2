"""Two starts at once, signals to the whole group, and disks that are really full."""

import json
import random
import shutil
import signal
import subprocess
import time

from attack_children import Child, one_sentence, run
from attack_damage import RING

from fingerprint import fingerprint
from small_runs import SMALL

GAPS = 0, 0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 2.5
LONG = ["optimization.train_ratio=0.2"]  # a run of a few seconds
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT


def whole(folder, words):
    """The bits of an undisturbed run."""
    code, said = run([*SMALL, *words, f"run_dir={folder / 'whole'}"], folder / "said")
    assert code == 0, said
    return fingerprint(folder / "whole")


def attack_double_starts(counts, folder, every):
    """The same command, or one that would set the run aside, at the same time."""
    words = [*RING, *LONG]
    wanted = whole(folder, words)
    anew = ["checkpoint.resume=false", "checkpoint.overwrite=true"]
    pairs = [(gap, []) for gap in GAPS] + [(gap, anew) for gap in GAPS]
    for number, (gap, more) in enumerate(pairs[::every]):
        counts.cases["double starts"] += 1
        place, case = folder / f"run{number}", f"second start after {gap} s {' '.join(more)}"
        given = [*SMALL, *words, f"run_dir={place}"]
        first = Child(given, folder / "first")
        time.sleep(gap)
        second = Child([*given, *more], folder / "second")
        ends = first.wait(), second.wait()
        for code, said in ends:
            refused = one_sentence(code, said) and "in use by another process" in said
            if counts.check_words(case, said) and code != 0 and not refused:
                counts.problem("wrong sentences", f"{case}: exit code {code}", said)
        if all(code for code, _ in ends):
            counts.problem("runs destroyed", f"{case}: none of them ran")
        counts.check_end(case, given, folder / "said", wanted, place)
        for aside in folder.glob(f"run{number}.old*"):  # both ran, one after the other
            if fingerprint(aside) != wanted:
                counts.problem("mismatches", f"{case}: {aside.name}")


def attack_signals(counts, folder, every):
    """Every signal to the whole group of a run with two copies, at random moments."""
    words = [*RING, *LONG, "env.n_parallel_envs=2", "collector.random_steps=120"]
    wanted, generator = whole(folder, words), random.Random(0)
    cases = [(number, wait) for number in SIGNALS for wait in (False, True, True, True)]
    cases = cases if every == 1 else [(signal.SIGTERM, True), (signal.SIGINT, True)]
    for index, (number, saved) in enumerate(cases):
        counts.cases["signals"] += 1
        place = folder / f"run{index}"
        delay = generator.uniform(0, 1.5)
        given = [*SMALL, *words, f"run_dir={place}"]
        child, end = Child(given, folder / "said"), time.monotonic() + 60
        while saved and not (place / "run.json").exists() and time.monotonic() < end:
            time.sleep(0.01)  # then it listens
        time.sleep(delay)
        child.signal(number)
        code, said = child.wait()
        case = f"{number.name} {delay:.2f} s after the {'first save' if saved else 'start'}"
        if counts.check_words(case, said) and code not in (0, 128 + number, -number):
            counts.problem("wrong sentences", f"{case}: exit code {code}", said)
        if saved and code not in (0, 128 + number):
            counts.problem("wrong sentences", f"{case}: not saved, exit code {code}", said)
        counts.check_end(case, given, folder / "said", wanted, place)


def mount(place, kilobytes, again=False):
    """A small disk; False if this is not permitted here."""
    options = f"size={kilobytes}k" + ",remount" * again
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def attack_disks(counts, folder, every):
    """Disks of every size, from one that holds nothing to one that holds all but a film."""
    disk = folder / "disk"
    disk.mkdir()
    if not mount(disk, 1024):
        print("full disks: skipped, for mounting is not permitted here")
        return
    subprocess.run(["umount", str(disk)], check=True)
    pixels = ["env.from_pixels=true", "logger.video=true"]
    for kind, more, sizes in (
        ("states", [], range(4, 2000, 40)),
        ("pixels, films", pixels, range(1000, 8000, 300)),
    ):
        words = [*RING, *more]
        wanted = whole(folder, words)
        for kilobytes in [*sizes][::every]:
            counts.cases["full disks"] += 1
            case = f"{kind} on a disk of {kilobytes} kB"
            assert mount(disk, kilobytes)
            try:
                given = [*SMALL, *words, f"run_dir={disk / 'run'}"]
                code, said = run(given, folder / "said")
                if counts.check_words(case, said) and code and not one_sentence(code, said):
                    counts.problem("wrong sentences", f"{case}: exit code {code}", said)
                check_no_half_files(counts, case, disk / "run")
                assert mount(disk, 100_000, again=True)
                counts.check_end(
                    f"{case}, then more", given, folder / "said", wanted, disk / "run"
                )
            finally:
                subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(folder / "whole")


def check_no_half_files(counts, case, place):
    """Rows are whole, and the card is there only as a whole."""
    for path in place.glob("*.json*"):
        content = path.read_text()
        try:
            rows = content.splitlines() if path.suffix == ".jsonl" else [content]
            for row in rows:
                json.loads(row)
        except ValueError:
            counts.problem("runs destroyed", f"{case}: half a row in {path.name}", content[-200:])
