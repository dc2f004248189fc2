"""Signals that ask a run to stop: it saves after the current update, and ends."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker

STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGQUIT,
)


def end_at_once_on_ctrl_c():
    """Until there is something to save, Ctrl-C ends the process at once, without a word."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a script's jobs with & ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def children_without_signals():
    """No stop signal ever reaches the processes that are started inside.

    Clusters signal the whole group, and only the process that saves may act. What a thread blocks
    stays blocked in the processes that it starts, from their first instruction on. A second thread
    takes the signals meanwhile, so that this process still ends at once.
    """
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        start_resource_tracker()  # the first of them; it unblocks two signals again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


def start_resource_tracker():
    """Starts multiprocessing's helper, which frees what a killed run leaves, without a warning."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        del os.environ["PYTHONWARNINGS"]
        if before is not None:
            os.environ["PYTHONWARNINGS"] = before


def end_with(parent):
    """On Linux this process ends with `parent`, silently: nobody else asks it for anything."""
    if sys.platform == "linux":
        set_signal_of_parents_death = 1  # its number in prctl.h
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended before
            os._exit(1)
        sys.stderr = LateErrors(sys.stderr)


class LateErrors:
    """The standard error of a process that ends with its parent.

    The parent's pipes close a moment before the kernel ends this process, which would begin to
    complain of them. Whatever it says waits for that moment.
    """

    MOMENT = 0.2  # seconds

    def __init__(self, stream):
        self.stream, self.last = stream, 0.0

    def write(self, text):
        """Writes, after a moment if nothing was written just now."""
        if time.monotonic() - self.last > self.MOMENT:
            time.sleep(self.MOMENT)
        self.last = time.monotonic()
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


class StopSignals:
    """Remembers the first signal; a second Ctrl-C ends the process at once.

    Attributes:
        received: the number of the first signal, or None.
    """

    def __init__(self):
        self.received, self.handlers = None, {}
        # Slurm signals every process of a job, and the helper must outlive what it cleans up.
        with children_without_signals():
            pass  # to start it is enough

    def listen(self):
        """Takes the signals over; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                    self.handlers[number] = signal.signal(number, self.handle)

    def handle(self, number, frame):
        """Says what happens next."""
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = self.received or number
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this update\n".encode())  # print may be busy

    def restore(self):
        """Gives the signals back to those who had them."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def end_process(self):
        """Ends the process as the signal would have; submitit's handler queues the job again."""
        handler = self.handlers[self.received]
        if self.received == signal.SIGUSR2 and callable(handler):
            handler(self.received, None)
        raise SystemExit(128 + self.received)
