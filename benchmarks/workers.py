"""Processes that take turns, and what their seconds say.

Every variant is a process of its own, because allocator settings are process-wide, and stays
alive. Variants take turns, A B C A B C ..., so that a drift of the machine hits all alike; a ratio
is the median of the ratios within one round.

Nothing heavy is imported here: the memory of a process that starts another counts in the peak
memory of that one.
"""

import contextlib
import ctypes
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
import traceback
from contextlib import nullcontext
from multiprocessing import forkserver
from pathlib import Path

PRELOADED = ("measure_updates", "measure_experience")
WARM_UP = 3  # unmeasured turns: the second may still compile


def preloaded_context():
    """Processes that are forked from one that has imported everything, and runs no thread."""
    # That one is told where to import from by its environment alone (Python 3.11).
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with deaf_to_ctrl_c():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def deaf_to_ctrl_c():
    """Processes that start in here, and what they fork, never hear Ctrl-C: it is for this one.

    Neither does this one meanwhile: do not wait in here.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Worker:
    """A process that runs `build(**kwargs)` once, and what that returns at each turn.

    What it returns takes the number of repeats, and gives a dict: `seconds` per repeat and
    anything else worth keeping.

    Args:
        name: of the variant.
        build: a function at the top of a module.
        context: of `multiprocessing`; without one, that of `preloaded_context`.
        daemon: ends with this process, whatever happens, and can start none itself.
    """

    def __init__(self, name, build, context=None, daemon=True, **kwargs):
        context = context or preloaded_context()
        self.name, self.failed = name, None
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, build, kwargs)
        self.process = context.Process(target=serve, args=arguments, daemon=daemon)
        with deaf_to_ctrl_c() if context.get_start_method() == "spawn" else nullcontext():
            self.process.start()
        theirs.close()

    def receive(self):
        """The worker's next answer, or None if it has failed, with the reason on the screen."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            answer = {"failed": f"its process ended with exit code {self.process.exitcode}"}
        if "failed" in answer:
            self.failed = answer["failed"]
            print(f"  {self.name} failed: {self.failed}", flush=True)
        return None if self.failed else answer

    def turn(self, repeats, lean=False):
        """One turn, see `serve`."""
        with contextlib.suppress(OSError):
            self.pipe.send((repeats, lean))
        return self.receive()

    def close(self):
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.process.kill()


def serve(pipe, build, kwargs):
    """The worker's side. A `lean` turn warms up first, and gives free memory back afterwards."""
    try:
        measure = build(**kwargs)
        pipe.send({})
        for repeats, lean in iter(pipe.recv, None):
            if lean:
                measure(1)
            pipe.send(measure(repeats))
            if lean and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)
    except (EOFError, ConnectionError):
        return  # that process has ended
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


def take_turns(workers, rounds, enough=0.5, most=20, lean=False, until=math.inf):
    """Lets the workers take turns, and ends them.

    After the unmeasured turns each worker repeats its subject so that a turn lasts `enough`
    seconds, `most` times at most. No round begins after `until`, in seconds of `time.monotonic`,
    but the first.

    Returns:
        {name: [answer per round]}, without those that failed.
    """
    for worker in workers:
        worker.receive()
    repeats = {worker.name: 1 for worker in workers}
    answers = {worker.name: [] for worker in workers}
    for turn in range(-WARM_UP, rounds):
        if turn > 0 and time.monotonic() > until:
            break
        for worker in workers:
            if worker.failed:
                continue
            answer = worker.turn(repeats[worker.name], lean)
            if answer is None:
                continue
            if turn < 0:
                wanted = math.ceil(enough / answer["seconds"])
                repeats[worker.name] = min(max(wanted, 1), most)
            else:
                answers[worker.name].append(answer)
    for worker in workers:
        worker.close()
    return {worker.name: answers[worker.name] for worker in workers if not worker.failed}


def run_until_stopped(main):
    """Runs a script's `main`; after Ctrl-C it ends the workers and says so."""
    try:
        main()
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.kill()
        raise SystemExit("stopped: nothing was written") from None


def summarize(answers):
    """The row of one variant: statistics of its seconds, medians of its phases, largest `gib`."""
    seconds = [answer["seconds"] for answer in answers]
    row = {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "runs": len(seconds),
        "seconds": seconds,
    }
    if "phases" in answers[0]:
        row["phases"] = {
            name: statistics.median(answer["phases"][name] for answer in answers)
            for name in answers[0]["phases"]
        }
    if "gib" in answers[0]:
        row["gib"] = max(answer["gib"] for answer in answers)
    return row


def times_faster(row, other):
    """How many times faster `row` is than `other`: median of the ratios within a round."""
    pairs = zip(row["seconds"], other["seconds"], strict=True)
    return statistics.median(theirs / own for own, theirs in pairs)


def available_gib():
    """Free memory of the machine, as far as the system says."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) / 2**20
    return math.inf
