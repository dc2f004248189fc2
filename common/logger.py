"""One row of metrics at a time: to metrics.jsonl, to wandb, and to a progress bar.

Nothing here changes what is learned. Times go to throughput.jsonl: the other files are the same
to the byte, however often a run was stopped.
"""

import contextlib
import time

import numpy as np
import torch

from common.artist import Artist
from common.checkpoint import checkpoint_paths
from common.dashboard import Dashboard
from common.files import COUNTERS, RowFile, read_jsonl
from common.panel import draw_panel
from common.plots import is_published_setting, published_curve, published_metrics
from common.progress import Progress, duration
from common.video import frames_per_second, write_film

PAPERS_BATCH = 2_500  # frames
FILES = {"metrics": "metrics.jsonl", "times": "throughput.jsonl", "curves": "curves.jsonl"}


def finite_mean(values):
    """The mean of a metric [n]; updates that overflowed in float16 and were skipped do not count.

    None, which JSON can say, if all of them did.
    """
    finite = values.isfinite()
    return values.mean().item() if finite.all() else mean_of(values[finite])


def mean_of(values):
    """The mean, or None of nothing."""
    return values.mean().item() if len(values) else None


class Logger:
    """Collects what happens since the last row, and writes the next one.

    Args:
        cfg: the whole configuration.
        directory: of the run.
        device: on which updates run, for the clock.
        metadata: what a result depends on, for the dashboard.
        step: environment steps at which this process starts.
        updates: updates at which it starts.
        saved: the state of the logger that goes on, or None.
    """

    SAVED = ("update_rows", "episode_rows", "seconds", "last_row", "evaluations", "wandb_id")

    def __init__(self, cfg, directory, device, metadata, step=0, updates=0, saved=None):
        self.cfg, self.directory, self.device = cfg, directory, device
        self.update_rows, self.episode_rows, self.seconds = [], [], {}  # since the last row
        self.evaluation, self.evaluations, self.last_row = None, 0, 0
        self.estimate_due = device.type == "cpu"
        self.files = {key: RowFile(directory / name) for key, name in FILES.items()}
        self.published, self.artist = published_curve(cfg.env), Artist()
        self.played = cfg.as_evaluated().env
        self.history = [
            row
            for row in read_jsonl(directory / FILES["metrics"], COUNTERS)
            if row["environment_steps"] <= step
        ]
        self.wandb, self.wandb_id = None, saved and saved["wandb_id"]
        if cfg.logger.mode != "disabled":
            comparable = self.published if is_published_setting(self.played) else None
            self.wandb = Dashboard(cfg, directory, self.wandb_id, metadata, comparable)
            self.wandb_id = self.wandb.id
        self.progress = Progress(cfg, step, updates)

    def state_dict(self):
        """What has not become a row yet, and how long the files are."""
        lengths = {key: file.length() for key, file in self.files.items()}
        return {name: getattr(self, name) for name in self.SAVED} | {"lengths": lengths}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave; rows written after it are written again."""
        for name in self.SAVED:
            setattr(self, name, state[name])
        self.update_rows = [
            {name: value.to(self.device) for name, value in row.items()}
            for row in self.update_rows
        ]
        for key, length in state["lengths"].items():
            if not self.files[key].cut(length):
                self.say(f"{FILES[key]} was shortened: rows are missing, training goes on")

    @contextlib.contextmanager
    def clock(self, phase):
        """Adds the wall time of its block to `phase`, once a GPU has done its work."""
        self.progress.begin(phase)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.progress.end(phase, seconds)

    def say(self, sentence):
        """A line above the progress bar."""
        self.progress.say(sentence)

    # What happens between two rows

    def add_update(self, metrics):
        """Metrics of one update, tensors []."""
        self.update_rows.append(metrics)
        self.progress.count_update()

    def add_episodes(self, episodes):
        """Return and length of every training episode that ended."""
        self.episode_rows += episodes

    @property
    def films_due(self):
        """Whether the next evaluation is one that is filmed."""
        every = self.cfg.logger.video_every
        return self.cfg.logger.video and (self.evaluations + 1) % every == 0

    def add_evaluation(self, step, result):
        """An `EvaluationResult`; its films are drawn beside training."""
        self.evaluation, self.evaluations = result, self.evaluations + 1
        self.say(f"step {step:,}: evaluation return {result.metrics['eval/return']:.1f}")
        fps = frames_per_second(self.cfg.env)
        for name, make_frames in result.films.items():
            path = self.directory / "videos" / f"{name}_{step:09d}.mp4"
            self.artist.draw(f"eval/{name}", path, step, write_film, make_frames, fps)

    def show_progress(self, step):
        """Moves the progress bar."""
        self.progress.advance(step, self.episode_rows[-1][0] if self.episode_rows else None)

    # The row

    def write_row(self, step, updates):
        """Writes means over the updates and episodes since the last row, an evaluation, times."""
        metrics, curves = self.evaluation_part(step)
        if self.episode_rows:
            returns, lengths = np.mean(self.episode_rows, 0).tolist()
            metrics |= {"train/return": returns, "train/length": lengths}
        for name in self.update_rows[0] if self.update_rows else ():
            values = torch.stack([row[name] for row in self.update_rows])
            metrics[name] = finite_mean(values)
        times = self.times(step)
        counters = {
            "environment_steps": step,
            "agent_steps": step // self.cfg.env.action_repeat,
            "updates": updates,
        }
        for key, row in (("metrics", metrics), ("times", times), ("curves", curves)):
            if row:
                self.files[key].append(counters | row)
        self.history.append(counters | metrics)
        drawn = self.artist.collect(self.say)
        if self.wandb:
            self.wandb.log_row(counters | metrics | times, step)
            self.wandb.log_drawn(drawn)
            if curves:
                self.wandb.log_returns(self.history)
        if curves:
            self.draw_panel(self.evaluation.curves)
        if self.update_rows and self.estimate_due:
            self.say_estimate()
        self.evaluation = None
        self.update_rows, self.episode_rows, self.seconds, self.last_row = [], [], {}, step

    def evaluation_part(self, step):
        """Metrics of the evaluation, with the published ones, and its curves rounded."""
        if self.evaluation is None:
            return {}, {}
        curves = self.evaluation.curves
        metrics = self.evaluation.metrics | published_metrics(self.played, self.published, step)
        return metrics, {
            name: [float(f"{x:.5g}") for x in curve] for name, curve in curves.items()
        }

    def times(self, step):
        """Wall times of the phases since the last row, and the two rates."""
        times = {f"throughput/{phase}_seconds": value for phase, value in self.seconds.items()}
        times["throughput/environment_steps_per_second"] = (step - self.last_row) / self.seconds[
            "collect"
        ]
        if self.update_rows:
            rate = len(self.update_rows) / self.seconds["update"]
            times["throughput/updates_per_second"] = rate
        return times

    def say_estimate(self):
        """Says how long the rest takes; who runs the paper's size on a CPU hears of a smaller."""
        seconds = self.progress.seconds_to_go()
        if seconds is None:  # all updates of this row were made before the run was stopped
            return
        self.estimate_due = False  # once is enough
        smaller = "; a smaller run: python dreamer.py --config-name config_laptop"
        wanted = seconds > 7200 and self.cfg.replay_buffer.batch_size >= PAPERS_BATCH
        self.say(f"about {duration(seconds)} to go on this CPU" + smaller * wanted)

    # Pictures, and the end

    def draw_panel(self, curves):
        """The state of the run at a glance, drawn beside training."""
        history = [dict(row) for row in self.history]
        path = self.directory / "panel.png"
        step = history[-1]["environment_steps"]
        drawing = draw_panel, self.cfg, history, curves, self.published
        self.artist.draw("eval/panel", path, step, *drawing)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Ends what is being drawn (or leaves it), the progress bar, the files, the wandb run."""
        hurry = kind is KeyboardInterrupt
        drawn = self.artist.collect(self.say, wait=not hurry)
        self.artist.close(hurry)
        self.progress.close()
        for file in self.files.values():
            file.close()
        if self.wandb:
            self.wandb.log_drawn(drawn)
            checkpoints = checkpoint_paths(self.directory / "checkpoints")
            if self.cfg.logger.artifact and kind is None and checkpoints:
                self.wandb.log_checkpoint(checkpoints[0])
            self.wandb.finish()
