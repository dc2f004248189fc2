"""Do your first rows equal ours? `python benchmarks/first_rows.py [RUN] [--steps N]`.

Trains the first steps of a committed run again, with its configuration and on one thread, and
compares every number of every row with the committed metrics.jsonl. The last lines say how many
are the same to the last bit, and where the first difference is. Exit code 1 if there is one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.directory import CONFIG_FILE, read_config  # noqa: E402
from common.files import COUNTERS, read_jsonl  # noqa: E402
from common.keys import changes_learning, flatten  # noqa: E402

DEFAULT = ROOT / "benchmarks" / "first_rows"
WATCHED = ("eval.every", "eval.episodes", "logger.every")  # they decide which rows there are


def overrides(run):
    """The configuration of a committed run, as words of a command line."""
    saved = flatten(read_config(run / CONFIG_FILE))
    keys = [key for key in saved if changes_learning(key) or key in WATCHED]
    return [f"{key}={saved[key]}" for key in keys]


def train(run, folder, steps):
    """The rows of the first `steps` environment steps, trained again."""
    words = [*overrides(run), f"collector.total_steps={steps}", f"run_dir={folder}/run"]
    words += ["device=cpu", "logger.mode=disabled"]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "dreamer.py", *words]
    # Without its summary, which names files that will be gone; the progress bar stays.
    quiet = subprocess.DEVNULL
    subprocess.run(command, cwd=ROOT, env=os.environ | threads, check=True, stdout=quiet)
    return read_jsonl(Path(folder, "run", "metrics.jsonl"), COUNTERS)


def compare(ours, fresh):
    """The number of values that both have, and (step, name, ours, fresh) of those that differ."""
    committed = {row["environment_steps"]: row for row in ours}
    pairs = [
        (row["environment_steps"], name, committed[row["environment_steps"]][name], value)
        for row in fresh
        if row["environment_steps"] in committed
        for name, value in row.items()
        if name in committed[row["environment_steps"]]
    ]
    return len(pairs), [pair for pair in pairs if pair[2] != pair[3]]


def main():
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=DEFAULT)
    parser.add_argument("--steps", type=int, default=6_000)
    options = parser.parse_args()
    ours = read_jsonl(options.run / "metrics.jsonl", COUNTERS)
    if not ours or not (options.run / CONFIG_FILE).exists():
        parser.error(f"{options.run} has no metrics.jsonl and config.yaml to compare with")
    with tempfile.TemporaryDirectory() as folder:
        fresh = train(options.run, folder, options.steps)
    total, different = compare(ours, fresh)
    print(f"{total - len(different)} of {total} numbers are the same to the last bit")
    if different:
        step, name, before, now = different[0]
        print(f"the first difference: {name} at step {step:,}: {before} there, {now} here")
    raise SystemExit(bool(different) or not total)


if __name__ == "__main__":
    main()
