"""How long experience takes: one step of acting, and one batch of the replay.

The sections `collection` and `replay` of throughput.py.
"""

import functools
import itertools
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tensordict import TensorDict

import dreamer
import dreamer_utils as utils
from common.opengl import select_gl
from common.replay import Replay
from common.rows import replay_layout
from measuring import ACTIONS, configuration, set_threads, synchronize
from workers import Worker, summarize, take_turns, times_faster


# --- collection: one agent step ------------------------------------------------------------------
def bare_cheetah(kept_camera):
    """A function that takes two physics steps of cheetah run and returns a 64 x 64 image."""
    from dm_control import suite  # here, for OpenGL must have been chosen before
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
    select_gl()
    step = bare_cheetah(kept_camera)

    def measure(repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return {"seconds": (time.perf_counter() - start) / repeats}

    return measure


def build_collection(device, threads, chunk, folder, copies=1):
    """Our collector and replay: environments, policy with exploration noise, storage."""
    set_threads(threads)
    words = f"run_dir={folder}/run", f"device={device}", f"env.n_parallel_envs={copies}"
    cfg = configuration(*words)
    cfg.collector.total_steps = 100_000
    cfg.collector.random_steps = 0
    cfg.collector.train_every = chunk * cfg.env.action_repeat
    device, _ = utils.make_device(cfg)
    env = utils.make_env(cfg)
    agent = dreamer.make_agent(cfg, *utils.env_sizes(env)).to(device)
    replay = utils.make_replay(cfg, env, utils.make_run(cfg), device)
    noise = cfg.collector.exploration_noise
    policy = utils.Policy(agent, dreamer.collection_policy, scale=noise)
    collector = utils.make_collector(cfg, env, policy)

    def measure(repeats):
        taken, start = 0, time.perf_counter()
        while taken < repeats:
            transitions = collector.collect()
            replay.extend(transitions)
            taken += transitions.numel()
        return {"seconds": (time.perf_counter() - start) / taken}

    return measure


def measure_collection(args, report):
    """An agent step of ours against the same physics and image alone."""
    bare = {"bare, physics.render": False, "bare, kept camera": True}
    shared = {"device": args.device, "threads": args.threads, "chunk": 20}
    with tempfile.TemporaryDirectory() as folder:
        workers = [Worker(name, build_bare, kept_camera=kept) for name, kept in bare.items()]
        place = {"folder": f"{folder}/one"}
        workers.append(Worker("our collector and replay", build_collection, **place, **shared))
        # Copies are processes of the worker's own: it must neither be a daemon, nor share the
        # server that workers come from, for copies end with the process that they come from.
        place = {"folder": f"{folder}/two", "copies": 2, "daemon": False}
        place["context"] = multiprocessing.get_context("spawn")
        workers.append(Worker("the same, two copies", build_collection, **place, **shared))
        enough = 0.5 if args.quick else 3
        answers = take_turns(workers, args.rounds, enough, most=200, until=args.until)
    rows = {name: summarize(values) for name, values in answers.items()}
    for row in rows.values():
        if "bare, physics.render" in rows:
            row["vs_baseline"] = times_faster(row, rows["bare, physics.render"])
    return rows


# --- replay: one batch ---------------------------------------------------------------------------
def fill_replay(replay, episodes, steps):
    """Adds episodes of random frames, `steps` agent steps each."""
    generator = np.random.default_rng(0)
    for _ in range(episodes):
        frames = generator.integers(0, 256, (steps + 1, 64, 64, 3), np.uint8)
        rows = {
            "observation": torch.from_numpy(frames),
            "action": torch.rand(steps + 1, ACTIONS),
            "reward": torch.rand(steps + 1),
            "terminated": torch.zeros(steps + 1, dtype=torch.bool),
        }
        replay.add_episode(TensorDict(rows, [steps + 1]))


def seconds_each(function, repeats, device, between=None):
    """Mean seconds of a call; those of `between`, which comes before each, do not count."""
    total = 0.0
    for _ in range(repeats):
        if between:
            between()
        start = time.perf_counter()
        function()
        synchronize(device)
        total += time.perf_counter() - start
    return total / repeats


def build_replay(device, threads, rows, folder):
    """Our replay on disk, filled with random bytes, and three ways to take a batch from it."""
    set_threads(threads)
    device, steps = torch.device(device), 500
    cfg = configuration()
    _, layout = replay_layout(cfg, (64, 64, 3), ACTIONS)
    cfg, episodes = cfg.replay_buffer, rows // (steps + 1)
    rows = episodes * (steps + 1)
    replay = Replay(cfg, rows, layout, Path(folder) / "replay", 2, device)
    fill_replay(replay, episodes, steps)
    stored = replay.files
    starts = torch.arange(cfg.batch_length)
    work = torch.randn(1024, 1024, device=device)

    def gather():
        episode = torch.randint(episodes, (cfg.batch_size // cfg.batch_length, 1))
        first = torch.randint(steps + 2 - cfg.batch_length, episode.shape)
        index = episode * (steps + 1) + first + starts
        return {key: stored[key][index].to(device) for key in stored.keys()}

    def busy(seconds=0.2):
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            torch.matmul(work, work)
            synchronize(device)

    def measure(repeats):
        sampled = seconds_each(replay.sample, repeats, device)
        few = max(repeats // 4, 1)
        batches = replay.batches(few + 1)
        next(batches)
        waited = seconds_each(lambda: next(batches), few, device, between=busy)
        return {
            "seconds": sampled,
            "gather": seconds_each(gather, repeats, device),
            "waited": waited,
            "gib": rows * sum(values[0].nbytes for values in stored.values()) / 2**30,
        }

    return measure


def measure_replay(args, report):
    """A batch through our replay, against a gather of the same rows from the memory map."""
    rows = 10_000 if args.quick else 200_000
    shared = {"device": args.device, "threads": args.threads, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker("replay", build_replay, folder=folder, **shared)
        answers = take_turns([worker], args.rounds, enough=0.2).get("replay", [])
    titles = {
        "gather": "plain gather from the memory map",
        "seconds": "our replay, one batch after the other",
        "waited": "our replay, drawn ahead during 0.2 s of work",
    }
    table = {}
    for key, title in titles.items() if answers else ():
        table[title] = summarize([{"seconds": answer[key]} for answer in answers])
        table[title]["vs_baseline"] = times_faster(table[title], table[titles["gather"]])
    size = answers[0]["gib"] if answers else None
    return {"rows_stored": rows, "gib_stored": size, "rows": table}
