"""One update of this checkout beside one of another: `python benchmarks/compare_commits.py OTHER`.

Measures a whole update from pixels, with the paper's sizes and those of the laptop preset, and one
from states, in bfloat16 and in float32. Prints the medians, how many times faster this checkout is
(the median of the ratios within a round, and their range: two copies of one commit are 1 only
within it), the peak memory of each process, and whether both computed the same.

The other checkout is a directory, say of `git worktree add ../before COMMIT`. It is read, never
written to. Both take the same sizes, and the same Python with its packages. How they take turns is
said in workers.py; nothing heavy is imported here, for the same reason as there.
"""

import argparse
import contextlib
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

from report_throughput import table
from workers import Worker, run_until_stopped, summarize, take_turns, times_faster

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("replay_buffer.batch_size=128", "replay_buffer.batch_length=16")
STATES = ("replay_buffer.batch_size=512", "replay_buffer.batch_length=16")
STATES += ("networks.belief_dim=200", "networks.hidden_dim=200", "env.from_pixels=false")
COLUMNS = ["one update", "this, s", "other, s", "this is times faster", "from round to round"]
COLUMNS += ["this, peak GiB", "other, peak GiB", "same first losses", "rounds"]


def build_update(checkout, device, threads, exact, precision, observation, laptop, overrides):
    """One whole update of `checkout`, in a process that has not imported dreamer.py yet."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, checkout)
    import torch

    import dreamer
    import dreamer_utils as utils
    from measuring import (
        AUTOCAST,
        configuration,
        laptop_sizes,
        make_rows,
        peak_gib,
        set_threads,
        synchronize,
    )

    if Path(dreamer.__file__).resolve().parent != Path(checkout):
        raise ImportError(f"{checkout} has no dreamer.py")
    set_threads(threads)
    sizes = laptop_sizes() if laptop else []
    cfg = configuration(
        *sizes, *overrides, f"device={device}", f"optimization.autocast={AUTOCAST[precision]}"
    )
    device = utils.resolve_device(cfg.device)
    utils.tune_process(device)
    if exact:
        torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    length = cfg.replay_buffer.batch_length
    rows = make_rows(observation, cfg.replay_buffer.batch_size // length, length, device)
    build = build_new if hasattr(dreamer, "make_agent") else build_old
    update = build(cfg, rows, device)
    first = [float(metric) for name, metric in update().items() if name.endswith("loss")]

    def measure(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            update()
        synchronize(device)
        seconds = (time.perf_counter() - start) / repeats
        return {"seconds": seconds, "gib": peak_gib(device), "first losses": first}

    return measure


def make_batch(rows):
    """Rows as the replay yields them."""
    import torch
    from tensordict import TensorDict

    observation, action, reward = rows
    terminated = torch.zeros_like(reward, dtype=torch.bool)
    batch = {"observation": observation, "action": action, "reward": reward}
    return TensorDict(batch | {"terminated": terminated}, reward.shape)


def build_new(cfg, rows, device):
    """An update of a commit whose dreamer.py builds its own parts."""
    import dreamer
    import dreamer_utils as utils
    from common.device import resolve_precision

    hp, batch = cfg.optimization, make_batch(rows)
    precision = resolve_precision(hp.autocast, device)
    autocast = utils.make_autocast(device, precision)
    shape, actions = batch["observation"].shape[2:], batch["action"].shape[-1]
    agent = dreamer.make_agent(cfg, shape, actions).to(device)
    optimizers = utils.make_optimizers(hp, agent, precision)
    utils.compile_steps(agent, hp.compile, device)

    def update():
        noise = dreamer.draw_noise(*batch.shape, hp, agent.world_model)
        return dreamer.update(agent, optimizers, batch, noise, hp, autocast)

    return update


def build_old(cfg, rows, device):
    """An update of an earlier commit (eb8cb42 is one): `update` takes the learning made fast."""
    import dreamer
    import dreamer_utils as utils

    hp, batch = cfg.optimization, make_batch(rows)
    precision = utils.resolve_autocast(hp.autocast, device)
    shape, actions = batch["observation"].shape[2:], batch["action"].shape[-1]
    agent = utils.Agent(cfg, shape, actions).to(device)
    optimizers = utils.build_optimizers(hp, agent, precision)
    utils.compile_steps(agent, cfg, device)
    learning = utils.accelerate(dreamer.LEARNING, device, precision)

    def update():
        noise = dreamer.draw_noise(*batch.shape, hp, agent.world_model)
        return dreamer.update(learning, agent, optimizers, batch, noise, hp)

    return update


def revision(checkout):
    """The commit of a checkout, with a + if files differ from it; ? where git knows none."""
    said = []
    for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        command = ["git", "--no-optional-locks", "-C", str(checkout), *words]
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True)
            said += [done.stdout.strip()] if done.returncode == 0 else []
    return said[0][:9] + "+" * bool(said[1]) if len(said) == 2 else "?"


def compare(title, checkouts, args, **case):
    """One line of the table: both checkouts take turns; None if one of them fails."""
    context = multiprocessing.get_context("spawn")
    shared = case | {"device": args.device, "threads": args.threads, "exact": args.exact}
    workers = [
        Worker(name, build_update, context, checkout=str(path), **shared)
        for name, path in checkouts.items()
    ]
    answers = take_turns(workers, args.rounds, 0.2 if args.quick else 1.5)
    if len(answers) < len(workers):
        return None
    this, other = (summarize(answers[name]) for name in checkouts)
    ratios = [b / a for a, b in zip(this["seconds"], other["seconds"], strict=True)]
    spread = f"{min(ratios):.3g} to {max(ratios):.3g}"
    losses = [answers[name][0]["first losses"] for name in checkouts]
    same = "yes" if losses[0] == losses[1] else "no"
    seconds = this["median"], other["median"], times_faster(this, other)
    return [title, *seconds, spread, this["gib"], other["gib"], same, args.rounds]


def main():
    """Compares case by case, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="directory of the other checkout")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each checkout")
    parser.add_argument("--quick", action="store_true", help="8 x 16 frames instead of 50 x 50")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    exact = "float32 products are never rounded, even if a commit lets its processor do that"
    parser.add_argument("--exact", action="store_true", help=exact)
    args = parser.parse_args()
    checkouts = {"this": ROOT, "other": args.other.resolve()}
    if not (checkouts["other"] / "dreamer.py").exists():
        parser.error(f"{args.other} is no checkout: it has no dreamer.py")
    for name, path in checkouts.items():
        print(f"{name}: {revision(path)} in {path}", flush=True)
    paper = ("paper's networks, 8 x 16 frames", SMALL) if args.quick else ("paper's sizes", ())
    cases = (
        (paper[0], {"observation": "pixels", "laptop": False, "overrides": paper[1]}),
        ("laptop's sizes", {"observation": "pixels", "laptop": True, "overrides": ()}),
        ("states, 512 frames", {"observation": "states", "laptop": False, "overrides": STATES}),
    )
    lines = []
    for title, case in cases:
        for precision in ("bfloat16", "float32"):
            line = f"{title}, {precision}"
            lines.append(compare(line, checkouts, args, precision=precision, **case))
    print(f"\n{table(COLUMNS, [line for line in lines if line])}", end="")
    if None in lines:
        raise SystemExit(1)


if __name__ == "__main__":
    run_until_stopped(main)
