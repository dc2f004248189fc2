"""What a run shows: dashboard, films, panel, card; and the evaluation of its checkpoints."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from small_runs import ROOT, SMALL, configure, small

import dreamer
import dreamer_utils as utils

PIXELS = ["env.from_pixels=true", "eval.episodes=2", "name=one", "checkpoint.every=80",
          "checkpoint.keep=3"]  # fmt: skip
WATCHED = [*PIXELS, "logger.video=true", "logger.mode=offline"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run from pixels with everything on: its directory, its weights, its metrics."""
    run = tmp_path_factory.mktemp("watched") / "run"
    return run, *small(run, *WATCHED)


def frames_of(path):
    """All frames of a film, [T, h, w, 3]."""
    from moviepy import VideoFileClip

    with VideoFileClip(str(path)) as film:
        return np.stack(list(film.iter_frames())).astype(int)


def close(colour, wanted):
    return np.abs(np.asarray(colour) - wanted).max() < 60  # a film rounds colours


# Films -----------------------------------------------------------------------------------------


def test_everything_on_or_off_the_weights_are_the_same(watched, tmp_path):
    run, weights, _ = watched
    off = small(tmp_path / "off", *PIXELS, "eval.every=0", "logger.every=240")
    assert off[0] == weights
    assert not (tmp_path / "off" / "videos").exists()


def test_every_evaluation_leaves_its_films(watched):
    names = sorted(path.name for path in (watched[0] / "videos").iterdir())
    kinds = "dream", "evaluation_1", "evaluation_2", "open_loop"
    assert names == sorted(f"{kind}_{step:09d}.mp4" for kind in kinds for step in (80, 160, 240))


def test_the_evaluation_film_shows_the_episode(watched):
    film = frames_of(watched[0] / "videos" / "evaluation_1_000000240.mp4")
    assert film.shape == (21, 256, 256, 3)
    assert film.std() > 5


def test_the_dream_stands_beside_the_real_episode(watched):
    film = frames_of(watched[0] / "videos" / "dream_000000240.mp4")
    assert film.shape == (21, 68 * 3, 2 * 68 * 3, 3)
    for half in (0, 68 * 3):  # border: green for what the model has seen, then orange
        assert close(film[4, 1:3, half + 20 : half + 180].mean((0, 1)), utils.SEEN)
        assert close(film[5, 1:3, half + 20 : half + 180].mean((0, 1)), utils.DREAMED)


def test_the_open_loop_film_has_six_sequences_of_truth_model_and_error(watched):
    film = frames_of(watched[0] / "videos" / "open_loop_000000240.mp4")
    assert film.shape == (21, 3 * 136, 6 * 136, 3)
    truth, model, error = (film[:, at + 4 : at + 132] for at in (0, 136, 272))
    inside = np.concatenate([np.arange(i * 136 + 4, i * 136 + 132) for i in range(6)])
    truth, model, error = (part[:, :, inside] for part in (truth, model, error))
    assert np.abs(np.abs(truth - model) - error).mean() < 12
    assert error.mean() > 5  # two updates do not make a model


def test_open_loop_frames_put_every_sequence_in_its_column():
    rows = torch.arange(30).mul(8).byte()[:, None, None, None].expand(30, 64, 64, 3)
    first = torch.tensor([0, 20])
    predicted = torch.zeros(2, 10, 3, 64, 64)  # grey 127 or 128
    frames = utils.open_loop_frames({"observation": rows}, predicted, first)
    assert frames.shape == (10, 3 * 136, 2 * 136, 3)
    assert frames[3, 60, 60, 0] == 24 and frames[3, 60, 196, 0] == 23 * 8
    assert frames[3, 196, 60, 0] in (127, 128)
    assert frames[3, 332, 60, 0] == abs(frames[3, 196, 60, 0].int() - 24)
    assert tuple(frames[4, 0, 0].tolist()) == utils.SEEN
    assert tuple(frames[5, 0, 0].tolist()) == utils.DREAMED


