"""The progress bar: what the run is doing, how far it is, how long the rest takes."""

import time

from tqdm import tqdm

REFRESH_SECONDS = 0.5
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"


def duration(seconds):
    """A duration as a person would say it."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else "a minute"


class Progress:
    """What a run does at the moment, and what its phases have cost since this process began.

    Args:
        cfg: the whole configuration.
        step: environment steps at which this process starts.
        updates: updates at which it starts.
    """

    def __init__(self, cfg, step, updates):
        self.cfg, self.first_step, self.step = cfg, step, step
        self.first_update, self.updates = updates, updates
        self.seconds, self.evaluations, self.last_return = {}, 0, None
        self.phase, self.began = None, 0.0  # what goes on at the moment, and since when
        self.words = ""
        self.shown = 0.0  # when the bar was drawn last
        self.bar = None  # drawn once something happens, below all that is said at the start

    def say(self, sentence):
        """A line above the bar."""
        tqdm.write(sentence)

    def begin(self, phase):
        """`collect`, `update` or `evaluate` begins; without any update so far, it is early."""
        self.phase, self.began = phase, time.monotonic()
        if phase == "evaluate":
            self.describe("evaluation")
        else:
            self.describe("training" if self.updates else "seed episodes")

    def describe(self, words):
        """Says in front of the bar what is happening now."""
        if self.words != words:
            self.words = words
            self.draw()

    def end(self, phase, seconds):
        """Counts what a phase took."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.phase = None
        self.evaluations += phase == "evaluate"

    def count_update(self):
        """An update is done; the bar shows it, for a hundred of them may take minutes."""
        self.updates += 1
        pretrain = self.cfg.optimization.pretrain
        self.describe("training" if self.updates >= pretrain else f"first {pretrain} updates")
        if time.monotonic() - self.shown > REFRESH_SECONDS:
            self.draw()

    def advance(self, step, last_return):
        """The environment is at `step`; `last_return` is of the last training episode, or None."""
        self.step, self.last_return = step, last_return or self.last_return
        self.draw()

    def draw(self):
        """Draws the bar as things are."""
        if not self.cfg.logger.progress:
            return
        if self.bar is None:
            total = self.cfg.collector.total_steps
            self.bar = tqdm(total=total, initial=self.step, bar_format=BAR)
        shown = [f"{self.updates:,} updates"]
        if self.last_return is not None:
            shown.append(f"return {self.last_return:.0f}")
        seconds = self.seconds_to_go()
        if seconds is not None:
            shown.append(f"{duration(seconds)} to go")
        self.bar.n = self.step
        self.bar.set_description_str(self.words, refresh=False)
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.bar.refresh()
        self.shown = time.monotonic()

    def seconds_to_go(self):
        """How long the rest takes at the speed of this process; None before it is known."""
        steps, updates = self.step - self.first_step, self.updates - self.first_update
        if not steps or not updates:
            return None
        collector, hp = self.cfg.collector, self.cfg.optimization
        steps_left = collector.total_steps - self.step
        all_updates = hp.pretrain + hp.train_ratio * (
            collector.total_steps - collector.random_steps
        )
        updates_left = max(all_updates - self.updates, 0)
        seconds = steps_left * self.spent("collect") / steps
        seconds += updates_left * self.spent("update") / updates
        if self.evaluations:
            per_evaluation = self.seconds["evaluate"] / self.evaluations
            seconds += per_evaluation * steps_left / self.cfg.eval.every
        return seconds

    def spent(self, phase):
        """Seconds in a phase so far, with those of the one that goes on."""
        going_on = time.monotonic() - self.began if phase == self.phase else 0.0
        return self.seconds.get(phase, 0.0) + going_on

    def close(self):
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()
