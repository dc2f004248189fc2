"""Films and frames: what they show, and that they change nothing."""

import numpy as np
import pytest
import torch

import common.logger
from common.frames import (
    COLORS,
    evaluation_frames,
    open_loop_frames,
    reward_notes,
    write_text,
)
from common.video import write_film
from small_runs import small
from watched_run import PIXELS, frames_of


def close(color, wanted):
    """Whether two colors are one; a film rounds them."""
    return np.abs(np.asarray(color) - wanted).max() < 60


def test_everything_on_or_off_the_weights_are_the_same(watched, tmp_path):
    _, weights, _ = watched
    off = small(tmp_path / "off", *PIXELS, "eval.every=0", "logger.every=240")
    assert off[0] == weights
    assert not (tmp_path / "off" / "videos").exists()


def test_every_evaluation_leaves_its_films(watched):
    names = sorted(path.name for path in (watched[0] / "videos").iterdir())
    kinds = "dream", "evaluation_1", "evaluation_2", "open_loop"
    assert names == sorted(f"{kind}_{step:09d}.mp4" for kind in kinds for step in (80, 160, 240))


def test_the_evaluation_film_shows_the_episode(watched):
    film = frames_of(watched[0] / "videos" / "evaluation_1_000000240.mp4")
    assert film.shape == (21, 22 + 272 + 36, 272, 3)
    assert film.std() > 5


def test_frames_say_their_step_their_reward_and_its_sum():
    episode = {
        "observation": torch.arange(4).mul(8).byte()[:, None, None, None].expand(4, 64, 64, 3),
        "reward": torch.tensor([0.5, 1.0, 0.25]),
    }
    frames = evaluation_frames(episode, repeat=4)
    assert frames.shape == (4, 22 + 272 + 36, 272, 3)
    for row, note in enumerate(
        ("0.00  sum 0.0", "0.50  sum 0.5", "1.00  sum 1.5", "0.25  sum 1.8")
    ):
        color = COLORS["real"]
        assert torch.equal(frames[row, :22], write_text((22, 272), [f"step {4 * row}"], color))
        below = write_text((36, 272), ["real", f"reward {note}"], color)
        assert torch.equal(frames[row, -36:], below) and below.float().std() > 10
        assert (frames[row, 22 + 8 : 22 + 264, 8:264] == 8 * row).all()
        assert tuple(frames[row, 22, 0].tolist()) == color
    assert reward_notes(np.array([0.0, -1.5])) == [
        "reward 0.00  sum 0.0",
        "reward -1.50  sum -1.5",
    ]


@pytest.mark.parametrize("fps", [10, 20])
def test_a_film_has_every_frame_once(tmp_path, fps):
    """Some lengths lost their last frame, where a time was rounded."""
    shades = torch.arange(61).mul(4).byte()[:, None, None, None].expand(61, 32, 32, 3)
    for length in (21, 60):
        write_film(tmp_path / "film.mp4", lambda length=length: shades[:length], fps)
        film = frames_of(tmp_path / "film.mp4").mean((1, 2, 3))
        assert len(film) == length
        assert np.abs(film - 4 * np.arange(length)).max() < 2


def test_the_dream_stands_beside_the_real_episode(watched):
    film = frames_of(watched[0] / "videos" / "dream_000000240.mp4")
    assert film.shape == (21, 330, 2 * 272, 3)
    border = film[:, 24:28]
    for row in (4, 5, 20):
        assert close(border[row, :, 20:250].mean((0, 1)), COLORS["real"])
    assert close(border[4, :, 292:520].mean((0, 1)), COLORS["seen"])
    assert close(border[5, :, 292:520].mean((0, 1)), COLORS["dream"])


def test_the_open_loop_film_has_six_sequences_of_truth_model_and_error(watched):
    film = frames_of(watched[0] / "videos" / "open_loop_000000240.mp4")
    assert film.shape == (21, (136 + 28) + 2 * (136 + 14), 6 * 136, 3)
    truth, model, error = (film[:, at + 4 : at + 132] for at in (0, 164, 314))
    inside = np.concatenate([np.arange(i * 136 + 4, i * 136 + 132) for i in range(6)])
    truth, model, error = (part[:, :, inside] for part in (truth, model, error))
    assert np.abs(np.abs(truth - model) - error).mean() < 12
    assert error.mean() > 5  # two updates do not make a model


def test_open_loop_frames_put_every_sequence_in_its_column():
    rows = torch.arange(30).mul(8).byte()[:, None, None, None].expand(30, 64, 64, 3)
    first = torch.tensor([0, 20])
    predicted = torch.zeros(2, 10, 3, 64, 64)  # gray 127 or 128
    frames = open_loop_frames({"observation": rows}, predicted, first, repeat=5)
    assert frames.shape == (10, 464, 2 * 136, 3)
    assert frames[3, 60, 60, 0] == 24 and frames[3, 60, 196, 0] == 23 * 8
    assert frames[3, 224, 60, 0] in (127, 128)
    assert frames[3, 374, 60, 0] == abs(frames[3, 224, 60, 0].int() - 24)
    colors = {at: [tuple(frames[row, at, 0].tolist()) for row in (4, 5)] for at in (0, 164, 314)}
    assert colors[0] == [COLORS["real"]] * 2 and colors[314] == [COLORS["error"]] * 2
    assert colors[164] == [COLORS["seen"], COLORS["open loop"]]
    step = write_text((28, 136), ["real", "step 115"], COLORS["real"])
    assert torch.equal(frames[3, 136:164, 136:], step)


def test_a_film_that_fails_is_one_line_and_training_goes_on(watched, tmp_path, monkeypatch, capfd):
    def fail(*args):
        raise OSError("no encoder here")

    monkeypatch.setattr(common.logger, "write_film", fail)
    weights, rows = small(tmp_path / "run", *PIXELS, "logger.video=true")
    assert weights == watched[1] and rows == watched[2]
    said = "".join(capfd.readouterr())
    assert "could not be drawn (no encoder here); training goes on" in said
    assert "Traceback" not in said


def test_films_are_made_at_every_second_evaluation_if_asked(tmp_path):
    small(tmp_path / "run", *PIXELS, "logger.video=true", "logger.video_every=2")
    steps = {path.stem[-9:] for path in (tmp_path / "run" / "videos").iterdir()}
    assert steps == {"000000160"}
