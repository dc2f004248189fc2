"""Rows of metrics and of the replay: whole or absent, and no damage ends in a traceback."""

import json
import os
import resource
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from common.checkpoint import checkpoint_paths, read_checkpoint
from common.envs import SuiteEpisodes
from common.errors import UserError
from common.evaluation import Evaluation
from common.files import RowFile, read_jsonl
from common.logger import Logger
from common.replay import Replay
from common.report import run_results
from common.rows import DROPPED, replay_layout, restore_rows
from fingerprint import fingerprint
from small_runs import LAYOUT, SMALL, configure, small

SHORT = ["collector.total_steps=160", "checkpoint.every=40", "name=one"]
JSONL = ["metrics.jsonl", "throughput.jsonl", "curves.jsonl"]


# Rows of JSON


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append({"a": 1})
    before = rows.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limits[1]))
    try:
        with pytest.raises(OSError):
            rows.append({"b": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rows.path.read_bytes() == before
    rows.append({"b": 2})
    assert read_jsonl(rows.path) == [{"a": 1}, {"b": 2}]


def test_a_row_never_holds_what_json_cannot_say(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append({"a": float("inf"), "b": [1.5, float("nan")], "c": 2})
    assert rows.path.read_bytes() == b'{"a": null, "b": [1.5, null], "c": 2}\n'


def damage(path, how):
    """Spoils one file."""
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "flipped":
        content[len(content) // 2] ^= 0x80
        path.write_bytes(content)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["deleted", "cut", "flipped", "emptied"])
@pytest.mark.parametrize("name", JSONL)
def test_a_damaged_file_of_rows_is_no_reason_to_stop(tmp_path, capsys, name, how):
    run = tmp_path / "run"
    small(run, *SHORT)
    damage(run / name, how)
    small(run, *SHORT[1:], "collector.total_steps=240")
    if how != "flipped":
        assert f"{name} was shortened: rows are missing" in "".join(capsys.readouterr())
    small(tmp_path / "whole", *SHORT[1:], "collector.total_steps=240")
    ours, whole = fingerprint(run), fingerprint(tmp_path / "whole")
    logged = {part for part in whole if "logger" in part or part.endswith(".jsonl")}
    assert {k: v for k, v in ours.items() if k not in logged} == {
        k: v for k, v in whole.items() if k not in logged
    }
    assert b"\0" not in (run / name).read_bytes()
    json.loads((run / name).read_bytes().splitlines()[-1])  # the last is a new one


def test_no_flipped_bit_of_a_row_stops_a_run(tmp_path):
    """Some leave a row that is JSON, but without its counters."""
    _, rows = small(tmp_path / "run", *SHORT)
    cfg = configure(*SMALL, f"run_dir={tmp_path / 'run'}")
    for name in JSONL[:2]:
        path = tmp_path / "run" / name
        content = path.read_bytes()
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            assert "wall_seconds" in run_results(tmp_path / "run")
            if place < 40:  # the counters come first
                logger = Logger(cfg, tmp_path / "run", torch.device("cpu"), {}, 160)
                assert len(logger.history) >= len(rows) - 1
                logger.__exit__(None, 0, 0)
        path.write_bytes(content)


# Observations


def test_an_observation_that_is_not_finite_is_never_stored(tmp_path, monkeypatch):
    """The last one of an episode: no action follows from it, so nothing else would notice."""
    original, count = SuiteEpisodes.step, 0

    def step(self, action):
        nonlocal count
        result, count = original(self, action), count + 1
        if count == 80:  # the last of the third episode, which comes after an evaluation
            result.observation["observation"][:] = float("nan")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SuiteEpisodes, "step", step)
        with pytest.raises(UserError, match="an observation that is not finite: mend the task"):
            small(tmp_path / "run", *SHORT)
    small(tmp_path / "run", *SHORT)
    small(tmp_path / "whole", *SHORT)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_first_observation_that_is_not_finite_is_never_stored(tmp_path, monkeypatch):
    """That of a reset, before random actions: it stands in no transition as the next one."""
    original, count = SuiteEpisodes.reset, 0

    def reset(self):
        nonlocal count
        result, count = original(self), count + 1
        if count == 3:
            result.observation["observation"][:] = float("nan")
        return result

    monkeypatch.setattr(SuiteEpisodes, "reset", reset)
    with pytest.raises(UserError, match="an observation that is not finite: mend the task"):
        small(tmp_path / "run", *SHORT, "collector.random_steps=160")


@pytest.mark.parametrize(
    "fault, words",
    [
        ("raises", "an episode of the evaluation failed .ValueError: it blew up.: mend the task"),
        ("reward", "a reward that is not finite in an evaluation: mend the task"),
    ],
)
def test_a_task_that_fails_in_an_evaluation_is_one_sentence(tmp_path, monkeypatch, fault, words):
    step, play, playing = SuiteEpisodes.step, Evaluation.play, []

    def faulty_step(self, action):
        if playing and fault == "raises":
            raise ValueError("it blew up")
        result = step(self, action)
        return result._replace(reward=float("nan")) if playing else result

    def marked_play(self):
        playing.append(True)
        return play(self)

    with monkeypatch.context() as patch:
        patch.setattr(SuiteEpisodes, "step", faulty_step)
        patch.setattr(Evaluation, "play", marked_play)
        with pytest.raises(UserError, match=words):
            small(tmp_path / "run", *SHORT)
    small(tmp_path / "run", *SHORT)
    small(tmp_path / "whole", *SHORT)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


# Short episodes and a full ring


def make_replay(directory, rows=60):
    cfg = SimpleNamespace(batch_length=5, batch_size=50)
    return Replay(cfg, rows, LAYOUT, directory, 1, torch.device("cpu"))


def episode(steps, first=0):
    """Transitions whose observation o_t is first + t."""
    t = first + torch.arange(steps).float()[:, None]
    last = torch.arange(steps)[:, None] == steps - 1
    after = {"observation": t + 1, "reward": t, "terminated": last, "done": last}
    now = {"observation": t, "action": t, "terminated": t < 0}
    return TensorDict(now | {"next": TensorDict(after, [steps])}, [steps])


def test_episodes_shorter_than_a_sequence_are_said_once_and_take_no_room(tmp_path, capsys):
    replay = make_replay(tmp_path / "replay")
    replay.extend(episode(20))
    for _ in range(30):
        assert replay.extend(episode(3)) == [(3.0, 3)]
    assert len(replay.buffer) == 21 and replay.left_out == 30
    for _ in range(3):
        assert replay.sample()["observation"].shape == (10, 5, 1)
    said = capsys.readouterr().out
    assert said.count("such episodes are not stored") == 1
    assert (
        "30 of 31 episodes so far (97%) have fewer rows than replay_buffer.batch_length=5" in said
    )
    again = make_replay(tmp_path / "replay")
    again.load_state_dict(replay.state_dict())
    again.sample()
    assert capsys.readouterr().out == ""


def test_only_short_episodes_are_a_clear_message(tmp_path):
    replay = make_replay(tmp_path / "replay")
    for _ in range(30):
        replay.extend(episode(2))
    with pytest.raises(UserError, match="no episode has .*batch_length=5 rows .30 were shorter"):
        replay.sample()


def test_a_ring_holds_all_that_its_capacity_promises_if_episodes_end_early(tmp_path):
    """268 episodes of 8 steps: each takes a row more, for its reset."""
    cfg = configure(
        "env.backend=gymnasium",
        "env.name=Hopper-v5",
        "env.task=",
        "env.action_repeat=1",
        "env.from_pixels=false",
        "replay_buffer.batch_length=5",
        "collector.random_steps=2144",
        "collector.total_steps=2144",
    )
    rows, _ = replay_layout(cfg, (1,), 1)
    replay = make_replay(tmp_path / "replay", rows)
    for number in range(268):
        replay.extend(episode(8, first=100 * number))
    assert len(replay.table) == replay.episodes == 268


# Damaged rows


@pytest.fixture
def damaged(tmp_path):
    """A run of 160 steps with one flipped bit in its second episode."""
    run = tmp_path / "run"
    small(run, *SHORT)
    path = run / "replay" / "reward.memmap"
    content = bytearray(path.read_bytes())
    content[4 * 25] ^= 1
    path.write_bytes(content)
    return run


def test_a_damaged_episode_can_be_dropped(damaged, capsys):
    more = [*SHORT[1:], "collector.total_steps=240"]
    with pytest.raises(UserError, match="can be loaded"):
        small(damaged, *more)
    assert "episode 1 in " in (said := capsys.readouterr().out) and "drop_damaged=true" in said
    small(damaged, *more, "checkpoint.drop_damaged=true")
    said = capsys.readouterr().out
    assert "dropped; the results are no longer the same to the bit" in said
    small(damaged, *more[:-1], "collector.total_steps=280")  # it stays dropped, without the key
    assert "is damaged" not in capsys.readouterr().out


def test_a_dropped_episode_is_never_sampled(tmp_path):
    replay = make_replay(tmp_path / "replay")
    for first in (0, 100):
        replay.extend(episode(20, first))
    state = replay.state_dict()
    replay.files["reward"][3] += 1
    restore_rows(replay.directory, state, drop_damaged=True)
    assert [row[2] == DROPPED for row in state["table"]] == [True, False]
    again = make_replay(tmp_path / "replay")
    again.load_state_dict(state)
    seen = torch.cat([again.sample()["observation"] for _ in range(10)])
    assert seen.min() >= 100
    assert os.path.exists(replay.directory / "reward.memmap")


def test_a_refused_start_leaves_a_full_ring_as_it_was(tmp_path, capsys):
    """Trying the older checkpoint takes rows back that the newer one needs."""
    run, ring = tmp_path / "run", [*SHORT[1:], "replay_buffer.capacity=120"]
    small(run, *ring, "collector.total_steps=320")
    newest = checkpoint_paths(run / "checkpoints")[0]
    _, states = read_checkpoint(newest, ["replay"])
    assert len(states["replay"]["table"]) < states["replay"]["episodes"]
    path = run / "replay" / "reward.memmap"
    content = bytearray(path.read_bytes())
    content[4 * ((states["replay"]["table"][0][0] + 5) % states["replay"]["rows"])] ^= 1
    path.write_bytes(content)
    before = {path.name: path.read_bytes() for path in (run / "replay").glob("*.memmap")}
    with pytest.raises(UserError, match="none of .*, .* can be loaded"):
        small(run, *ring, "collector.total_steps=400")
    for name, content in before.items():
        assert (run / "replay" / name).read_bytes() == content, name
    capsys.readouterr()
    small(run, *ring, "collector.total_steps=400", "checkpoint.drop_damaged=true")
    assert capsys.readouterr().out.count(": dropped;") == 1


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied"])
def test_damaged_rows_that_were_overwritten_can_be_dropped(tmp_path, capsys, how):
    run, flags = tmp_path / "run", ["replay_buffer.capacity=150", "name=one"]
    flags += ["collector.train_every=30", "checkpoint.every=90"]

    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Logger, "add_evaluation", interrupt)  # at step 210, saved at step 180
        small(run, *flags, "eval.every=210")
    kept = max((run / "replay" / "undo").iterdir())
    damage(kept, how)
    with pytest.raises(UserError, match="can be loaded"):
        small(run, *flags)
    said = capsys.readouterr().out
    assert f"{kept}: " in said and "checkpoint.drop_damaged=true goes on without it" in said
    small(run, *flags, "checkpoint.drop_damaged=true")
    assert f"{kept} is damaged" in capsys.readouterr().out
