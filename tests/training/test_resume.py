"""A run that is stopped and started again ends with the same bits as one that is not."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torchrl.envs import step_mdp

import common.run
import dreamer
import dreamer_utils as utils
from common.checkpoint import save_checkpoint
from common.episodes import EpisodeSeeds, ResumableCollector
from common.errors import UserError
from common.run import Run
from fingerprint import fingerprint
from small_runs import SMALL, configure, small, start, wait_for

# Phases of 30 steps cut episodes of 40, and 150 of 240 steps fit into the replay.
CUT = ["collector.train_every=30", "checkpoint.every=30", "replay_buffer.capacity=150"]
CASES = {
    "whole episodes": ["checkpoint.every=40"],
    "cut episodes, full replay": CUT,
    "two copies": [*CUT, "env.n_parallel_envs=2", "collector.random_steps=120"],
    "gymnasium": [
        *CUT,
        "env.backend=gymnasium",
        "env.name=Hopper-v5",
        "env.task=''",
        "replay_buffer.batch_length=3",
        "optimization.predict_discount=true",
    ],
    "pixels, bfloat16": [*CUT, "env.from_pixels=true", "optimization.autocast=bfloat16"],
}


class Stop(BaseException):
    """Ends a run like a power cut would: nothing after it runs."""


def stopped_after(saves, run_dir, *overrides):
    """Runs until `saves` checkpoints are written; returns whether the run ended by itself."""
    count = 0

    def save(*args):
        nonlocal count
        kept, count = save_checkpoint(*args), count + 1
        if count > saves:
            raise Stop  # before the run forgets what older checkpoints needed
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.run, "save_checkpoint", save)
        try:
            small(run_dir, *overrides)
        except Stop:
            return False
    return True


def stop_after_phases(phases, run_dir, *overrides):
    """Acts for so many phases, and ends where the next one would begin."""
    original, count = ResumableCollector.collect, 0

    def collect(self):
        nonlocal count
        count += 1
        if count > phases:
            raise Stop
        return original(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(ResumableCollector, "collect", collect)
        small(run_dir, *overrides)


@pytest.mark.parametrize("case", CASES)
def test_stopped_at_every_checkpoint_it_ends_with_the_same_bits(tmp_path, case):
    small(tmp_path / "whole", *CASES[case], "name=one")
    starts = 1
    while not stopped_after(1, tmp_path / "stopped", *CASES[case], "name=one"):
        starts += 1
    assert starts >= 4
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


def test_rows_overwritten_after_the_checkpoint_come_back(tmp_path):
    flags = *CUT, "checkpoint.every=90", "name=one"
    small(tmp_path / "whole", *flags)
    stop_after_phases(7, tmp_path / "run", *flags)  # at step 210, saved at step 180
    assert list((tmp_path / "run" / "replay" / "undo").iterdir())
    small(tmp_path / "run", *flags)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


@pytest.mark.faults
def test_a_compiled_run_ends_with_the_same_bits(tmp_path):
    flags = *CUT, "optimization.compile=true", "optimization.autocast=bfloat16", "name=one"
    small(tmp_path / "whole", *flags)
    while not stopped_after(3, tmp_path / "stopped", *flags):
        pass
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


def test_a_finished_run_stays_as_it_is(tmp_path):
    small(tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    small(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == before


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    flags = "eval.every=0", "logger.every=40"
    small(tmp_path / "long", *flags)
    small(tmp_path / "short", *flags, "collector.total_steps=160")
    _, rows = small(tmp_path / "short", *flags, "collector.total_steps=240")
    weights, whole = small(tmp_path / "long", *flags)
    assert small(tmp_path / "short", *flags)[0] == weights
    assert rows == whole


def test_rows_written_after_the_checkpoint_are_not_there_twice(tmp_path):
    flags = "checkpoint.every=120", "logger.every=40"
    _, whole = small(tmp_path / "whole", *flags)
    stop_after_phases(5, tmp_path / "run", *flags)  # at step 200, saved at step 120
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 5
    assert small(tmp_path / "run", *flags)[1] == whole


MANY_UPDATES = "collector.total_steps=800", "optimization.train_ratio=0.5"


@pytest.fixture(scope="module")
def many_updates(tmp_path_factory):
    """The fingerprint of the run with many updates, undisturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    small(run, *MANY_UPDATES)
    return fingerprint(run)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_the_run_within_one_update(tmp_path, many_updates, number, code):
    process = start("dreamer.py", *SMALL, f"run_dir={tmp_path / 'run'}", *MANY_UPDATES)
    rows = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: rows.exists() and rows.read_text().count("\n") > 3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "the same command goes on" in said and "Traceback" not in said
    small(tmp_path / "run", *MANY_UPDATES, f"name={configure(*SMALL).name}")
    assert fingerprint(tmp_path / "run") == many_updates


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    flags = "optimization.pretrain=100000", "collector.total_steps=1200"
    process = start("dreamer.py", *SMALL, f"run_dir={tmp_path / 'run'}", *flags)
    wait_for(lambda: list((tmp_path / "run").glob("checkpoints/checkpoint-*")))
    time.sleep(3)
    process.send_signal(signal.SIGSTOP)  # both arrive before the update ends
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in said, said


