"""Films and pictures drawn beside training: one that fails never stops a run."""

from concurrent.futures import ThreadPoolExecutor


class Artist:
    """A thread that draws, one thing after the other."""

    def __init__(self):
        self.worker, self.drawings = ThreadPoolExecutor(1), []

    def draw(self, name, path, step, function, *args):
        """Calls function(path, *args) beside training.

        One that still waits to be drawn gives way to a newer one for the same file.

        Args:
            name: under which the dashboard shows it.
            step: environment steps of what it shows.
        """
        self.drawings = [row for row in self.drawings if row[1] != path or not row[3].cancel()]
        self.drawings.append((name, path, step, self.worker.submit(function, path, *args)))

    def collect(self, say, wait=False):
        """[(name, path, step)] of what was drawn since the last call; `say` hears of failures."""
        done = [row for row in self.drawings if wait or row[3].done()]
        self.drawings = [row for row in self.drawings if row not in done]
        drawn = []
        for name, path, step, drawing in done:
            error = drawing.exception()
            if error is None:
                drawn.append((name, path, step))
            else:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                say(f"{path.name} could not be drawn ({reason}); training goes on")
        return drawn

    def close(self, hurry=False):
        """Waits for what is being drawn, or leaves it."""
        self.worker.shutdown(wait=not hurry, cancel_futures=True)
