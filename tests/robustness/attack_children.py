"""Starts of `python dreamer.py` as forks of a process that has everything imported.

An import takes seconds, a fork none: thousands of starts can be tried.
"""

import hashlib
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import gymnasium  # noqa: F401  (imported here, so that no child has to)
import matplotlib.figure  # noqa: F401
import moviepy  # noqa: F401
import torch
import wandb  # noqa: F401
from hydra.core.global_hydra import GlobalHydra

import common.opengl
import dreamer
import dreamer_utils as utils
from common.signals import STOP_SIGNALS
from fingerprint import fingerprint

HUNG = "it did not end"


def prepare():
    """What a process does before its first fork."""
    torch.set_num_threads(1)
    utils.register_configs()
    common.opengl.prepare_gl(from_pixels=False)


def probe_once():
    """Chooses OpenGL here: no child spends a second on it."""
    common.opengl.select_gl()
    common.opengl.select_gl = lambda: None


class Child:
    """`python dreamer.py WORDS` in a process group of its own.

    Args:
        words: of the command line.
        log: file for all that it says.
        env: environment variables; None takes one away.
        fault: called in the child before it starts.
    """

    def __init__(self, words, log, env=None, fault=None):
        self.log = Path(log)
        self.pid = os.fork()
        if self.pid == 0:
            self.become(words, env or {}, fault)

    def become(self, words, env, fault):
        """What `python dreamer.py` does, up to its exit code."""
        os.setsid()
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        for name, value in env.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv = ["dreamer.py", *words]
        os.environ["HYDRA_MAIN_MODULE"] = "__main__"  # as if dreamer.py had been typed
        GlobalHydra.instance().clear()
        for number in STOP_SIGNALS:  # the attack itself may ignore some, under nohup
            signal.signal(number, signal.SIG_DFL)
        code = 0
        try:
            if fault:
                fault()
            dreamer.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def signal(self, number):
        """Sends a signal to the whole group, as clusters do."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            os.kill(self.pid, number)  # it has not made its group yet

    def wait(self, seconds=120):
        """(exit code, minus the signal that ended it, or None if it hung; what it said)."""
        end, done = time.monotonic() + seconds, 0
        while not done and time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0.005)
        if not done:
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        said = self.log.read_text(errors="replace")
        return (os.waitstatus_to_exitcode(status), said) if done else (None, said + HUNG)


def run(words, log, env=None, fault=None):
    """The exit code and the words of a start that nobody disturbs."""
    return Child(words, log, env, fault).wait()


def snapshot(directory):
    """{path: digest} of all files below a directory."""
    directory = Path(directory)
    files = (path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def one_sentence(code, said):
    """Whether a start ended as a user's mistake should."""
    lines = said.partition("resource_tracker.py")[0].splitlines()  # of the fork, at its end
    errors = [number for number, line in enumerate(lines, 1) if line.startswith("error: ")]
    return code == 1 and len(errors) == 1 and len(lines) - errors[0] <= 1


class Counts:
    """Cases, and what went wrong in them; each problem is printed as it is found."""

    KINDS = "runs destroyed", "mismatches", "tracebacks", "wrong sentences", "code run"

    def __init__(self):
        self.cases, self.problems = Counter(), Counter()

    def problem(self, kind, case, said=""):
        """Counts and shows a problem."""
        assert kind in self.KINDS
        self.problems[kind] += 1
        print(f"PROBLEM {kind}: {case}\n    " + "\n    ".join(said.strip().splitlines()[-12:]))
        sys.stdout.flush()

    def check_words(self, case, said):
        """Whether a start printed no traceback and came to an end."""
        if "Traceback" in said:
            self.problem("tracebacks", case, said)
        elif said.endswith(HUNG):
            self.problem("wrong sentences", case, said)
        else:
            return True
        return False

    def check_end(self, case, words, log, wanted, run_dir):
        """Starts again, undisturbed: the run must end with the bits that are wanted."""
        code, said = run(words, log)
        if not self.check_words(case, said):
            return
        if code != 0:
            self.problem("runs destroyed", case, said)
        elif fingerprint(run_dir) != wanted:
            self.problem("mismatches", f"{case}: {difference(run_dir, wanted)}", said)


def difference(run_dir, wanted):
    """The parts of a run that are not as wanted."""
    found = fingerprint(run_dir)
    return ", ".join(key for key in wanted | found if wanted.get(key) != found.get(key))
