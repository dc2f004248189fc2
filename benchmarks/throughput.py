"""How long everything takes, side by side: `python benchmarks/throughput.py [--quick]`.

Sections (`--only floor,update`): what the arithmetic alone costs (`floor`), one update of ours and
of the library's way (`update`), ours with one thing switched off (`ablation`), one step of
experience (`collection`), one batch from disk (`replay`), from a fresh process to the first update
(`start`), and what a whole run does besides (`loop`), on the CPU or on CUDA. The numbers go to
`benchmarks/results/throughput.json`, and as tables to the `.md` beside it.

Every variant is a process of its own, because allocator settings are process-wide, and stays
alive. Variants take turns, A B C A B C ..., so that a drift of the machine hits all alike; a ratio
is the median of the ratios within one round.
"""

import argparse
import contextlib
import ctypes
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [path for path in (str(ROOT), str(HERE)) if path not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the processes that are started here

SECTIONS = ("floor", "update", "ablation", "collection", "replay", "start", "loop")
PHASES = ("dynamics forward", "dynamics backward", "behavior forward", "behavior backward",
          "optimizer")  # fmt: skip
GFLOP = 880  # of one update from pixels: 50 x 50 frames, 2500 dreams of 15 steps, nothing wasted
STATES = 17  # numbers of one observation of cheetah without pixels
ACTIONS = 6
AUTOCAST = {"float32": "false", "bfloat16": "bfloat16"}  # precision -> optimization.autocast

# -------------------------------------------------------------------------------------------------
# Switches: process-wide settings, named so that a variant can list them


def tune_process(device):
    """All that our own runs set."""
    import dreamer_utils as utils

    utils.tune_process(device)


def keep_big_blocks(device):
    """Keeps freed blocks of any size, which spares the page faults of fresh ones (glibc only)."""
    trim_threshold, mmap_max = -1, -4  # names of glibc's mallopt
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def fast_matmul(device):
    """float32 matmuls through oneDNN on a CPU, in TF32 on a GPU."""
    import torch

    torch.set_float32_matmul_precision("medium" if device.type == "cpu" else "high")


SWITCHES = {"process": tune_process, "allocator": keep_big_blocks, "matmul": fast_matmul}
TUNED = ("process",)


# The variants of an update.
#   way        ours or library
#   switches   names in `SWITCHES`, the same code for both ways
#   overrides  of the configuration (ours)
#   without    a function of `WITHOUT`, which undoes one thing that makes an update fast (ours)
#   compiled   the losses that go through torch.compile (the library's way)
#   quick      measured with --quick too
#   peer       the library's way with the same precision and switches
# Ratios are against BASELINE and against the peer.
BASELINE = "library, float32"
UPDATES = {
    "library, float32": {"way": "library", "dtype": "float32", "quick": True},
    "library, bfloat16": {"way": "library", "dtype": "bfloat16"},
    "library, float32, tuned": {
        "way": "library", "dtype": "float32", "switches": TUNED, "quick": True,
    },
    "library, bfloat16, tuned": {
        "way": "library", "dtype": "bfloat16", "switches": TUNED, "quick": True,
    },
    "library, bfloat16, tuned, compiled": {
        "way": "library", "dtype": "bfloat16", "switches": TUNED, "compiled": ("actor", "value"),
    },
    "ours, float32, untuned": {"way": "ours", "dtype": "float32", "peer": "library, float32"},
    "ours, float32": {
        "way": "ours", "dtype": "float32", "switches": TUNED, "quick": True,
        "peer": "library, float32, tuned",
    },
    "ours, float32, compiled": {
        "way": "ours", "dtype": "float32", "switches": TUNED, "peer": "library, float32, tuned",
        "overrides": ("optimization.compile=true",),
    },
    "ours, bfloat16": {
        "way": "ours", "dtype": "bfloat16", "switches": TUNED, "quick": True,
        "peer": "library, bfloat16, tuned",
    },
    "ours, bfloat16, compiled": {
        "way": "ours", "dtype": "bfloat16", "switches": TUNED, "peer": "library, bfloat16, tuned",
        "overrides": ("optimization.compile=true",),
    },
}  # fmt: skip


def everything_differentiated(agent, optimizers):
    """Every loss is differentiated for all parameters that it depends on."""
    import torch

    everything = list(agent.parameters())
    for optimizer in optimizers.values():

        def differentiate(loss, shared=False, self=optimizer):
            gradients = torch.autograd.grad(
                self.scaler.scale(loss), everything, retain_graph=True, allow_unused=True
            )
            wanted = {id(parameter) for parameter in self.parameters}
            for parameter, gradient in zip(everything, gradients):
                if id(parameter) in wanted:
                    parameter.grad = gradient

        optimizer.differentiate = differentiate


def plain_layout(agent, optimizers):
    """Images and kernels with the channels first."""
    import torch

    agent.to(memory_format=torch.contiguous_format)
    plain = agent.world_model.preprocess
    agent.world_model.preprocess = lambda observation: plain(observation).contiguous()


def plain_deconvolutions(agent, optimizers):
    """PyTorch's transposed convolutions."""
    import torch

    for layer in agent.world_model.decoder.decoder[::2]:
        layer.__class__ = torch.nn.ConvTranspose2d


def two_value_forwards(agent, optimizers):
    """As if the losses of actor and critic each computed the values."""
    import torch

    once = agent.value.forward

    def forward(*inputs):
        with torch.enable_grad():
            once(*inputs)
        return once(*inputs)

    agent.value.forward = forward


def plain_adam(agent, optimizers):
    """Adam that is not fused."""
    for optimizer in optimizers.values():
        for group in optimizer.adam.param_groups:
            group["fused"] = False


WITHOUT = {
    "gradients of the wanted parameters only": everything_differentiated,
    "channels_last": plain_layout,
    "own deconvolutions": plain_deconvolutions,
    "one value forward for both losses": two_value_forwards,
    "fused Adam": plain_adam,
}
BEST = {"way": "ours", "dtype": "bfloat16", "switches": TUNED}
ABLATIONS = {
    "everything": BEST,
    "bfloat16": BEST | {"dtype": "float32"},
    "kept memory": BEST | {"switches": ("matmul",)},
    "oneDNN float32": BEST | {"switches": ("allocator",)},
} | {name: BEST | {"without": name} for name in WITHOUT}
SIZES = {  # observation, sequences, length; and whether --quick measures it
    "states, 8 x 16": ("states", 8, 16, True),
    "states, 50 x 50": ("states", 50, 50, False),
    "pixels, 8 x 16": ("pixels", 8, 16, True),
    "pixels, 50 x 50": ("pixels", 50, 50, False),
}


# -------------------------------------------------------------------------------------------------
# Workers: one process each, which builds its subject once and measures it on request


class Worker:
    """A process that runs `build(**kwargs)` once, and what that returns at each turn.

    What it returns takes the number of repeats, and gives a dict: `seconds` per repeat and
    anything else worth keeping.
    """

    def __init__(self, name, build, **kwargs):
        context = multiprocessing.get_context("forkserver")  # imports once, starts no thread
        context.set_forkserver_preload(["dreamer", "library_way"])
        self.name, self.failed, (self.pipe, theirs) = name, None, context.Pipe()
        arguments = (theirs, build, kwargs)
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def receive(self):
        """The worker's next answer, or None if it has failed, with the reason on the screen."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            answer = {"failed": f"its process ended with exit code {self.process.exitcode}"}
        if "failed" in answer:
            self.failed = answer["failed"]
            print(f"  {self.name} failed: {self.failed}", flush=True)
        return None if self.failed else answer

    def turn(self, repeats, lean=False):
        """One turn, see `serve`."""
        with contextlib.suppress(OSError):
            self.pipe.send((repeats, lean))
        return self.receive()

    def close(self):
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)
        self.process.kill()


def serve(pipe, build, kwargs):
    """The worker's side. A `lean` turn warms up first, and gives free memory back afterwards."""
    try:
        measure = build(**kwargs)
        pipe.send({})
        for repeats, lean in iter(pipe.recv, None):
            if lean:
                measure(1)
            pipe.send(measure(repeats))
            if lean and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


def interleave(workers, rounds, enough=0.5, most=20, lean=False):
    """Lets the workers take turns: {name: [answer per round]}, without those that failed.

    After three unmeasured turns (the second may still compile) each worker repeats its subject so
    that a turn lasts `enough` seconds.
    """
    for worker in workers:
        worker.receive()
    repeats, answers = {}, {worker.name: [] for worker in workers}
    for turn in range(-3, rounds):
        for worker in workers:
            if worker.failed:
                continue
            answer = worker.turn(repeats.get(worker.name, 1), lean)
            if answer is None:
                continue
            if turn < 0:
                wanted = math.ceil(enough / answer["seconds"])
                repeats[worker.name] = min(max(wanted, 1), most)
            else:
                answers[worker.name].append(answer)
    for worker in workers:
        worker.close()
    return {w.name: answers[w.name] for w in workers if not w.failed}


def summary(answers):
    """The row of one variant: statistics of its seconds, medians of its phases, largest `gib`."""
    seconds = [answer["seconds"] for answer in answers]
    row = {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    row |= {"runs": len(seconds), "seconds": seconds}
    if "phases" in answers[0]:
        row["phases"] = {
            name: statistics.median(answer["phases"].get(name, 0) for answer in answers)
            for name in PHASES
        }
    if "gib" in answers[0]:
        row["gib"] = max(answer["gib"] for answer in answers)
    return row


def times_faster(row, other):
    """How many times faster `row` is than `other`: median of the ratios within a round."""
    return statistics.median(b / a for a, b in zip(row["seconds"], other["seconds"]))


def synchronize(device):
    """Waits for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of the phases of an update: `clock(name)` ends one, and waits for a GPU."""

    def __init__(self, device):
        self.device, self.on, self.phases, self.last = device, False, {}, 0.0

    def start(self, on):
        """Starts the first phase; a clock that is not `on` does nothing."""
        synchronize(self.device)
        self.on, self.phases, self.last = on, {}, time.perf_counter()

    def __call__(self, name):
        if self.on:
            synchronize(self.device)
            now = time.perf_counter()
            self.phases[name] = self.phases.get(name, 0.0) + now - self.last
            self.last = now

    def after(self, function, name):
        """The same function, which ends the phase `name` when it returns."""

        @functools.wraps(function)
        def clocked(*args, **kwargs):
            result = function(*args, **kwargs)
            self(name)
            return result

        return clocked


def peak_gib(device):
    """The most memory that this process has held: on the GPU, or resident on the CPU."""
    import resource

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def set_threads(threads):
    """Sets the number of threads of PyTorch, if it is given."""
    import torch

    if threads:
        torch.set_num_threads(threads)


def configuration(*overrides):
    """Our configuration with some keys changed; no dashboard, no progress bar."""
    import hydra

    import dreamer_utils as utils

    quiet = ("logger.mode=disabled", "logger.progress=false")
    with hydra.initialize(config_path=None, version_base="1.3"):
        return utils.load_config(hydra.compose("config", [*quiet, *overrides]))


# -------------------------------------------------------------------------------------------------
# floor: what the arithmetic alone costs


def build_floor(device, threads, precision, size):
    """A square matmul; `precision` is bfloat16, float32 default or float32 fast."""
    import torch

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
            x @ y
        synchronize(device)
        return {"seconds": (time.perf_counter() - start) / repeats, "error": error}

    return measure


def measure_floor(args, report):
    """Matmul rates, and what one update would take at them."""
    size = 1024 if args.quick else 8192 if report["machine"]["device"] != "cpu" else 2048
    common = {"device": args.device, "threads": args.threads, "size": size}
    names = ("float32 default", "float32 fast", "bfloat16")
    workers = [Worker(name, build_floor, precision=name, **common) for name in names]
    rows = {}
    for name, answers in interleave(workers, args.rounds).items():
        rate = 2 * size**3 / statistics.median(a["seconds"] for a in answers) / 1e9
        error = answers[0]["error"]
        rows[name] = {"gflops": rate, "floor": GFLOP / rate, "error": error, "runs": len(answers)}
    report["floor"] = rows


# -------------------------------------------------------------------------------------------------
# update: ours and the library's way


def make_rows(observation, batch, length, device):
    """Replay rows with made-up content: observation, action, reward, all [B, L, ...]."""
    import torch

    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator)
    shape = (batch, length, 64, 64, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    seen = pixels if observation == "pixels" else draw(batch, length, STATES)
    action = draw(batch, length, ACTIONS).clamp(-1, 1)
    return [value.to(device) for value in (seen, action, draw(batch, length))]


def build_update(variant, size, device, threads):
    """One whole update of one variant, as a measurement by phases."""
    import torch

    import dreamer_utils as utils

    set_threads(threads)
    observation, batch, length, _ = size
    cfg = configuration(
        f"replay_buffer.batch_size={batch * length}", f"replay_buffer.batch_length={length}",
        f"optimization.autocast={AUTOCAST[variant['dtype']]}",
        f"env.from_pixels={observation == 'pixels'}", *variant.get("overrides", ()),
    )  # fmt: skip
    torch.manual_seed(0)
    device = torch.device(device)
    for name in variant.get("switches", ()):
        SWITCHES[name](device)
    dtype = utils.resolve_autocast(cfg.optimization.autocast, device)
    clock = Clock(device)
    ways = {"ours": build_ours, "library": build_library}
    update = ways[variant["way"]](variant, cfg, observation, batch, length, device, dtype, clock)

    def measure(repeats):
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
        if not all(math.isfinite(float(loss)) for loss in losses):
            raise FloatingPointError("a loss is not finite")
        phases = {name: value / counted for name, value in phases.items()}
        return {"seconds": seconds / repeats, "phases": phases, "gib": gib}

    return measure


def build_ours(variant, cfg, observation, batch, length, device, dtype, clock):
    """One update of dreamer.py; its blocks and its optimisers report to the clock."""
    import torch
    from tensordict import TensorDict

    import dreamer
    import dreamer_utils as utils

    seen, action, reward = make_rows(observation, batch, length, device)
    terminated = torch.zeros_like(reward, dtype=torch.bool)
    data = {"observation": seen, "action": action, "reward": reward, "terminated": terminated}
    data = TensorDict(data, (batch, length))
    agent = utils.Agent(cfg, seen.shape[2:], ACTIONS).to(device)
    optimizers = utils.build_optimizers(cfg.optimization, agent, dtype)
    utils.compile_steps(agent, cfg, device)
    if "without" in variant:
        WITHOUT[variant["without"]](agent, optimizers)
    for part, optimizer in optimizers.items():
        name = PHASES[1] if part == "world_model" else PHASES[3]
        optimizer.differentiate = clock.after(optimizer.differentiate, name)
        optimizer.step = clock.after(optimizer.step, PHASES[4])
    learning = utils.accelerate(dreamer.LEARNING, device, dtype)
    learning = [clock.after(block, name) for block, name in zip(learning, PHASES[::2])]

    def update():
        noise = dreamer.draw_noise(batch, length, cfg.optimization, agent.world_model)
        metrics = dreamer.update(learning, agent, optimizers, data, noise, cfg.optimization)
        return [metric for name, metric in metrics.items() if name.endswith("loss")]

    return update


def build_library(variant, cfg, observation, batch, length, device, dtype, clock):
    """One update of TorchRL's own modules and losses, see library_way.py."""
    from library_way import LibraryWay

    seen, action, reward = make_rows(observation, batch, length, device)
    compiled = variant.get("compiled", ())
    library = LibraryWay(cfg, seen.shape[2:], ACTIONS, device, dtype, compiled)
    data = library.make_batch(seen, action, reward)
    return lambda: list(library.update(data, clock).values())


def available_gib():
    """Free memory of the machine, as far as the system says."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) / 2**20
    return math.inf


def measure_updates(args, report):
    """All sizes; each with its variants side by side."""
    report["update"] = {}
    chosen = {k: v for k, v in UPDATES.items() if v.get("quick") or not args.quick}
    if args.variants:
        chosen = {k: v for k, v in chosen.items() if any(part in k for part in args.variants)}
    for title, size in SIZES.items():
        wanted = any(part in title for part in args.sizes or [title])
        if not wanted or (args.quick and not size[3]):
            continue
        print(f"update from {title}", flush=True)
        common = {"size": size, "device": args.device, "threads": args.threads}
        frames = size[1] * size[2]
        keep = sum("switches" in variant for variant in chosen.values())
        lean = args.device == "cpu" and available_gib() < 5 * (1 + keep) * frames / 2500
        workers = [Worker(name, build_update, variant=v, **common) for name, v in chosen.items()]
        answers = interleave(workers, args.rounds, 0.2 if args.quick else 1.5, lean=lean)
        rows = {name: summary(values) for name, values in answers.items()}
        for name, row in rows.items():
            others = {"vs_baseline": BASELINE, "vs_peer": UPDATES[name].get("peer")}
            for column, other in others.items():
                if other in rows:
                    row[column] = times_faster(row, rows[other])
            rates = [floor["gflops"] for precision, floor in report.get("floor", {}).items()
                     if precision.startswith(UPDATES[name]["dtype"])]  # fmt: skip
            if rates and size[0] == "pixels":
                row["floor"] = GFLOP * frames / 2500 / max(rates)
        report["update"][title] = {"lean": lean, "rows": rows}


def measure_ablation(args, report):
    """Ours from pixels at its best, and with each change alone switched off."""
    title = "pixels, 8 x 16" if args.quick else "pixels, 50 x 50"
    common = {"size": SIZES[title], "device": args.device, "threads": args.threads}
    chosen = {k: v for k, v in ABLATIONS.items()
              if k == "everything" or any(part in k for part in args.variants or [k])}  # fmt: skip
    workers = [Worker(k, build_update, variant=v, **common) for k, v in chosen.items()]
    lean = args.device == "cpu" and available_gib() < 5 * len(workers) and not args.quick
    answers = interleave(workers, args.rounds, 0.2 if args.quick else 0.5, lean=lean)
    rows = {name: summary(values) for name, values in answers.items()}
    best = rows.pop("everything")
    for row in rows.values():
        row["vs_baseline"] = 1 / times_faster(row, best)
    report["ablation"] = {"size": title, "rows": {"everything on": best, **rows}}


# -------------------------------------------------------------------------------------------------
# collection: one agent step


def bare_cheetah(kept_camera):
    """A function that takes two physics steps of cheetah run and returns a 64 x 64 image."""
    import numpy as np
    from dm_control import suite
    from dm_control.mujoco.engine import Camera

    env = suite.load("cheetah", "run")
    if kept_camera:
        screen = env.physics.model.vis.global_
        screen.offheight = screen.offwidth = 64
        render = Camera(env.physics, 64, 64, 0).render
    else:
        render = functools.partial(env.physics.render, 64, 64, camera_id=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (997, ACTIONS))

    counter = itertools.count()

    def step():
        i = next(counter)
        if i % 500 == 0:
            env.reset()
        for _ in range(2):
            env.step(actions[i % len(actions)])
        return render()

    return step


def build_bare(kept_camera):
    """The task without any of our code."""
    import dreamer_utils as utils

    utils.select_gl()
    step = bare_cheetah(kept_camera)

    def measure(repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return {"seconds": (time.perf_counter() - start) / repeats}

    return measure


def build_collection(device, threads, chunk):
    """Our collector and replay: environment, policy with exploration noise, storage."""
    import dreamer
    import dreamer_utils as utils

    set_threads(threads)
    folder = tempfile.TemporaryDirectory()
    cfg = configuration(f"run_dir={folder.name}/run", f"device={device}")
    cfg.collector.total_steps = 100_000
    cfg.collector.random_steps, cfg.collector.train_every = 0, chunk * cfg.env.action_repeat
    noise = cfg.collector.exploration_noise
    explore = functools.partial(dreamer.collection_policy, scale=noise)
    run = utils.Run(cfg, explore, dreamer.EVALUATION)

    def measure(repeats):
        taken, start = 0, time.perf_counter()
        while taken < repeats:
            before = run.step
            run.collect()
            taken += (run.step - before) // cfg.env.action_repeat
        return {"seconds": (time.perf_counter() - start) / taken}

    measure.folder = folder  # lives as long as the measurement
    return measure


def measure_collection(args, report):
    """An agent step of ours against the same physics and image alone."""
    names = {"bare, physics.render": False, "bare, kept camera": True}
    workers = [Worker(name, build_bare, kept_camera=kept) for name, kept in names.items()]
    common = {"device": args.device, "threads": args.threads, "chunk": 20}
    workers.append(Worker("our collector and replay", build_collection, **common))
    answers = interleave(workers, args.rounds, enough=0.5 if args.quick else 3, most=200)
    rows = {name: summary(values) for name, values in answers.items()}
    for row in rows.values():
        if "bare, physics.render" in rows:
            row["vs_baseline"] = times_faster(row, rows["bare, physics.render"])
    report["collection"] = rows


# -------------------------------------------------------------------------------------------------
# replay: one batch


def build_replay(device, threads, rows):
    """Our replay on disk, filled with random bytes, and three ways to take a batch from it."""
    import numpy as np
    import torch
    from tensordict import TensorDict

    import dreamer_utils as utils

    set_threads(threads)
    folder, device = tempfile.TemporaryDirectory(), torch.device(device)
    cfg, steps = configuration(), 500
    _, layout = utils.replay_rows(cfg, (64, 64, 3), ACTIONS)
    cfg = cfg.replay_buffer
    rows = rows // (steps + 1) * (steps + 1)
    replay = utils.Replay(cfg, rows, layout, Path(folder.name) / "replay", 2, device)
    generator = np.random.default_rng(0)
    for _ in range(rows // (steps + 1)):
        seen = torch.from_numpy(generator.integers(0, 256, (steps + 1, 64, 64, 3), np.uint8))
        end = torch.zeros(steps, 1, dtype=torch.bool)
        after = {"observation": seen[1:], "reward": torch.rand(steps, 1), "terminated": end}
        action = torch.rand(steps, ACTIONS)
        step = {"observation": seen[:-1], "action": action, "terminated": end, "next": after}
        replay.add_episode(TensorDict(step, [steps]))
    stored = replay.files
    starts = torch.arange(cfg.batch_length)
    work = torch.randn(1024, 1024, device=device)

    def gather():
        episode = torch.randint(rows // (steps + 1), (cfg.batch_size // cfg.batch_length, 1))
        first = torch.randint(steps + 2 - cfg.batch_length, episode.shape)
        index = episode * (steps + 1) + first + starts
        return {key: stored[key][index].to(device) for key in stored.keys()}

    def busy(seconds=0.2):
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            work @ work
            synchronize(device)

    def timed(function, repeats, between=None):
        total = 0.0
        for _ in range(repeats):
            if between:
                between()
            start = time.perf_counter()
            function()
            synchronize(device)
            total += time.perf_counter() - start
        return total / repeats

    def measure(repeats):
        sampled = timed(replay.sample, repeats)
        batches = replay.batches(max(repeats // 4, 1) + 1)
        next(batches)
        waited = timed(lambda: next(batches), max(repeats // 4, 1), between=busy)
        return {"seconds": sampled, "gather": timed(gather, repeats), "waited": waited,
                "gib": rows * sum(v[0].nbytes for v in stored.values()) / 2**30}  # fmt: skip

    measure.folder = folder  # lives as long as the measurement
    return measure


def measure_replay(args, report):
    """A batch through our replay, against a gather of the same rows from the memory map."""
    rows = 10_000 if args.quick else 200_000
    common = {"device": args.device, "threads": args.threads, "rows": rows}
    worker = Worker("replay", build_replay, **common)
    answers = interleave([worker], args.rounds, enough=0.2).get("replay", [])
    titles = {"gather": "plain gather from the memory map",
              "seconds": "our replay, one batch after the other",
              "waited": "our replay, drawn ahead during 0.2 s of work"}  # fmt: skip
    table = {}
    for key, title in titles.items():
        if answers:
            table[title] = summary([{"seconds": answer[key]} for answer in answers])
            table[title]["vs_baseline"] = times_faster(table[title], table[titles["gather"]])
    size = answers[0]["gib"] if answers else None
    report["replay"] = {"rows_stored": rows, "gib_stored": size, "rows": table}


# -------------------------------------------------------------------------------------------------
# start: from a fresh process to the first update

FIRST_UPDATE = """
import os, sys
import hydra
import dreamer
import dreamer_utils as utils

def say(stage):
    print("stage:", stage, flush=True)

def first_update(*args):
    say("experience of the seed episodes")
    metrics = update(*args)
    float(next(iter(metrics.values())))
    say("first update")
    os._exit(0)

class Run(utils.Run):
    def __init__(self, *args):
        say("imports and configuration")
        super().__init__(*args)
        say("environments, networks, replay")

update, dreamer.update, utils.Run = dreamer.update, first_update, Run
with hydra.initialize(config_path=None, version_base="1.3"):
    cfg = utils.load_config(hydra.compose("config", sys.argv[1:]))
dreamer.train(cfg)
"""


def time_to_first_update(overrides):
    """Seconds at which each stage of a fresh process ends; the last is the first update."""
    with tempfile.TemporaryDirectory() as folder:
        always = (f"run_dir={folder}/run", "logger.mode=disabled", "logger.progress=false")
        command = [sys.executable, "-c", FIRST_UPDATE, *always, *overrides]
        start, stages = time.perf_counter(), {}
        process = subprocess.Popen(command, cwd=ROOT, text=True,
                                   stdout=subprocess.PIPE)  # fmt: skip
        for line in process.stdout:
            if line.startswith("stage: "):
                stages[line.removeprefix("stage: ").strip()] = time.perf_counter() - start
        process.wait()
    return stages


def measure_start(args, report):
    """The paper's configuration; with --quick short episodes and small batches."""
    overrides = [f"device={args.device}", "collector.total_steps=10_000"]
    if args.quick:
        overrides += ["env.time_limit=200", "collector.random_steps=200",
                      "collector.train_every=200", "replay_buffer.batch_size=128",
                      "replay_buffer.batch_length=16"]  # fmt: skip
    runs = [time_to_first_update(overrides) for _ in range(1 if args.quick else 3)]
    runs = [stages for stages in runs if "first update" in stages]
    rows, before = {}, [0.0] * len(runs)
    for stage in runs[0] if runs else ():
        ends = [stages[stage] for stages in runs]
        rows[stage] = summary([{"seconds": end - b} for end, b in zip(ends, before)])
        before = ends
    if runs:
        rows["all"] = summary([{"seconds": end} for end in before])
    report["start"] = {"overrides": overrides[1:], "rows": rows}


# -------------------------------------------------------------------------------------------------
# loop: what a run does besides updating and acting


def build_loop(device, threads, overrides):
    """A short run with the laptop preset's sizes, whose updates and environment are timed."""
    import dreamer
    import dreamer_utils as utils

    set_threads(threads)
    spent = {"updates": 0.0, "environment": 0.0}

    def timed(function, part):
        def clocked(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(utils.resolve_device(device))
            spent[part] += time.perf_counter() - start
            return result

        return clocked

    class Run(utils.Run):
        def __init__(self, *args):
            super().__init__(*args)
            self.started = time.perf_counter()
            self.interaction = iter(self.interaction)
            following = timed(lambda: next(interaction), "environment")
            interaction, self.interaction = self.interaction, iter(following, None)

        def __exit__(self, *args):
            spent["wall"] = time.perf_counter() - self.started
            super().__exit__(*args)

    update, original = dreamer.update, utils.Run

    def measure(repeats):
        spent.update(updates=0.0, environment=0.0)
        with tempfile.TemporaryDirectory() as folder:
            cfg = configuration(f"run_dir={folder}/run", f"device={device}", *overrides)
            dreamer.update, utils.Run = timed(update, "updates"), Run
            try:
                dreamer.train(cfg)
            finally:
                dreamer.update, utils.Run = update, original
        rest = spent["wall"] - spent["updates"] - spent["environment"]
        return {"seconds": rest / spent["wall"], "wall": spent["wall"]}

    return measure


def measure_loop(args, report):
    """The share of the wall time that is neither an update nor the environment."""
    import yaml

    preset = yaml.safe_load((ROOT / "config_laptop.yaml").read_text())
    keys = ("replay_buffer", "networks", "optimization")
    overrides = [f"{group}.{k}={v}" for group in keys for k, v in preset.get(group, {}).items()]
    overrides += ["collector.total_steps=6_000", "eval.every=0", "checkpoint.every=6_000",
                  "optimization.pretrain=20"]  # fmt: skip
    common = {"device": args.device, "threads": args.threads, "overrides": overrides}
    runs = [build_loop(**common)(1) for _ in range(1 if args.quick else 3)]
    report["loop"] = {"rows": {"neither updates nor environment": summary(runs)}}


# -------------------------------------------------------------------------------------------------
# Report


def machine(args):
    """What the numbers depend on: processor, GPU, memory, threads, versions."""
    import torch

    device = torch.device(args.device)
    set_threads(args.threads)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    versions = {name: metadata.version(name) for name in ("torch", "torchrl", "tensordict")}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type, "gpu": gpu, "cpu": cpu, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability(),
        "free_gib": round(available_gib(), 1), "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }  # fmt: skip


def table(header, rows):
    """A Markdown table; numbers with three digits, nothing as a dash."""

    def cell(value):
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        return "-" if value is None else str(value)

    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def statistics_table(rows, unit, scale, ratio=None):
    """Median, min, max and runs of each row, and, as `ratio`, its speed-up over the first."""
    header = ["", f"{unit}, median", "min", "max", "runs"] + [ratio] * bool(ratio)
    lines = []
    for name, row in rows.items():
        line = [name, *(row[key] * scale for key in ("median", "min", "max")), row["runs"]]
        lines.append(line + [row.get("vs_baseline")] * bool(ratio))
    return table(header, lines)


def update_tables(title, measured):
    """Two tables of one size: whole updates, and their phases."""
    header = ["", "s, median", "min", "max", "runs", f"times faster than {BASELINE}",
              "than the library, same precision and switches", "peak GiB", "floor, s"]  # fmt: skip
    keys = ("median", "min", "max", "runs", "vs_baseline", "vs_peer", "gib", "floor")
    rows = measured["rows"]
    whole = table(header, [[name, *(row.get(k) for k in keys)] for name, row in rows.items()])
    phases = [[name, *(row["phases"][phase] for phase in PHASES)] for name, row in rows.items()]
    lean = "Memory was short: every turn warmed up anew.\n\n" * measured["lean"]
    return [f"## One update, {title}\n", lean + whole, "Seconds by phase (medians).\n",
            table(["", *PHASES], phases)]  # fmt: skip


def markdown(report):
    """The whole report as Markdown."""
    about, parts = report["machine"], ["# Throughput\n"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts.append(
        f"{about['gpu'] or 'CPU'}; {about['cpu']}, {about['cores']} cores, {about['threads']}"
        f" threads, {about['isa']}; {about['free_gib']} GiB free, load {about['load']:.1f} at the"
        f" start.\n{versions}. {report['date']}{', --quick' * report['quick']}.\n\n"
        "Variants took turns; a ratio is the median of the ratios within a round.\n"
        '"tuned": the allocator keeps big blocks, and float32 matmuls take the fast path; ours'
        " always does unless it says untuned.\n"
    )
    if "floor" in report:
        header = ["matmul", "GFLOP/s", f"{GFLOP} GFLOP, s", "relative error", "runs"]
        keys = ("gflops", "floor", "error", "runs")
        lines = [[name, *(row[k] for k in keys)] for name, row in report["floor"].items()]
        parts += ["## Floor\n", f"One update from 50 x 50 frames is {GFLOP} GFLOP.\n"]
        parts += [table(header, lines)]
    for title, measured in report.get("update", {}).items():
        parts += update_tables(title, measured)
    if "ablation" in report:
        parts += [f"## One update, {report['ablation']['size']}, with one thing switched off\n"]
        rows = report["ablation"]["rows"]
        parts += [statistics_table(rows, "s", 1, "times the time of everything on")]
    if "collection" in report:
        parts += ["## One agent step: two physics steps and a 64 x 64 image of cheetah run\n"]
        parts += [statistics_table(report["collection"], "ms", 1e3, "times faster than bare")]
    if "replay" in report:
        replay = report["replay"]
        stored = f"{replay['rows_stored']:,} rows, {replay['gib_stored'] or 0:.1f} GiB"
        parts += [f"## One batch of 50 x 50 frames from {stored} on disk\n"]
        parts += [statistics_table(replay["rows"], "ms", 1e3, "times faster than the gather")]
    if "start" in report:
        parts += ["## From a fresh process to the first update\n"]
        parts += [f"`python dreamer.py {' '.join(report['start']['overrides'])}`\n"]
        parts += [statistics_table(report["start"]["rows"], "s", 1)]
    if "loop" in report:
        parts += ["## What a run does besides, without evaluation: per cent of the wall time\n"]
        parts += [statistics_table(report["loop"]["rows"], "%", 100)]
    return "\n".join(parts)


def listed(text):
    """A comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def main():
    """Measures the chosen sections, prints the tables and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--only", type=listed, default=SECTIONS, help=", ".join(SECTIONS))
    parser.add_argument("--sizes", type=listed, help="updates whose size has: pixels,8 x 16")
    parser.add_argument("--variants", type=listed, help="updates whose name has: ours")
    parser.add_argument("--rounds", type=int, help="turns of each variant; default 7, quick 3")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "throughput.json")
    args = parser.parse_args()
    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.rounds = args.rounds or (3 if args.quick else 7)
    if wrong := set(args.only) - set(SECTIONS):
        parser.error(f"--only {','.join(wrong)}: choose from {', '.join(SECTIONS)}")
    about, date = machine(args), datetime.date.today().isoformat()
    report = {"date": date, "quick": args.quick, "machine": about}
    print(json.dumps(about), flush=True)
    measures = (
        measure_floor,
        measure_updates,
        measure_ablation,
        measure_collection,
        measure_replay,
        measure_start,
        measure_loop,
    )
    for section, measure in zip(SECTIONS, measures):
        if section in args.only:
            start = time.perf_counter()
            measure(args, report)
            print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(f"\n{markdown(report)}\nwritten: {args.out} and {args.out.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
