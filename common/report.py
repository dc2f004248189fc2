"""What a run was and what it reached: its card, its summary, the versions that made it."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from common.command_line import quoted_override
from common.config import ROOT
from common.errors import UserError
from common.files import COUNTERS, atomic_write, read_jsonl
from common.keys import decisive
from common.progress import duration

SHOWN = ("panel.png", "metrics.jsonl", "curves.jsonl", "run.json")
SHOWN += ("checkpoints", "replay", "videos", "wandb")


def check_versions():
    """The installed packages against requirements.txt; `UserError` names those that differ."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    differ = []
    for name, pin in pins.items():
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            found = "missing"
        if found != pin:
            differ.append(f"{name} {found} (tested with {pin})")
    if differ:
        raise UserError(f"{', '.join(differ)}: pip install -r requirements.txt")
    return f"Python {sys.version.split()[0]}, {len(pins)} packages as in requirements.txt"


def git(*words):
    """What git says about this directory, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def config_hash(cfg):
    """Twelve hexadecimal digits that name all of a configuration that changes what is learned."""
    return hashlib.sha256(json.dumps(decisive(cfg)).encode()).hexdigest()[:12]


def run_metadata(cfg, device, precision):
    """What a result depends on: code, versions, machine, configuration."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    versions = {name: metadata.version(name) for name in ("torch", "torchrl", "dm_control")}
    return {
        "name": cfg.name,
        "task": f"{cfg.env.name} {cfg.env.task}".strip(),
        "seed": cfg.seed,
        "git_revision": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "config_hash": config_hash(cfg),
        "versions": versions | {"python": platform.python_version()},
        "device": f"{device.type}: {gpu or platform.machine()}, {os.cpu_count()} cores",
        "precision": str(precision),
    }


def run_results(directory):
    """Returns, wall time and speed of a run, from its files, however often it was stopped."""
    times = read_jsonl(directory / "throughput.jsonl", COUNTERS)
    phases = ("collect", "update", "evaluate")
    spent = {
        phase: sum(row.get(f"throughput/{phase}_seconds", 0) for row in times) for phase in phases
    }
    results = {"wall_seconds": round(sum(spent.values()), 1)}
    if spent["update"] and spent["collect"]:
        updates, steps = times[-1]["updates"], times[-1]["environment_steps"]
        results["updates_per_second"] = round(updates / spent["update"], 3)
        results["environment_steps_per_second"] = round(steps / spent["collect"], 1)
    rows = read_jsonl(directory / "metrics.jsonl", COUNTERS)
    evaluations = [row for row in rows if "eval/return" in row][-5:]
    if evaluations:
        last = evaluations[-1]
        returns = [row["eval/return"] for row in evaluations]
        results |= {
            "eval_return": last["eval/return"],
            "eval_steps": last["environment_steps"],
            "last_returns_mean": float(np.mean(returns)),
            "last_returns_std": float(np.std(returns)),
            "last_returns": len(returns),
            "published_mean": last.get("eval/published_mean"),
        }
    return results


def write_run_card(directory, progress):
    """Writes run.json, the run in numbers, and returns it."""
    card = progress | run_results(directory)
    atomic_write(directory / "run.json", json.dumps(card, indent=1) + "\n")
    return card


def run_summary(cfg, card):
    """What there is to know and to do at the end of a run."""
    place = cfg.run_dir
    lines = [
        f"{card['state']} at {card['environment_steps']:,} environment steps and"
        f" {card['updates']:,} updates, after {duration(card['wall_seconds'])}"
    ]
    if "eval_return" in card:
        published = round(card["published_mean"] or 0)
        lines.append(
            f"evaluation return {card['eval_return']:.1f} at step {card['eval_steps']:,}, the"
            f" last {card['last_returns']}: {card['last_returns_mean']:.1f} +-"
            f" {card['last_returns_std']:.1f}" + f", published mean {published}" * bool(published)
        )
    words = [quoted_override("resume", place)]
    checkpoint = quoted_override("eval.checkpoint", place)
    if card["state"] == "finished":  # without more steps it would only say so again
        words.append(f"collector.total_steps={2 * cfg.collector.total_steps}")
    there = [name for name in SHOWN if Path(place, name).exists()]
    lines.append(f"in {place}: {', '.join(there)}")
    if card["state"] != "finished" or cfg.replay_buffer.keep:
        lines.append(f"go on:    python dreamer.py {' '.join(words)}")
    lines.append(f"evaluate: python dreamer.py {checkpoint} eval.episodes=10")
    if "eval_return" in card:
        lines.append(f"plot:     python benchmarks/plot.py {shlex.quote(place)}")
    return "\n".join(lines)
