"""Films and frames: what they show, and that they change nothing."""

import numpy as np
import pytest
import torch

import common.logger
from common.video import DREAMED, SEEN, open_loop_frames, write_film
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
    assert film.shape == (21, 256, 256, 3)
    assert film.std() > 5


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
    assert film.shape == (21, 68 * 3, 2 * 68 * 3, 3)
    for half in (0, 68 * 3):  # border: green for what the model has seen, then orange
        assert close(film[4, 1:3, half + 20 : half + 180].mean((0, 1)), SEEN)
        assert close(film[5, 1:3, half + 20 : half + 180].mean((0, 1)), DREAMED)


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
    predicted = torch.zeros(2, 10, 3, 64, 64)  # gray 127 or 128
    frames = open_loop_frames({"observation": rows}, predicted, first)
    assert frames.shape == (10, 3 * 136, 2 * 136, 3)
    assert frames[3, 60, 60, 0] == 24 and frames[3, 60, 196, 0] == 23 * 8
    assert frames[3, 196, 60, 0] in (127, 128)
    assert frames[3, 332, 60, 0] == abs(frames[3, 196, 60, 0].int() - 24)
    assert tuple(frames[4, 0, 0].tolist()) == SEEN
    assert tuple(frames[5, 0, 0].tolist()) == DREAMED


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
