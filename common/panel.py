"""The panel: is the dream true, does the critic believe it, is the actor still free to move?

Eight small plots, drawn at every evaluation. `docs/panel.md` reads one like a doctor.
"""

import numpy as np

from common.plots import draw_lines, save_figure

ENVIRONMENT_STEPS = "environment steps"
LARGE = 15  # points, so that it can be read from a meter away


def draw_panel(path, cfg, history, curves, published):
    """The state of a run in eight plots, as PNG.

    Args:
        cfg: the whole configuration.
        history: all rows of metrics until then.
        curves: of the last of them that is an evaluation.
        published: rows of `published_curve`, or None.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(20, 8.6))
    # By hand: matplotlib's own layouts take a third longer.
    margins = {"left": 0.045, "right": 0.99, "bottom": 0.075, "top": 0.88}
    top, bottom = figure.subplots(2, 4, gridspec_kw=margins | {"wspace": 0.25, "hspace": 0.38})
    task = f"{cfg.env.name} {cfg.env.task}".strip()
    title = f"{task}, seed {cfg.seed}, step {history[-1]['environment_steps']:,}"
    figure.suptitle(title, fontsize=LARGE + 3, x=0.045, ha="left", weight="bold")
    draw_returns(top[0], history, published)
    draw_action_entropy(bottom[0], history)
    draw_kl(top[1], history, cfg.optimization.free_nats)
    if "value" in curves:
        draw_observation_errors(bottom[1], curves, cfg.env.from_pixels)
        draw_reward_errors(top[2], curves)
        draw_return_gap(bottom[2], curves)
        draw_value_bias(top[3], curves)
    draw_saturation(bottom[3], history)
    save_figure(figure, path, dpi=70)


def column_of(rows, key):
    """The environment steps and the values of all rows that have `key`."""
    pairs = [(row["environment_steps"], row[key]) for row in rows if row.get(key) is not None]
    return [list(column) for column in zip(*pairs, strict=True)] or [[], []]


def draw(axis, title, xlabel, ylabel, **curves):
    """One plot in the panel's size of letters."""
    draw_lines(axis, title, xlabel, **curves)
    axis.set_ylabel(ylabel)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set_fontsize(LARGE)
    axis.tick_params(labelsize=LARGE - 3)
    axis.locator_params(axis="x", nbins=5)
    if len(curves) > 1:
        axis.legend(fontsize=LARGE - 3)


def draw_returns(axis, history, published):
    """Evaluation returns, and the published ones at their own steps."""
    steps, returns = column_of(history, "eval/return")
    title = "return of an evaluation episode"
    draw(axis, title, ENVIRONMENT_STEPS, "sum of rewards", ours=(steps, returns, "o-"))
    lowest, highest = axis.get_ylim()
    axis.set_ylim(min(0, lowest), highest + 0.15 * abs(highest))  # room for the legend
    if published is not None and published[0, 0] <= steps[-1]:
        x, mean, worst, best = published[published[:, 0] <= steps[-1]].T
        axis.errorbar(
            x,
            mean,
            yerr=(mean - worst, best - mean),
            fmt="ks",
            capsize=4,
            label="published: mean, range of 5 seeds",
        )
        axis.legend(fontsize=LARGE - 3)


def draw_action_entropy(axis, history):
    """How random the dreamed actions are."""
    steps, entropy = column_of(history, "behavior/action_entropy")
    title = "actor: entropy of dreamed actions"
    draw(axis, title, ENVIRONMENT_STEPS, "nats", entropy=(steps, entropy, ".-"))


def draw_saturation(axis, history):
    """How many actions of the evaluations are at the ends of their range."""
    steps, share = column_of(history, "behavior/action_saturation")
    title = "actor: actions at an end of their range"
    draw(axis, title, ENVIRONMENT_STEPS, "share beyond 0.99", saturated=(steps, share, "o-"))
    axis.set_ylim(-0.05, 1.05)


def draw_kl(axis, history, free_nats):
    """The KL of the model over environment steps."""
    steps, kl = column_of(history, "world_model/kl")
    lines = {"KL": (steps, kl, ".-")}
    if steps:
        lines["free nats"] = ((steps[0], steps[-1]), (free_nats, free_nats), "k:")
    draw(axis, "model: KL of posterior and prior", ENVIRONMENT_STEPS, "nats", **lines)


def draw_open_loop_errors(axis, title, unit, predicted, copied):
    """Errors of the model that is left alone, by the number of steps."""
    steps = range(1, len(predicted) + 1)
    lines = {"model": (steps, predicted, "-"), "last one repeated": (steps, copied, "k--")}
    draw(axis, title, "agent steps without an observation", unit, **lines)
    axis.set_ylim(bottom=0)


def draw_observation_errors(axis, curves, from_pixels):
    """Of frames, or of the numbers of the state vector."""
    unit = "squared error per pixel" if from_pixels else "squared error per number"
    title = "model: error of predicted " + ("frames" if from_pixels else "observations")
    errors = curves["observation_error"], curves["copied_observation"]
    draw_open_loop_errors(axis, title, unit, *errors)


def draw_reward_errors(axis, curves):
    """Of rewards."""
    errors = curves["reward_error"], curves["copied_reward"]
    title = "model: error of predicted rewards"
    draw_open_loop_errors(axis, title, "absolute error of a reward", *errors)


def draw_return_gap(axis, curves):
    """Rewards of dreams and of the episode, from the same states."""
    imagined, real = curves["imagined_return"], curves["real_return"]
    lines = {"dreamed": (range(len(imagined)), imagined, "-")}
    lines["real"] = (range(len(real)), real, "k--")
    title = "dream: rewards of the next H steps"
    draw(axis, title, "agent step of the episode", "sum of rewards", **lines)


def draw_value_bias(axis, curves):
    """What the critic says, and the lambda-return of the real rewards."""
    value = curves["value"][:-1]
    target = np.subtract(value, curves["value_above_target"])
    lines = {"value": (range(len(value)), value, "-")}
    lines["lambda-return of real rewards"] = (range(len(target)), target, "k--")
    title = "critic: value of the states of an episode"
    draw(axis, title, "agent step of the episode", "discounted rewards", **lines)
