"""Runs of the real training loop that take seconds: short episodes, small networks."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from hydra import compose, initialize

import dreamer
import dreamer_utils as utils
from common.episodes import ResumableCollector
from common.files import read_jsonl
from common.signals import STOP_SIGNALS

ROOT = Path(dreamer.__file__).parent
LAYOUT = {  # of a replay row with one number to see and one action
    "observation": ((1,), torch.float32),
    "action": ((1,), torch.float32),
    "reward": ((), torch.float32),
    "terminated": ((), torch.bool),
    "episode": ((), torch.int64),
}
SMALL = """
device=cpu
env.name=cartpole env.task=balance env.from_pixels=false env.time_limit=40
collector.random_steps=80 collector.train_every=40 collector.total_steps=240
replay_buffer.batch_size=24 replay_buffer.batch_length=8
networks.belief_dim=16 networks.state_dim=4 networks.hidden_dim=16 networks.channels=2
optimization.horizon=4 optimization.pretrain=2 optimization.train_ratio=0.025
optimization.autocast=false
eval.every=80
logger.every=40 logger.mode=disabled logger.progress=false
""".split()


def configure(*overrides, name="config"):
    """The checked configuration that these command-line overrides give."""
    utils.register_configs()
    with initialize(config_path=None, version_base="1.3"):
        return utils.load_config(compose(name, overrides=[*overrides]))


def small(run_dir, *overrides):
    """Trains with the small settings; returns a digest of all weights, and the metrics rows."""
    agent = dreamer.train(configure(*SMALL, f"run_dir={run_dir}", *overrides))
    digest = hashlib.sha256()
    for parameter in agent.state_dict().values():
        digest.update(parameter.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest(), read_jsonl(Path(run_dir) / "metrics.jsonl")


def run_command(*words):
    """`python dreamer.py WORDS`, as a user types it."""
    return subprocess.run(
        [sys.executable, "dreamer.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )


def start(*words, **options):
    """`python WORDS` in the background, which hears every signal that stops a run.

    Tests that are started with nohup, or with & in a script, ignore some of these signals, and
    what they start would ignore them too.
    """
    ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, **pipes, **options)
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


def wait_for(condition, seconds=120):
    """Waits until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def before_phase(patch, number, fault):
    """Calls `fault(collector)` as the `number`-th phase of acting begins, from 1 on."""
    original, count = ResumableCollector.collect, 0

    def collect(self):
        nonlocal count
        count += 1
        if count == number:
            fault(self)
        return original(self)

    patch.setattr(ResumableCollector, "collect", collect)
