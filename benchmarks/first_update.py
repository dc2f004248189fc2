"""Trains until the first update is done, and says when each stage has ended; see measure_runs.py.

The words on the command line are configuration overrides, as those of dreamer.py.
"""

import os
import sys
from pathlib import Path

# A script finds modules in its own directory only; dreamer.py is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dreamer  # noqa: E402
from common.run import Run  # noqa: E402
from measuring import configuration  # noqa: E402


def end_stage(name):
    """Says that a stage is over."""
    print("stage:", name, flush=True)


def main():
    """A run whose start and whose first update say so; the process ends there."""
    update, start = dreamer.update, Run.start

    def first_update(*args):
        end_stage("experience of the seed episodes")
        metrics = update(*args)
        float(next(iter(metrics.values())))  # waits for a GPU
        end_stage("first update")
        os._exit(0)

    def say_start(run, *args, **parts):
        start(run, *args, **parts)
        end_stage("environments, networks, replay")

    dreamer.update, Run.start = first_update, say_start
    cfg = configuration(*sys.argv[1:])
    end_stage("imports and configuration")
    dreamer.train(cfg)


if __name__ == "__main__":
    main()
