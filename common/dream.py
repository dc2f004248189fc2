"""A dream from a chosen step, to look at: a strip with its rewards (PNG), a film (mp4, GIF)."""

import numpy as np

from common.frames import COLORS, add_border, dream_from_frames, dream_tracks
from common.plots import draw_lines, save_figure
from common.video import frames_per_second, write_film, write_gif

COLUMNS = 9  # of the strip, after the step at which the dream begins
SEEN_COLUMNS = 2  # before it


def draw_dream(path, episode, row, videos, env):
    """Writes `path`, a PNG, and the film beside it as mp4 and GIF.

    Args:
        row: of the episode; what the model has not seen begins after it.
        videos: of `Diagnostics.predict_videos`.
        env: the configuration's section `env`.
    """
    length = len(videos["open_loop"][0])
    stride = max(1, length // COLUMNS)
    first = max(row - SEEN_COLUMNS * stride, 0)
    tracks = dream_tracks(episode, first, row, videos)
    frames, fps = dream_from_frames(tracks, first, env.action_repeat), frames_per_second(env)
    write_film(path.with_suffix(".mp4"), lambda: frames, fps)
    write_gif(path.with_suffix(".gif"), frames, fps)
    save_figure(draw_strip(tracks, episode, first, row, videos, stride, env), path)


def draw_strip(tracks, episode, first, row, videos, stride, env):
    """Every `stride`-th picture of each track, and the rewards below on the same axis of time."""
    from matplotlib.figure import Figure

    start, repeat = row - first, env.action_repeat
    shown = np.arange(start % stride, len(tracks[0].frames), stride)
    figure = Figure(figsize=(1.5 + 1.1 * len(shown), 8.6), layout="constrained")
    axes = figure.subplots(6, 1, sharex=True, height_ratios=(1, 1, 1, 1, 1, 1.6))
    half = stride * repeat / 2
    names = "real", "seen", "dream", "open loop", "error"
    for axis, track, name in zip(axes, tracks, names):
        framed = add_border(track.frames, track.kinds).numpy()
        for column in shown:
            step = (first + column) * repeat
            axis.imshow(framed[column], extent=(step - half, step + half, 0, 1), aspect="auto")
        axis.set_yticks([])
        axis.set_ylabel(name, color=readable(name))
        axis.set_ylim(0, 1)
    steps = (first + shown) * repeat
    axes[-1].set_xlim(steps[0] - half, steps[-1] + half)
    axes[-1].set_xticks(steps)
    draw_rewards(axes[-1], episode, first, row, videos, repeat)
    figure.suptitle(
        f"{env.name} {env.task}: after step {row * repeat} the model is left alone,\n"
        "in the dream with the policy's own actions, in the open loop with the real ones"
    )
    return figure


def readable(kind):
    """The color of a kind of picture as letters on white, for matplotlib."""
    return tuple(0.7 * part / 255 if kind != "real" else 0.0 for part in COLORS[kind])


def draw_rewards(axis, episode, first, row, videos, repeat):
    """Real rewards, those of the open loop, and those of the dream with the policy's actions."""
    real, length = episode["reward"].cpu(), len(videos["open_loop"][1])
    before = max(first, 1)
    steps = np.arange(before, row + length + 1) * repeat
    after = np.arange(row + 1, row + 1 + length) * repeat
    lines = {
        "real": (steps, real[before - 1 : row + length], "k--"),
        "open loop": (after, videos["open_loop"][1].cpu(), "-"),
        "dream, with the policy's own actions": (after, videos["dream"][1].cpu(), ":"),
    }
    draw_lines(axis, "", "environment step", **lines)
    axis.axvline(row * repeat, color="gray", linewidth=1)
    axis.set_ylabel("reward")
