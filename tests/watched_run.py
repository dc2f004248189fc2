"""A run from pixels with everything on, and how its films are read."""

import numpy as np

PIXELS = [
    "env.from_pixels=true",
    "eval.episodes=2",
    "name=one",
    "checkpoint.every=80",
    "checkpoint.keep=3",
]
WATCHED = [*PIXELS, "logger.video=true", "logger.mode=offline"]


def frames_of(path):
    """All frames of a film, [T, h, w, 3]."""
    from moviepy import VideoFileClip

    with VideoFileClip(str(path)) as film:
        return np.stack(list(film.iter_frames())).astype(int)
