"""Lines, figures as PNG, and the published curves beside ours."""

import csv
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import atomic_path

PUBLISHED = Path(__file__).with_name("published.csv")
NEAR = 5_000  # environment steps, half of those between two evaluations


def published_returns(env):
    """The published returns of a task: {environment steps: [return of each seed]}, in order.

    Empty where nothing was published.

    Args:
        env: the configuration's section `env`.
    """
    if env.backend != "dm_control":
        return {}
    task = f"{env.name}_{env.task}".replace("ball_in_cup", "cup")
    returns = defaultdict(list)
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                returns[int(row["environment_steps"])].append(float(row["return"]))
    return dict(sorted(returns.items()))


def published_curve(env):
    """The published curve of a task: rows (environment steps, mean, lowest, highest), or None.

    Args:
        env: the configuration's section `env`.
    """
    rows = [
        (step, np.mean(returns), min(returns), max(returns))
        for step, returns in published_returns(env).items()
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
    names = "eval/published_mean", "eval/published_lowest", "eval/published_highest"
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