def test_a_signal_reaches_the_previous_handler_of_usr2(tmp_path):
    """submitit's handler puts the job into the queue again."""
    called, original = [], Run.count_steps

    def count_steps(self, transitions):
        original(self, transitions)
        if self.step == 120:
            os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Run, "count_steps", count_steps)
            small(tmp_path / "run")
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == [signal.SIGUSR2]
    small(tmp_path / "run")
    small(tmp_path / "whole")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_an_unfinished_episode_is_repeated_exactly():
    cfg = configure(*SMALL, "env.from_pixels=true")
    seeds = EpisodeSeeds(3, 0)
    steps = utils.build_env(cfg, [seeds]).rollout(7)
    repeated = EpisodeSeeds(3, 0, seeds.episode - 1, steps["action"])
    again = utils.build_env(cfg, [repeated]).reset()
    wanted = step_mdp(steps[-1])
    assert torch.equal(again["observation"], wanted["observation"])
    assert again["step_count"] == wanted["step_count"] == 7


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(tmp_path, capsys):
    """Its checkpoints had other parts, and they stay as they are."""
    cfg = configure(*SMALL, f"run_dir={tmp_path / 'run'}")
    agent = dreamer.train(cfg)
    checkpoints = tmp_path / "run" / "checkpoints"
    progress = SimpleNamespace(state_dict=lambda: {"step": 240, "updates": 6})
    metadata = {"step": 240, "episodes": 6, "config": {}}
    save_checkpoint(checkpoints, 1, 250, metadata, {"agent": agent, "progress": progress})
    before = {path.name: path.read_bytes() for path in checkpoints.iterdir()}
    assert len(before) == 1
    capsys.readouterr()
    with pytest.raises(UserError, match="earlier version.*another name=") as refused:
        dreamer.train(cfg)
    assert "\n" not in str(refused.value)
    assert "cannot be used" not in capsys.readouterr().out, "it is not damaged"
    assert {path.name: path.read_bytes() for path in checkpoints.iterdir()} == before


def test_the_cost_of_a_checkpoint_does_not_grow_with_the_replay(tmp_path):
    small(tmp_path / "run", "checkpoint.every=40")
    sizes = [path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(sizes) == 2 and max(sizes) - min(sizes) < 1000


def test_resident_memory_and_open_files_stay_flat(tmp_path):
    """200 episodes, measured from the 100th on."""
    seen, original = [], Run.reported

    def reported(self):
        original(self)
        pages = int(open("/proc/self/statm").read().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        seen.append((self.step, pages * os.sysconf("SC_PAGE_SIZE"), files))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "reported", reported)
        small(
            tmp_path / "run",
            "env.time_limit=20",
            "collector.total_steps=4000",
            "collector.random_steps=40",
            "collector.train_every=20",
            "checkpoint.every=200",
        )
    late = [row for row in seen if row[0] >= 2000]
    # A picture that is being drawn at that moment has a file open.
    assert min(row[2] for row in late[-20:]) <= min(row[2] for row in late[:20])
    assert late[-1][1] - late[0][1] < 30e6


def test_the_dashboard_goes_on_with_the_same_run(tmp_path):
    small(tmp_path / "run", "logger.mode=offline", "collector.total_steps=160")
    small(tmp_path / "run", "logger.mode=offline")
    # offline-run-DATE-ID, and -1 at the end if both started in the same second.
    parts = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({part.name.split("-")[3] for part in parts}) == 1


def test_times_are_in_a_file_of_their_own(tmp_path):
    _, rows = small(tmp_path / "run")
    times = (tmp_path / "run" / "throughput.jsonl").read_text().splitlines()
    timed = [json.loads(row)["environment_steps"] for row in times]
    assert timed == [row["environment_steps"] for row in rows]
    assert not [key for row in rows for key in row if key.startswith("throughput/")]