def test_a_film_that_fails_is_one_line_and_training_goes_on(watched, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise OSError("no encoder here")

    monkeypatch.setattr(utils, "write_film", fail)
    weights, rows = small(tmp_path / "run", *PIXELS, "logger.video=true")
    assert weights == watched[1] and rows == watched[2]
    said = "".join(capfd.readouterr())
    assert "could not be drawn (no encoder here); training goes on" in said
    assert "Traceback" not in said


def test_films_are_made_at_every_second_evaluation_if_asked(tmp_path):
    small(tmp_path / "run", *PIXELS, "logger.video=true", "logger.video_every=2")
    steps = {path.stem[-9:] for path in (tmp_path / "run" / "videos").iterdir()}
    assert steps == {"000000160"}


# Panel, curves and card ------------------------------------------------------------------------


def test_the_panel_is_a_picture_with_something_on_it(watched):
    picture = imread(watched[0] / "panel.png")[..., :3]
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert (picture.reshape(-1, 3).std(1) > 0.05).sum() > 2000  # coloured lines


def test_honesty_is_measured_at_every_evaluation(watched):
    run, _, rows = watched
    curves = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    assert [row["environment_steps"] for row in curves] == [80, 160, 240]
    assert len(curves[-1]["observation_error"]) == len(curves[-1]["reward_error"]) == 16
    assert len(curves[-1]["return"]) == 2
    evaluated = [row for row in rows if "eval/return" in row]
    wanted = {"world_model/open_loop_observation_error", "world_model/open_loop_reward_error",
              "world_model/open_loop_copied_observation", "world_model/open_loop_copied_reward",
              "behavior/return_gap", "behavior/value_bias", "behavior/action_saturation",
              "world_model/kl_at_floor", "eval/published_mean"}  # fmt: skip
    assert len(evaluated) == 3 and all(wanted <= set(row) for row in evaluated)
    for row, curve in zip(evaluated, curves):
        for name in ("observation_error", "reward_error"):
            mean = row[f"world_model/open_loop_{name}"]
            assert mean == pytest.approx(np.mean(curve[name]), rel=1e-3)


def test_the_published_curve_at_the_same_steps():
    cfg = configure("env.name=ball_in_cup", "env.task=catch")
    curve = utils.published(cfg.env)
    assert curve[0, 0] == 5000 and (curve[:, 2] <= curve[:, 1]).all()
    assert (curve[:, 1] <= curve[:, 3]).all()
    assert utils.published(configure("env.name=dog", "env.task=run").env) is None


def test_the_card_has_the_run_in_numbers(watched):
    run, _, rows = watched
    card = json.loads((run / "run.json").read_text())
    assert (card["state"], card["environment_steps"], card["updates"]) == ("finished", 240, 6)
    assert card["eval_return"] == rows[-1]["eval/return"] and card["eval_steps"] == 240
    returns = [row["eval/return"] for row in rows if "eval/return" in row]
    assert card["last_returns_mean"] == pytest.approx(np.mean(returns))
    assert card["last_returns_std"] == pytest.approx(np.std(returns))
    assert re.fullmatch(r"[0-9a-f]{12}", card["config_hash"])
    assert card["versions"]["torch"] and card["device"].startswith("cpu")
    assert card["wall_seconds"] > 0 and card["updates_per_second"] > 0
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", card["git_revision"])


def test_the_hash_of_a_configuration_knows_what_matters():
    def hashed(*overrides):
        return utils.about(configure(*SMALL, *overrides), torch.device("cpu"), None)["config_hash"]

    assert hashed() == hashed("logger.every=7") != hashed("optimization.gamma=0.9")


def test_the_summary_names_the_way_on(watched, capsys, tmp_path):
    small(watched[0], *WATCHED)
    said = capsys.readouterr().out
    assert "finished at 240 environment steps and 6 updates" in said
    assert f"eval.checkpoint={watched[0]} eval.episodes=10" in said
    assert f"benchmarks/plot.py {watched[0]}" in said


# Dashboard -------------------------------------------------------------------------------------


def records(path):
    """The records of a .wandb file: blocks of 32 KiB, with pieces of records that may go on in
    the next piece; 7 bytes before each say checksum, length and kind of piece."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(record)
            record = b""


def test_the_dashboard_has_what_the_file_says(watched):
    """Read from the file that wandb sends: history, configuration, definition of the x axis."""
    run, _, rows = watched
    path = min(run.glob("wandb/offline-run-*/*.wandb"))
    everything = list(records(path))
    history = []
    for record in everything:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json)
                            for item in items})  # fmt: skip
    for row in rows:
        (shown,) = [h for h in history if h.get("environment_steps") == row["environment_steps"]]
        for key, value in row.items():
            assert shown[key] == pytest.approx(value, nan_ok=True), key
    sections = {key.split("/")[0] for row in history for key in row if "/" in key}
    assert sections == {"eval", "train", "world_model", "behavior", "throughput"}
    media = {key.removesuffix("._type"): value for row in history for key, value in row.items()
             if key.endswith("._type")}  # fmt: skip
    assert media == {"eval/panel": "image-file", "eval/dream": "video-file",
                     "eval/open_loop": "video-file", "eval/evaluation_1": "video-file",
                     "eval/evaluation_2": "video-file"}  # fmt: skip
    metrics = [r.metric for r in everything if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "environment_steps" for m in metrics)
    config = {}
    for record in everything:
        kind = record.WhichOneof("record_type")
        updates = {"run": record.run.config.update, "config": record.config.update}.get(kind, ())
        for update in updates:
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
    assert config["seed"] == 0 and config["env"]["name"] == "cartpole"
    assert config["run"]["versions"]["torch"] and "git_revision" in config["run"]


# Evaluation of a checkpoint --------------------------------------------------------------------


def evaluate(checkpoint, *overrides):
    """What evaluation of a checkpoint writes: the folder, and its numbers."""
    cfg = configure(f"eval.checkpoint={checkpoint}", "device=cpu", *overrides)
    utils.evaluate(cfg, dreamer.EVALUATION)
    path = utils.find_checkpoint(Path(checkpoint))
    folder = path.parents[1] / f"evaluation_{int(path.stem.split('-')[1]):09d}"
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


def test_films_of_a_checkpoint(watched):
    folder, _ = evaluate(watched[0], "eval.episodes=2", "eval.video=true")
    films = {path.name for path in folder.glob("*.mp4")}
    assert films >= {"dream.mp4", "open_loop.mp4", "evaluation_1.mp4", "evaluation_2.mp4"}
    in_training = watched[0] / "videos" / "open_loop_000000240.mp4"
    assert (frames_of(folder / "open_loop.mp4") == frames_of(in_training)).all()


def test_the_command_line_draws_a_dream_from_any_step(watched):
    words = [f"eval.checkpoint={watched[0]}", "eval.episodes=2", "eval.dream_from=2,20"]
    done = subprocess.run([sys.executable, "dreamer.py", *words, "device=cpu"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "episode 2: return" in done.stdout
    strip = imread(watched[0] / "evaluation_000000240" / "dream_from_2_20.png")[..., :3]
    orange = np.abs(strip - np.array(utils.DREAMED) / 255).max(-1) < 0.02
    green = np.abs(strip - np.array(utils.SEEN) / 255).max(-1) < 0.02
    assert orange.sum() > 1000 and green.sum() > 300
    film = frames_of(watched[0] / "evaluation_000000240" / "dream_from_2_20.mp4")
    assert film.shape == (5 + 10, 4 * 68 * 3, 68 * 3, 3)


@pytest.mark.parametrize("words, sentence", [
    (["eval.checkpoint=runs/nowhere"], "does not exist"),
    (["eval.checkpoint=tests"], "holds no checkpoints"),
    (["eval.video=true"], "need eval.checkpoint"),
    (["eval.dream_from=1,2"], "need eval.checkpoint"),
    (["eval.checkpoint={run}", "eval.dream_from=3"], "give EPISODE,STEP"),
    (["eval.checkpoint={run}", "eval.dream_from=4,10"], "there are episodes 1 to 1"),
    (["eval.checkpoint={run}", "eval.dream_from=1,9000"], "can be left at the steps 0 to"),
    (["eval.checkpoint={run}", "env.name=walker"], "brings its own configuration"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(watched, words, sentence):
    words = [word.format(run=watched[0]) for word in words]
    done = subprocess.run([sys.executable, "dreamer.py", *words], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"COLUMNS": "200"})  # fmt: skip
    said = done.stderr.strip()
    assert done.returncode == 1 and sentence in said, said
    assert said.startswith("error: ") and "\n" not in said, said


def test_a_damaged_checkpoint_is_not_evaluated(watched, tmp_path):
    damaged = tmp_path / "checkpoint-1"
    damaged.write_bytes(utils.find_checkpoint(watched[0]).read_bytes()[:-7])
    with pytest.raises(utils.UserError, match="can be loaded"):
        evaluate(damaged)


# Curves of several runs ------------------------------------------------------------------------


def test_plot_draws_runs_over_the_published_curves(watched, tmp_path):
    small(tmp_path / "seed1", *PIXELS, "seed=1")
    small(tmp_path / "swing", *PIXELS, "env.task=swingup")
    runs = [str(watched[0]), str(tmp_path / "seed1"), str(tmp_path / "swing")]
    out = tmp_path / "curves.png"
    command = [sys.executable, "benchmarks/plot.py", *runs, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first = json.loads((watched[0] / "metrics.jsonl").read_text().splitlines()[-1])
    other = json.loads((tmp_path / "seed1" / "metrics.jsonl").read_text().splitlines()[-1])
    mean = (first["eval/return"] + other["eval/return"]) / 2
    assert f"| cartpole balance | 240 | {mean:.0f} | 136 |" in done.stdout
    assert "| cartpole swingup | 240 |" in done.stdout
    assert imread(out).std() > 0.05


def test_the_table_of_results_comes_from_the_cards(watched):
    command = [sys.executable, "benchmarks/results.py", str(watched[0])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| run | cartpole balance | 240 | 6 |" in done.stdout.splitlines()[-1]
