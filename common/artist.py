"""Films and pictures drawn beside training: one that fails never stops a run."""

from concurrent.futures import ThreadPoolExecutor


class Artist:
    """A thread that draws, one thing after the other."""

    def __init__(self):
        self.worker, self.drawings = ThreadPoolExecutor(1), []

    def draw(self, name, path, function, *args):
        """Calls function(path, *args) beside training.

        One that still waits to be drawn gives way to a newer one for the same file.

        Args:
            name: under which the dashboard shows it.
        """
        self.drawings = [row for row in self.drawings if row[1] != path or not row[2].cancel()]
        self.drawings.append((name, path, self.worker.submit(function, path, *args)))

    def collect(self, say, wait=False):
        """{name: path} of all that was drawn since the last call; `say` hears of each failure."""
        done = [row for row in self.drawings if wait or row[2].done()]
        self.drawings = [row for row in self.drawings if row not in done]
        drawn = {}
        for name, path, drawing in done:
            error = drawing.exception()
            if error is None:
                drawn[name] = path
            else:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                say(f"{path.name} could not be drawn ({reason}); training goes on")
        return drawn

    def close(self, hurry=False):
        """Waits for what is being drawn, or leaves it."""
        self.worker.shutdown(wait=not hurry, cancel_futures=True)
