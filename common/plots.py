"""Panels and strips as PNG, and the published curves beside ours."""

import csv
from pathlib import Path

import numpy as np
import torch

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


def interpolate_published(curve, step):
    """Metrics of the published curve at `step`; none beyond its end, or if there is no curve."""
    if curve is None or step > curve[-1, 0]:
        return {}
    steps, *columns = curve.T
    names = (f"eval/published_{name}" for name in PUBLISHED_COLUMNS[1:])
    return {
        name: float(np.interp(step, steps, column))
        for name, column in zip(names, columns, strict=True)
    }


def save_figure(figure, path):
    """Writes a figure as PNG, complete or not at all."""
    with atomic_path(path) as aside:
        figure.savefig(aside, dpi=100, format="png")


def draw_lines(axis, title, xlabel, **curves):
    """One panel with lines {label: (x, y, style)}."""
    for label, (x, y, style) in curves.items():
        axis.plot(x, y, style, label=label.replace("_", " "))
    axis.set(title=title, xlabel=xlabel)
    if curves:
        axis.legend(fontsize="small")


def column_of(rows, key):
    """The environment steps and the values of all rows that have `key`."""
    pairs = [(row["environment_steps"], row[key]) for row in rows if key in row]
    return [list(column) for column in zip(*pairs, strict=True)] or [[], []]


def draw_panel(path, history, curves, published, free_nats):
    """The state of a run in six panels.

    They are returns with the published ones, the KL with its free nats, and what the model and
    the critic say against one real episode.

    Args:
        history: all rows of metrics.
        curves: of the last evaluation.
        published: rows of `published_curve`, or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.5))
    # By hand: matplotlib's own layouts take a third longer.
    margins = {"left": 0.04, "right": 0.99, "bottom": 0.07, "top": 0.95}
    top, bottom = figure.subplots(2, 3, gridspec_kw=margins | {"wspace": 0.18, "hspace": 0.33})
    draw_returns(top[0], history, published)
    draw_kl(bottom[0], history, free_nats)
    if "value" in curves:
        draw_open_loop_errors(top[1], bottom[1], curves)
        draw_return_gap(top[2], curves)
        draw_value_bias(bottom[2], curves)
    save_figure(figure, path)


def draw_returns(axis, history, published):
    """Evaluation returns over environment steps."""
    title, xlabel = "evaluation return", "environment steps"
    steps, returns = column_of(history, "eval/return")
    draw_lines(axis, title, xlabel, ours=(steps, returns, "o-"))
    if published is not None:
        x, mean, lowest, highest = published[published[:, 0] <= max(steps[-1], published[1, 0])].T
        draw_lines(axis, title, xlabel, published=(x, mean, "k--"))
        axis.fill_between(x, lowest, highest, color="k", alpha=0.1)


def draw_kl(axis, history, free_nats):
    """The KL of the model over environment steps."""
    steps, kl = column_of(history, "world_model/kl")
    if steps:
        draw_lines(
            axis,
            "KL of the model, nats",
            "environment steps",
            kl=(steps, kl, "-"),
            free_nats=((steps[0], steps[-1]), (free_nats, free_nats), "k:"),
        )


def draw_open_loop_errors(observation_axis, reward_axis, curves):
    """Errors of the model that is left alone, by the number of steps."""
    steps = range(1, len(curves["reward_error"]) + 1)
    for axis, what, title in (
        (observation_axis, "observation", "squared error of predicted frames"),
        (reward_axis, "reward", "absolute error of predicted rewards"),
    ):
        draw_lines(
            axis,
            title,
            "steps without an observation",
            model=(steps, curves[f"{what}_error"], "-"),
            last_row_repeated=(steps, curves[f"copied_{what}"], "k--"),
        )


def draw_return_gap(axis, curves):
    """Rewards of dreams and of the episode, from the same states."""
    steps = range(len(curves["imagined_return"]))
    draw_lines(
        axis,
        "rewards of the next H steps",
        "agent step of the episode",
        imagined=(steps, curves["imagined_return"], "-"),
        real=(steps, curves["real_return"], "k--"),
    )


def draw_value_bias(axis, curves):
    """What the critic says, and the lambda-return of the real rewards."""
    value = curves["value"][:-1]
    target = np.subtract(value, curves["value_above_target"])
    draw_lines(
        axis,
        "value against the real lambda-return",
        "agent step of the episode",
        value=(range(len(value)), value, "-"),
        lambda_return=(range(len(target)), target, "k--"),
    )


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
