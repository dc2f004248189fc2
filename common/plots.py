"""Strips as PNG, and the published curves beside ours."""

import csv
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import atomic_path
from common.video import (
    CONTEXT,
    compare_frames,
    enlarge,
    frames_per_second,
    to_frames,
    write_film,
)

PUBLISHED = Path(__file__).with_name("published.csv")
NEAR = 5_000  # environment steps, half of those between two evaluations
PUBLISHED_COLUMNS = ("environment_steps", "mean", "lowest", "highest")


def published_curve(env):
    """The published curve of a task: rows (environment steps, mean, lowest, highest), or None.

    Args:
        env: the configuration's section `env`.
    """
    if env.backend != "dm_control":
        return None
    task = f"{env.name}_{env.task}".replace("ball_in_cup", "cup")
    with PUBLISHED.open() as file:
        rows = [
            [float(row[column]) for column in PUBLISHED_COLUMNS]
            for row in csv.DictReader(file)
            if row["task"] == task
        ]
    return np.array(rows) if rows else None


def is_published_setting(env):
    """Whether returns can be compared: from pixels, an action repeat of 2, 1000 steps."""
    setting = env.backend, env.from_pixels, env.action_repeat, env.time_limit
    return setting == ("dm_control", True, 2, 1000)


def published_metrics(env, curve, step):
    """Metrics of the published point within 5,000 steps of `step`; none if there is no such point.

    Points are 100,000 steps apart: what lies between them, nobody has published.

    Args:
        env: the configuration's section `env`; other settings than the published have none.
        curve: of `published_curve`.
    """
    if curve is None or not is_published_setting(env):
        return {}
    near = curve[np.abs(curve[:, 0] - step) <= NEAR]
    names = (f"eval/published_{name}" for name in PUBLISHED_COLUMNS[1:])
    return dict(zip(names, near[0, 1:].tolist(), strict=True)) if len(near) else {}


def save_figure(figure, path, dpi=100):
    """Writes a figure as PNG, complete or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    with atomic_path(path) as aside, Image.open(drawn) as picture:
        # 256 colors are enough, and a third of the bytes.
        picture.convert("RGB").quantize(256).save(aside, format="png", optimize=True)


def draw_lines(axis, title, xlabel, **curves):
    """One panel with lines {label: (x, y, style)}."""
    for label, (x, y, style) in curves.items():
        axis.plot(x, y, style, label=label.replace("_", " "))
    axis.set(title=title, xlabel=xlabel)
    if len(curves) > 1:
        axis.legend(fontsize="small")


def draw_dream(path, episode, row, videos, env):
    """Real, reconstruction, open loop and error from `row` on, and rewards, as PNG and mp4.

    Args:
        videos: of `Diagnostics.predict_videos`.
        env: the configuration's section `env`.
    """
    length, first = len(videos["open_loop"][0]), max(row - CONTEXT + 1, 0)
    context = row + 1 - first
    frames = dream_strip_frames(episode, first, row, videos, context)
    film = path.with_suffix(".mp4")
    write_film(film, lambda: enlarge(frames, 3), frames_per_second(env))

    from matplotlib.figure import Figure

    ahead = np.linspace(context, len(frames) - 1, 9)
    shown = np.unique(np.concatenate([[0, context - 1], ahead]).astype(int))
    figure = Figure(figsize=(len(shown) * 1.1, 6.6), layout="constrained")
    strip, axis = figure.subplots(2, 1, height_ratios=(2.2, 1))
    strip.imshow(torch.cat([frames[i] for i in shown], 1).numpy(), interpolation="nearest")
    size = frames.shape[2]
    names = ["real", "seen", "open loop", "error"]
    strip.set_yticks([size * (i + 0.5) for i in range(len(names))], names)
    ticks = [size * (i + 0.5) for i in range(len(shown))]
    strip.set_xticks(ticks, (first + shown) * env.action_repeat)
    strip.set_xlabel("environment step (orange: the model alone, with the real actions)")
    real = episode["reward"].cpu()
    after = np.arange(row + 1, row + 1 + length) * env.action_repeat
    before = np.arange(max(first, 1), row + 1) * env.action_repeat
    draw_lines(
        axis,
        "",
        "environment step",
        real=(np.concatenate([before, after]), real[max(first, 1) - 1 : row + length], "k--"),
        open_loop=(after, videos["open_loop"][1].cpu(), "-"),
        dream_of_the_policy=(after, videos["dream"][1].cpu(), ":"),
    )
    axis.set_ylabel("reward")
    save_figure(figure, path)


def dream_strip_frames(episode, first, row, videos, context):
    """Real, reconstruction, open loop and error of the rows from `first` on, [T, h, w, 3]."""
    open_loop = to_frames(videos["open_loop"][0])
    rows = slice(first, row + 1 + len(open_loop))
    truth = episode["observation"].cpu()[rows]
    seen = to_frames(videos["filtered"][0])[rows]
    unseen = truth.new_zeros(len(truth) - len(seen), *truth.shape[1:])
    seen = torch.cat([seen, unseen])  # the last observation is never filtered
    model = torch.cat([seen[:context], open_loop])
    return compare_frames(truth, seen, model, context=context)
