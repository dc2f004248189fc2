"""Evaluation of a checkpoint: what training saw, more episodes, films, dreams from any step."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dm_control.rl.control import Environment
from matplotlib.image import imread
from PIL import Image

import dreamer
import dreamer_utils as utils
from common.agents import find_checkpoint
from common.errors import UserError
from common.frames import COLORS
from small_runs import SMALL, configure, run_command, small
from watched_run import frames_of


def evaluate(checkpoint, *overrides):
    """What evaluation of a checkpoint writes: the folder, and its numbers."""
    cfg = configure(f"eval.checkpoint={checkpoint}", "device=cpu", *overrides)
    utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation)
    path, metadata, _ = find_checkpoint(checkpoint)
    folder = path.parents[1] / f"evaluation_{metadata['step']:09d}"
    return folder, json.loads((folder / f"{cfg.eval.episodes}_episodes.json").read_text())


def test_a_checkpoint_gives_what_training_saw_to_the_bit(watched):
    run, _, rows = watched
    paths = sorted((run / "checkpoints").iterdir())
    assert len(paths) == 3
    for path in paths:
        _, numbers = evaluate(path, "eval.episodes=2")
        (row,) = [row for row in rows if f"{row['environment_steps']:09d}" in path.name]
        seen = {key: row[key] for key in numbers if key != "returns"}
        assert {key: numbers[key] for key in seen} == seen
        assert set(numbers) - {"returns"} >= {"eval/return", "behavior/return_gap"}


def test_evaluation_has_a_time_limit_of_its_own(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "exported"
    weights, rows = small(run, "eval.time_limit=60")
    assert {row["train/length"] for row in rows if "train/length" in row} == {40}
    assert {row["eval/length"] for row in rows if "eval/length" in row} == {60}
    assert weights == small(tmp_path / "without")[0]
    utils.export_agent(configure(f"export={run}", f"export_dir={folder}"))
    for checkpoint in (run, folder):
        cfg = configure(f"eval.checkpoint={checkpoint}", "device=cpu")
        utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation)
        [path] = checkpoint.glob("evaluation_*/1_episodes.json")
        assert json.loads(path.read_text())["eval/length"] == 60
    assert evaluate(run, "eval.time_limit=20")[1]["eval/length"] == 20


def test_more_episodes_begin_with_the_same_ones(watched):
    few, many = (evaluate(watched[0], f"eval.episodes={n}")[1]["returns"] for n in (1, 3))
    assert len(many) == 3 and many[:1] == few
    assert len(set(many)) == 3


def test_evaluation_prints_every_return(watched, capsys):
    _, numbers = evaluate(watched[0], "eval.episodes=3")
    said = capsys.readouterr().out
    for number, value in enumerate(numbers["returns"], 1):
        assert f"episode {number}: return {value:.2f}" in said
    assert f"mean {np.mean(numbers['returns']):.2f}, standard deviation" in said
    evaluate(watched[0], "eval.episodes=1")
    assert "mean" not in capsys.readouterr().out, "a single return has no spread"


def test_films_of_a_checkpoint(watched):
    folder, _ = evaluate(watched[0], "eval.episodes=2", "eval.video=true")
    films = {path.name for path in folder.glob("*.mp4")}
    assert films >= {"dream.mp4", "open_loop.mp4", "evaluation_1.mp4", "evaluation_2.mp4"}
    in_training = watched[0] / "videos" / "open_loop_000000240.mp4"
    assert (frames_of(folder / "open_loop.mp4") == frames_of(in_training)).all()


def test_the_command_line_draws_a_dream_from_any_step(watched):
    chosen = "eval.episodes=2", "eval.dream_episode=2", "eval.dream_step=20"
    done = run_command(f"eval.checkpoint={watched[0]}", *chosen, "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "episode 2: return" in done.stdout
    strip = imread(watched[0] / "evaluation_000000240" / "dream_from_2_20.png")[..., :3]
    orange = np.abs(strip - np.array(COLORS["open loop"]) / 255).max(-1) < 0.02
    green = np.abs(strip - np.array(COLORS["seen"]) / 255).max(-1) < 0.02
    assert orange.sum() > 1000 and green.sum() > 300
    film = frames_of(watched[0] / "evaluation_000000240" / "dream_from_2_20.mp4")
    assert film.shape == (3 + 10, 330, 5 * 68 * 4, 3)
    with Image.open(watched[0] / "evaluation_000000240" / "dream_from_2_20.gif") as gif:
        assert (gif.n_frames, gif.size) == (len(film), (5 * 68 * 4, 330))
        gif.seek(7)
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - film[7]).mean() < 6


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["eval.checkpoint=runs/nowhere"], "does not exist"),
        (["eval.checkpoint=tests"], "holds no checkpoints"),
        (["eval.video=true"], "need eval.checkpoint"),
        (["eval.dream_step=20"], "eval.dream_step needs eval.dream_episode=1"),
        (["eval.dream_episode=1"], "need eval.checkpoint"),
        (["eval.checkpoint={run}", "eval.dream_episode=two"], "should be a valid integer"),
        (["eval.checkpoint={run}", "eval.dream_episode=4"], "there are episodes 1 to 1"),
        (
            ["eval.checkpoint={run}", "eval.dream_episode=1", "eval.dream_step=9000"],
            "can be left at the steps 0 to",
        ),
        (["eval.checkpoint={run}", "env.name=walker"], "brings its own configuration"),
    ],
)
def test_a_mistake_is_one_sentence(watched, words, sentence):
    done = run_command(*(word.format(run=watched[0]) for word in words))
    said = done.stderr.strip()
    assert done.returncode == 1 and sentence in said, said
    assert said.startswith("error: ") and "\n" not in said, said


def test_a_damaged_checkpoint_is_not_evaluated(watched, tmp_path):
    damaged, whole = tmp_path / "checkpoint-1", Path(find_checkpoint(watched[0])[0])
    damaged.write_bytes(whole.read_bytes()[:-7])
    with pytest.raises(UserError, match="can be loaded"):
        evaluate(damaged)


@pytest.fixture
def spied(monkeypatch):
    """(result, rewards, choices) of two episodes that a fresh agent plays.

    `rewards` are those of the simulator's steps, `choices` are (noise, action) of `mode_action`,
    first of the episodes, then of the dreams.
    """
    rewards, choices = [], []
    original_step, original_choice = Environment.step, dreamer.mode_action

    def step(self, action):
        time_step = original_step(self, action)
        rewards.append(time_step.reward)
        return time_step

    def mode_action(mean, std, noise):
        choices.append((noise, original_choice(mean, std, noise)))
        return choices[-1][1]

    monkeypatch.setattr(dreamer, "mode_action", mode_action)
    cfg = configure(*SMALL, "eval.episodes=2", "env.task=swingup")
    agent = dreamer.make_agent(cfg, (5,), 1)
    with contextlib.closing(dreamer.make_evaluation(cfg, agent)) as evaluation:
        monkeypatch.setattr(Environment, "step", step)
        yield evaluation(80), rewards, choices


def test_every_action_of_an_evaluation_is_the_densest_of_a_hundred(spied):
    """Without exploration noise."""
    result, _, choices = spied
    actions = torch.cat([episode["action"] for episode in result.episodes])
    assert len(actions) == 40
    for action, (noise, chosen) in zip(actions, choices[:40], strict=True):
        assert noise.shape == (100, 1, 1)
        assert torch.equal(action, chosen[0])


def test_an_evaluation_return_counts_every_step_of_the_episode(spied):
    result, rewards, _ = spied
    assert len(rewards) == 80 and result.metrics["eval/length"] == 40
    first, second = sum(rewards[:40]), sum(rewards[40:])
    assert rewards[39] > 0, "the last step must count for something"
    assert result.curves["return"] == pytest.approx([first, second], rel=1e-5)
    assert result.metrics["eval/return"] == pytest.approx((first + second) / 2, rel=1e-5)
