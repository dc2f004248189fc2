"""How long one update takes: what its arithmetic costs, and every variant of it.

The sections `floor`, `update` and `ablation` of throughput.py.
"""

import math
import statistics
import time
from unittest import mock

import torch
from tensordict import TensorDict

import dreamer
import dreamer_utils as utils
from common.device import resolve_precision
from measuring import (
    ACTIONS,
    AUTOCAST,
    Clock,
    configuration,
    make_rows,
    peak_gib,
    set_threads,
    synchronize,
)
from switches import SWITCHES, WITHOUT, fast_matmul
from torchrl_baseline import TorchRLBaseline
from variants import (
    ABLATIONS,
    BASELINE,
    CUDA_BASELINE,
    CUDA_UPDATES,
    GFLOP,
    PAPER_SIZE,
    PHASES,
    SIZES,
    UPDATES,
)
from workers import Worker, available_gib, summarize, take_turns, times_faster


# --- floor: what the arithmetic alone costs ------------------------------------------------------
def build_floor(device, threads, precision, size):
    """A square matmul; `precision` is bfloat16, float32 default or float32 fast."""
    set_threads(threads)
    device, dtype = torch.device(device), getattr(torch, precision.split()[0])
    if precision.endswith("fast"):
        fast_matmul(device)
    x, y = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rows = x[:64].double() @ y.double()
    error = float(((x[:64] @ y).double() - rows).norm() / rows.norm())

    def measure(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(x, y)
        synchronize(device)
        return {"seconds": (time.perf_counter() - start) / repeats, "error": error}

    return measure


def measure_floor(args, report):
    """Matmul rates, and what one update would take at them."""
    size = 8192 if args.device != "cpu" else 2048
    size = 1024 if args.quick else size
    shared = {"device": args.device, "threads": args.threads, "size": size}
    names = ("float32 default", "float32 fast", "bfloat16")
    workers = [Worker(name, build_floor, precision=name, **shared) for name in names]
    rows = {}
    for name, answers in take_turns(workers, args.rounds, until=args.until).items():
        rate = 2 * size**3 / statistics.median(answer["seconds"] for answer in answers) / 1e9
        rows[name] = {
            "gflops": rate,
            "floor": GFLOP / rate,
            "error": answers[0]["error"],
            "runs": len(answers),
        }
    return rows


# --- update: ours, and TorchRL's parts -----------------------------------------------------------
def build_update(variant, size, device, threads):
    """One whole update of one variant, as a measurement by phases."""
    set_threads(threads)
    cfg = configuration(
        f"replay_buffer.batch_size={size.frames}",
        f"replay_buffer.batch_length={size.length}",
        f"optimization.autocast={AUTOCAST[variant.precision]}",
        f"env.from_pixels={size.observation == 'pixels'}",
        *variant.overrides,
    )
    torch.manual_seed(0)
    device = torch.device(device)
    for name in variant.switches:
        SWITCHES[name](device)
    clock = Clock(device)
    rows = make_rows(size.observation, size.sequences, size.length, device)
    build = {"ours": build_ours, "torchrl": build_torchrl}[variant.way]
    update = build(variant, cfg, rows, device, clock)

    def measure(repeats):
        if device.type == "cuda":  # the others need the memory between two turns
            update()
            torch.cuda.reset_peak_memory_stats(device)
        clock.start(on=device.type == "cpu")  # there it costs nothing
        start = time.perf_counter()
        for _ in range(repeats):
            losses = update()
        synchronize(device)
        seconds = time.perf_counter() - start
        phases, counted, gib = clock.phases, repeats, peak_gib(device)
        if device.type != "cpu":
            clock.start(on=True)
            update()
            phases, counted = clock.phases, 1
            torch.cuda.empty_cache()
        if not all(math.isfinite(float(loss)) for loss in losses):
            raise FloatingPointError("a loss is not finite")
        phases = {name: value / counted for name, value in phases.items()}
        return {"seconds": seconds / repeats, "phases": phases, "gib": gib}

    return measure


def build_ours(variant, cfg, rows, device, clock):
    """One update of dreamer.py; its two blocks and its optimizers report to the clock."""
    observation, action, reward = rows
    batch = TensorDict(
        {
            "observation": observation,
            "action": action,
            "reward": reward,
            "terminated": torch.zeros_like(reward, dtype=torch.bool),
        },
        reward.shape,
    )
    hp = cfg.optimization
    precision = resolve_precision(hp.autocast, device)
    autocast = utils.make_autocast(device, precision)
    agent = dreamer.make_agent(cfg, observation.shape[2:], ACTIONS).to(device)
    optimizers = utils.make_optimizers(hp, agent, precision)
    utils.compile_steps(agent, hp.compile, device)
    if variant.without:
        WITHOUT[variant.without](agent, optimizers)
    for part, optimizer in optimizers.items():
        name = PHASES[1] if part == "world_model" else PHASES[3]
        optimizer.backward = clock.after(optimizer.backward, name)
        optimizer.step = clock.after(optimizer.step, PHASES[4])
    clocked = {
        "dynamics_learning": clock.after(dreamer.dynamics_learning, PHASES[0]),
        "behavior_learning": clock.after(dreamer.behavior_learning, PHASES[2]),
    }

    def update():
        noise = dreamer.draw_noise(*batch.shape, hp, agent.world_model)
        with mock.patch.multiple(dreamer, **clocked):
            metrics = dreamer.update(agent, optimizers, batch, noise, hp, autocast)
        return [metric for name, metric in metrics.items() if name.endswith("loss")]

    return update


def build_torchrl(variant, cfg, rows, device, clock):
    """One update of TorchRL's own modules and losses, see torchrl_baseline.py."""
    precision = resolve_precision(cfg.optimization.autocast, device)
    autocast = utils.make_autocast(device, precision)
    shape = rows[0].shape[2:]
    baseline = TorchRLBaseline(cfg, shape, ACTIONS, device, autocast, variant.compiled)
    batch = baseline.make_batch(*rows)
    return lambda: list(baseline.update(batch, clock).values())


def named(variants, parts, always=()):
    """Those variants whose name has one of `parts`, or is it; all of them if there are no parts.

    A part that is a whole name stands for that one only: "ours, bfloat16" is not its compiled one.
    """
    return {
        name: variant
        for name, variant in variants.items()
        if not parts
        or name in always
        or any(part == name if part in variants else part in name for part in parts)
    }


def compare_updates(variants, baseline, title, args, report):
    """The variants side by side, at the size of this title.

    Args:
        baseline: the name of the variant that ratios are against.
        report: whose section `floor`, if it is there, says what the arithmetic alone would take.
    """
    size = SIZES[title]
    keep = sum(bool(variant.switches) for variant in variants.values())
    needed = 5 * (1 + keep) * size.frames / 2500
    lean = args.device == "cpu" and available_gib() < needed
    shared = {"size": size, "device": args.device, "threads": args.threads}
    workers = [
        Worker(name, build_update, variant=variant, **shared) for name, variant in variants.items()
    ]
    enough = 0.2 if args.quick else 1.5
    answers = take_turns(workers, args.rounds, enough, lean=lean, until=args.until)
    rows = {name: summarize(values) for name, values in answers.items()}
    for name, row in rows.items():
        others = {"vs_baseline": baseline, "vs_peer": variants[name].peer}
        for column, other in others.items():
            if other in rows:
                row[column] = times_faster(row, rows[other])
        rates = [
            floor["gflops"]
            for precision, floor in report.get("floor", {}).items()
            if precision.startswith(variants[name].precision)
        ]
        if rates and size.observation == "pixels":
            row["floor"] = GFLOP * size.frames / 2500 / max(rates)
    return {"lean": lean, "rows": rows}


def measure_updates(args, report):
    """All sizes; each with its variants side by side."""
    variants = {
        name: variant for name, variant in UPDATES.items() if variant.quick or not args.quick
    }
    variants = named(variants, args.variants)
    sizes = {title: size for title, size in SIZES.items() if size.quick or not args.quick}
    measured = {}
    for title in named(sizes, args.sizes):
        print(f"update from {title}", flush=True)
        measured[title] = compare_updates(variants, BASELINE, title, args, report)
    return measured


def measure_cuda_updates(args, report):
    """What a GPU is asked: the paper's size, eager, compiled and with CUDA graphs."""
    title = "pixels, 8 x 16" if args.quick else PAPER_SIZE
    variants = named(CUDA_UPDATES, args.variants)
    return {"size": title, **compare_updates(variants, CUDA_BASELINE, title, args, report)}


def measure_ablation(args, report):
    """Ours from pixels at its best, and with each thing alone switched off."""
    title = "pixels, 8 x 16" if args.quick else PAPER_SIZE
    shared = {"size": SIZES[title], "device": args.device, "threads": args.threads}
    variants = named(ABLATIONS, args.variants, always=("everything",))
    workers = [
        Worker(name, build_update, variant=variant, **shared) for name, variant in variants.items()
    ]
    lean = args.device == "cpu" and available_gib() < 5 * len(workers) and not args.quick
    answers = take_turns(workers, args.rounds, 0.2 if args.quick else 0.5, lean=lean)
    rows = {name: summarize(values) for name, values in answers.items()}
    best = rows.pop("everything")
    for row in rows.values():
        row["vs_baseline"] = 1 / times_faster(row, best)
    return {"size": title, "rows": {"everything on": best, **rows}}
