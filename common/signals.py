"""Signals that ask a run to stop: it saves after the current update, and ends."""

import os
import signal
import threading

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """Remembers the first signal; a second Ctrl-C ends the process at once.

    Attributes:
        received: the number of the first signal, or None.
    """

    def __init__(self):
        self.received, self.handlers = None, {}

    def listen(self):
        """Takes the signals over; only the main thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
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
