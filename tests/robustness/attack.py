"""An attack on everything that a run promises; test_attack.py runs a twentieth of it, or by hand:

    PYTHONPATH=.:tests python tests/robustness/attack.py DIRECTORY [--quick] [--only PART ...]

The last lines are counts: of cases, and of runs destroyed, results that are not the same bits,
tracebacks, wrong sentences and code of a stranger that was run, which must all be 0.
"""

import argparse
import sys
import time
from pathlib import Path

import attack_children
import kill_runs
from attack_archives import attack_archives
from attack_children import Counts
from attack_damage import attack_damage, make_runs
from attack_lines import attack_lines
from attack_processes import attack_disks, attack_double_starts, attack_signals


def attack_kills(counts, folder, every):
    """60 kills over all kinds of runs."""
    for number, kind in enumerate(kill_runs.KINDS):
        done = kill_runs.count(folder / f"kind{number}", -(-10 // every), number, kind)
        print(f"{kind}: {done}", flush=True)
        counts.cases["kills"] += sum(done[mode] for mode in kill_runs.MODES)
        for _ in range(done["mismatches"]):
            counts.problem("mismatches", f"killed: {kind}")
        for _ in range(done["failed"]):
            counts.problem("runs destroyed", f"killed: {kind}")


def attack_command_lines(counts, folder, every):
    """Wrong command lines against no run, and against one that was stopped."""
    half, _, _ = make_runs(folder)
    attack_lines(counts, folder, half, every)


PARTS = {
    "lines": attack_command_lines,
    "damage": attack_damage,
    "archives": attack_archives,
    "starts": attack_double_starts,
    "signals": attack_signals,
    "disks": attack_disks,
    "kills": attack_kills,
}


def main():
    """Prints the counts; exit code 1 if one of them is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--quick", action="store_true", help="a twentieth of it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    args = parser.parse_args()
    attack_children.prepare()
    counts = Counts()
    for name in args.only:
        start = time.monotonic()
        if name != "lines":  # which ask for OpenGL that is not there
            attack_children.probe_once()
        folder = args.directory.absolute() / name
        folder.mkdir(parents=True)
        PARTS[name](counts, folder, 20 if args.quick else 1)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    for name, number in counts.cases.items():
        print(f"{name}: {number}")
    for kind in Counts.KINDS:
        print(f"{kind}: {counts.problems[kind]}")
    return 1 if counts.problems else 0


if __name__ == "__main__":
    sys.exit(main())
