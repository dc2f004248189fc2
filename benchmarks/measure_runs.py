"""How long a run takes to begin, how much it has to do, and what it does besides.

The sections `start`, `paper` and `loop` of throughput.py.
"""

import contextlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

import dreamer
import dreamer_utils as utils
from common.run import Run
from measuring import ROOT, configuration, laptop_sizes, set_threads, synchronize
from workers import summarize


# --- start: from a fresh process to the first update ---------------------------------------------
def time_to_first_update(overrides):
    """Seconds at which each stage of a fresh process ends; the last is the first update."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(ROOT / "benchmarks" / "first_update.py")
        command = [sys.executable, script, f"run_dir={folder}/run", *overrides]
        start, stages = time.perf_counter(), {}
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
        for line in process.stdout:
            if line.startswith("stage: "):
                stages[line.removeprefix("stage: ").strip()] = time.perf_counter() - start
        process.wait()
    return stages


def measure_start(args, report):
    """The paper's configuration; with --quick short episodes and small batches."""
    overrides = [f"device={args.device}", "collector.total_steps=10_000"]
    if args.quick:
        overrides += [
            "env.time_limit=200",
            "collector.random_steps=200",
            "collector.train_every=200",
            "replay_buffer.batch_size=128",
            "replay_buffer.batch_length=16",
        ]
    runs = [time_to_first_update(overrides) for _ in range(1 if args.quick else 3)]
    runs = [stages for stages in runs if "first update" in stages]
    rows, before = {}, [0.0] * len(runs)
    for stage in runs[0] if runs else ():
        ends = [stages[stage] for stages in runs]
        durations = [end - start for end, start in zip(ends, before, strict=True)]
        rows[stage] = summarize([{"seconds": seconds} for seconds in durations])
        before = ends
    if runs:
        rows["all"] = summarize([{"seconds": end} for end in before])
    return {"overrides": overrides[1:], "rows": rows}


# --- paper: how much there is to do in the paper's run -------------------------------------------
def count_paper_run(args, report):
    """Updates and environment steps of `python dreamer.py`; those of evaluation count."""
    cfg = configuration()
    steps = cfg.collector.total_steps
    evaluated = steps // cfg.eval.every * cfg.eval.episodes * cfg.env.time_limit
    return {
        "updates": dreamer.updates_due(steps, cfg.collector, cfg.optimization),
        "environment_steps": steps + evaluated,
        "action_repeat": cfg.env.action_repeat,
    }


# --- loop: what a run does besides updating and acting -------------------------------------------
class Stopwatch:
    """Seconds that go into each part of a run."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def part(self, name):
        """Adds what happens inside to a part, and waits for a GPU."""
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def each(self, iterator, name):
        """The same iterator, which never ends; each of its steps is added to a part."""
        while True:
            with self.part(name):
                value = next(iterator)
            yield value


@contextlib.contextmanager
def timed_training(stopwatch):
    """Inside, `dreamer.train` fills the stopwatch: `updates`, `environment` and `wall`.

    The wall time begins when every part is built, and ends when the last step is saved. Of the
    collector only TorchRL's part counts as environment: our own is what is looked for.
    """
    update, make_collector = dreamer.update, utils.make_collector
    start, save_if_due = Run.start, Run.save_if_due

    def timed_update(*args):
        with stopwatch.part("updates"):
            return update(*args)

    def timed_collector(*args):
        collector = make_collector(*args)
        collector.phases = stopwatch.each(collector.phases, "environment")
        return collector

    def timed_start(run, *args, **parts):
        start(run, *args, **parts)
        stopwatch.seconds["started"] = time.perf_counter()

    def timed_save(run):
        save_if_due(run)
        stopwatch.seconds["wall"] = time.perf_counter() - stopwatch.seconds["started"]

    with contextlib.ExitStack() as stack:
        for owner, name, timed in (
            (dreamer, "update", timed_update),
            (utils, "make_collector", timed_collector),
            (Run, "start", timed_start),
            (Run, "save_if_due", timed_save),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed))
        yield


def rest_of_run(device, overrides):
    """The share of a run's wall time that is neither an update nor the environment."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = configuration(f"run_dir={folder}/run", f"device={device}", *overrides)
        stopwatch = Stopwatch(utils.resolve_device(device))
        with timed_training(stopwatch):
            dreamer.train(cfg)
    spent = stopwatch.seconds
    rest = spent["wall"] - spent["updates"] - spent["environment"]
    return {"seconds": rest / spent["wall"], "wall": spent["wall"]}


def measure_loop(args, report):
    """A short run with the laptop preset's sizes, without evaluation."""
    set_threads(args.threads)
    overrides = [
        *laptop_sizes(),
        "collector.total_steps=6_000",
        "eval.every=0",
        "checkpoint.every=6_000",
        "optimization.pretrain=20",
    ]
    runs = [rest_of_run(args.device, overrides) for _ in range(1 if args.quick else 3)]
    return {"rows": {"neither updates nor environment": summarize(runs)}}
