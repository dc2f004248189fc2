"""Kills training with SIGKILL again and again; test_kills.py runs it, or by hand, from the root:

    PYTHONPATH=.:tests python tests/robustness/kill_runs.py DIRECTORY KILLS SEED [KIND]

Every attempt is a fork of this process, which has everything imported. In turn, an attempt is
killed at a random moment, in the middle of a checkpoint, and in the middle of an episode's rows.
Whenever a run comes to its end, it is compared with one that was left alone, and the next one
starts. The last line is a JSON object with the counts.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
import zipfile
from pathlib import Path

import common.opengl
import dreamer
from common.replay import ReplayBuffer
from fingerprint import fingerprint
from small_runs import SMALL, configure

# Phases cut episodes, and the replay overwrites its oldest rows.
FLAGS = """
name=one collector.total_steps=480 collector.train_every=30
checkpoint.every=30 replay_buffer.capacity=200 optimization.train_ratio=0.05 eval.every=160
""".split()
CHEETAH = "env.backend=gymnasium env.name=HalfCheetah-v5 env.task= env.from_pixels=true"
KINDS = {
    "pixels": ["env.from_pixels=true"],
    "states": ["replay_buffer.capacity=1000"],
    "full ring": ["replay_buffer.capacity=81"],
    "two copies": ["env.n_parallel_envs=2", "collector.random_steps=120"],
    "float16": ["optimization.autocast=float16"],
    "gymnasium pixels": [*CHEETAH.split(), "collector.total_steps=240"],
}
MODES = "random", "save", "episode"


def stop_in(mode, pipe, number):
    """Makes this process say so and wait at the `number`-th chance, in the middle of a write."""
    chances = 0

    def chance():
        nonlocal chances
        chances += 1
        if chances == number:
            os.write(pipe, b"x")
            time.sleep(60)

    if mode == "save":
        replace, add = os.replace, zipfile.ZipFile.write

        def slow_replace(*args, **kwargs):
            chance()
            replace(*args, **kwargs)
            chance()

        def slow_add(*args, **kwargs):
            chance()
            add(*args, **kwargs)

        os.replace, zipfile.ZipFile.write = slow_replace, slow_add
    if mode == "episode":
        extend = ReplayBuffer.extend

        def slow_extend(buffer, rows):
            half = len(rows) // 2
            cursor = buffer.writer.state_dict()["_cursor"]
            files = buffer.storage._storage
            files[[(cursor + i) % len(files) for i in range(half)]] = rows[:half]
            chance()
            extend(buffer, rows)
            chance()

        ReplayBuffer.extend = slow_extend


def attempt(run_dir, mode, generator, flags):
    """Starts or goes on with a run; "killed", or at its own end "finished" or "failed"."""
    number, delay = generator.randint(1, 12), generator.uniform(0.5, 3)
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        os.close(reader)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            stop_in(mode, writer, number)
            try:
                dreamer.train(configure(*SMALL, *FLAGS, *flags, f"run_dir={run_dir}"))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
        os._exit(0)
    os.close(writer)
    select.select([reader], [], [], delay if mode == "random" else 60)  # or the pipe's end
    os.close(reader)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # the copies of the environment
    if not os.WIFEXITED(status):
        return "killed"
    return "failed" if os.WEXITSTATUS(status) else "finished"


def count(directory, kills, seed, kind="pixels"):
    """{mode: kills, and what became of the runs} of one kind of run."""
    generator, flags = random.Random(seed), KINDS[kind]
    done = {mode: 0 for mode in MODES} | {"finished": 0, "mismatches": 0, "failed": 0}
    whole = directory / "whole"
    assert attempt(whole, "none", generator, flags) == "finished"
    wanted, runs = fingerprint(whole), 0
    while sum(done[mode] for mode in MODES) < kills or not runs:
        killed = sum(done[mode] for mode in MODES)
        mode = MODES[killed % 3] if killed < kills else "none"
        run = directory / f"run{runs}"
        outcome = attempt(run, mode, generator, flags)
        if outcome == "killed":
            done[mode] += 1
            continue
        runs += 1
        done[outcome] += 1
        done["mismatches"] += outcome == "finished" and fingerprint(run) != wanted
    return done


def main(directory, kills, seed, kind="pixels"):
    """Prints the counts; exit code 1 if an attempt failed."""
    common.opengl.select_gl()
    common.opengl.select_gl = lambda: None  # a second for each attempt, to no other end
    done = count(Path(directory), kills, seed, kind)
    print(json.dumps(done))
    return 1 if done["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
