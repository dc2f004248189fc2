"""Replay: rows on the paper's time grid, sequences inside one episode, every observation once."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from common.errors import UserError
from common.replay import Replay
from small_runs import LAYOUT, small

CFG = SimpleNamespace(batch_length=5, batch_size=200)


def transitions(T, first=0, end="truncated", done=True):
    """An episode whose observation o_t is t, action a_t is t + 0.5, reward r_{t+1} is t + 1."""
    t = first + torch.arange(T)
    last = (torch.arange(T) == T - 1)[:, None] & done
    after = {
        "observation": (t + 1).float()[:, None],
        "reward": (t + 1).float()[:, None],
        "done": last,
        "terminated": last & (end == "terminated"),
        "truncated": last,
    }
    now = {
        "observation": t.float()[:, None],
        "action": (t + 0.5)[:, None],
        "terminated": torch.zeros(T, 1, dtype=torch.bool),
    }
    return TensorDict(now | {"next": TensorDict(after, [T])}, [T])


@pytest.fixture
def replay(tmp_path):
    replay = Replay(CFG, 1000, LAYOUT, tmp_path / "replay", 2, torch.device("cpu"))
    yield replay
    replay.close()


def test_a_row_is_the_observation_and_what_led_to_it(replay):
    assert replay.extend(transitions(12)) == [(sum(range(1, 13)), 24)]
    batch = replay.sample()
    assert batch.shape == (40, 5)
    assert torch.equal(batch["reward"], batch["observation"].squeeze(-1))
    led_here = (batch["observation"] - 0.5).clamp(min=0)
    assert torch.equal(batch["action"], led_here)
    assert (batch["observation"] == 0).any(), "the reset row is never sampled"
    assert (batch["observation"] == 12).any(), "the last row is never sampled"


def test_sequences_never_cross_episodes_and_unfinished_ones_wait(replay):
    replay.extend(transitions(9))
    replay.extend(transitions(30, first=100))
    assert replay.extend(transitions(3, first=500, done=False)) == []
    for _ in range(5):
        seen = replay.sample()["observation"].squeeze(-1)
        assert (seen.diff(dim=1) == 1).all()
        assert seen.max() < 500
    replay.extend(transitions(3, first=503))
    assert (replay.sample()["observation"] >= 500).any()
    assert replay.episodes == 3


def test_episodes_are_drawn_alike_whatever_their_length(replay):
    replay.extend(transitions(10))
    replay.extend(transitions(90, first=100))
    share = torch.cat([replay.sample()["observation"][:, 0] < 100 for _ in range(25)])
    assert abs(share.float().mean() - 0.5) < 0.06


def test_parallel_copies_are_stored_as_whole_episodes(replay):
    both = torch.stack([transitions(8), transitions(8, first=100)])
    replay.extend(both[:, :3])
    replay.extend(both[:, 3:])
    seen = replay.sample()["observation"].squeeze(-1)
    assert (seen.diff(dim=1) == 1).all() and (seen >= 100).any() and (seen < 100).any()


def test_only_a_true_end_is_marked(replay):
    replay.extend(transitions(6, end="terminated"))
    replay.extend(transitions(6, first=100))
    batch = torch.cat([replay.sample().flatten() for _ in range(5)])
    assert set(batch["observation"][batch["terminated"]].flatten().tolist()) == {6}


def test_episodes_shorter_than_a_sequence_are_a_clear_message(replay):
    replay.extend(transitions(3))
    with pytest.raises(UserError, match="no episode has .*batch_length=5 rows .1 were shorter"):
        replay.sample()


def test_the_oldest_rows_are_overwritten(tmp_path):
    replay = Replay(CFG, 30, LAYOUT, tmp_path / "replay", 2, torch.device("cpu"))
    for first in (0, 100, 200, 300):
        replay.extend(transitions(9, first=first))
    seen = torch.cat([replay.sample()["observation"].squeeze(-1) for _ in range(5)])
    assert (seen.diff(dim=1) == 1).all() and seen.min() >= 100 and (seen >= 300).any()


def test_what_is_left_of_an_overwritten_episode_is_not_sampled(tmp_path):
    """Two of its ten rows are still there: less than a sequence."""
    replay = Replay(CFG, 30, LAYOUT, tmp_path / "replay", 2, torch.device("cpu"))
    for first in (0, 100, 200):
        replay.extend(transitions(9, first=first))
    replay.extend(transitions(7, first=300))
    for _ in range(5):
        batch = replay.sample()
        assert batch.shape == (40, 5)
        seen = batch["observation"].squeeze(-1)
        assert (seen.diff(dim=1) == 1).all() and seen.min() >= 100 and (seen >= 300).any()
    replay.close()


def test_a_task_that_ends_is_told_of_once_if_the_model_does_not_learn_it(tmp_path, capsys):
    args = CFG, 1000, LAYOUT, tmp_path / "replay", 2, torch.device("cpu"), 0
    for learns_ends, times in ((False, 1), (True, 0)):
        replay = Replay(*args, learns_ends)
        replay.extend(transitions(9))
        assert capsys.readouterr().out == ""
        for _ in range(3):
            replay.extend(transitions(9, end="terminated"))
        assert capsys.readouterr().out.count("optimization.predict_discount=true") == times
        replay.close()


def test_a_step_takes_at_most_12_6_kilobytes(tmp_path):
    flags = "env.from_pixels=true", "env.name=quadruped", "env.task=walk", "env.time_limit=100"
    small(
        tmp_path / "run",
        *flags,
        "collector.total_steps=400",
        "collector.random_steps=400",
        "eval.every=0",
    )
    files = (tmp_path / "run" / "replay").glob("*.memmap")
    used = sum(path.stat().st_blocks * 512 for path in files)
    assert used <= 12_600 * 204  # 4 episodes of 51 rows


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="lower replay_buffer.capacity, or choose another"):
        small(tmp_path / "run")
