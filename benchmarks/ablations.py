"""What single choices are worth, trained from states: `python benchmarks/ablations.py FOLDER`.

Every variant differs from the preset in one value, or in one function of dreamer.py that is
replaced here, so that the paper's configuration needs no key for it. Runs that were interrupted go
on, finished ones are kept: the same command ends with the tables, and `--table` only prints them.
`--into` puts them between the two marks of a page, such as docs/learning.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import stats

# A script finds modules in its own directory only; dreamer.py is one above.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dreamer  # noqa: E402
import dreamer_utils as utils  # noqa: E402
from markdown_tables import add_page_option, markdown_table, put_into_page  # noqa: E402

PRESET = "config_state"
COLUMNS = ("variant", "seeds", "returns", "mean", "95 % interval of the mean", "minus the preset")


def clip_before_the_mean():
    """Free nats for each state by itself, not for the mean of the batch."""

    def model_loss(observation_log_prob, reward_log_prob, kl, kl_scale, free_nats):
        regularizer = kl_scale * kl.clamp(min=free_nats).mean()
        return regularizer - observation_log_prob.mean() - reward_log_prob.mean()

    dreamer.model_loss = model_loss


def gradient_through_the_actors_input():
    """The action model's gradient also flows through the states that it sees."""

    def action_model_samples(actor, noise):
        def choose_action(t, state, belief):
            mean, std = actor(state, belief)
            return dreamer.sample_action(mean, std, noise[:, t]), mean, std

        return choose_action

    dreamer.action_model_samples = action_model_samples


def no_discount_weights():
    """Every dreamed step counts the same in both losses."""
    dreamer.discount_weight = lambda discount: torch.ones_like(discount[:, 1:])


def mean_action():
    """Evaluation acts with the tanh of the mean, not with the densest of 100 samples."""
    dreamer.mode_action = lambda mean, std, noise: torch.tanh(mean)


# name: (overrides, patch); those of the second table play the preset's checkpoints.
TRAINED = {
    "the preset": ([], None),
    "action_std 5 (paper)": (["networks.action_std=5.0"], None),
    "action_std 2": (["networks.action_std=2.0"], None),
    "action_std 0.5": (["networks.action_std=0.5"], None),
    "free nats clipped before the mean": ([], clip_before_the_mean),
    "no stop-gradient at the actor's input": ([], gradient_through_the_actors_input),
    "no discount weights": ([], no_discount_weights),
}
PLAYED = {"densest of 100 samples": None, "tanh of the mean": mean_action}


def directory(folder, variant, seed):
    """Where a run of a variant is."""
    return folder / f"{re.sub(r'[^a-z0-9.-]+', '_', variant).strip('_')}-seed{seed}"


def word(key, path):
    """An override whose value is a path; quoted, as it may hold what Hydra's grammar reserves."""
    escaped = str(path).replace("'", r"\'")
    return f"{key}='{escaped}'"


def training_words(folder, variant, seed, words):
    """What follows `python dreamer.py` for one run."""
    overrides, _ = TRAINED[variant]
    where = word("run_dir", directory(folder, variant, seed))
    return [
        *("--config-name", PRESET, f"seed={seed}"),
        *(*overrides, *words, where, "logger.mode=disabled"),
    ]


def call_main():
    """What `python dreamer.py` does with the words in sys.argv."""
    os.environ["HYDRA_MAIN_MODULE"] = "__main__"
    utils.register_configs()
    dreamer.main()


def train(folder, variant, seed, words):
    """One run in this process, which is then spoiled for others."""
    _, patch = TRAINED[variant]
    if patch:
        patch()
    sys.argv[1:] = training_words(folder, variant, seed, words)
    call_main()


def play(folder, way, seed, episodes):
    """The mean return of a trained preset that chooses its actions in one of two ways."""
    if PLAYED[way]:
        PLAYED[way]()
    run = directory(folder, "the preset", seed)
    sys.argv[1:] = [word("eval.checkpoint", run), f"eval.episodes={episodes}"]
    call_main()
    [path] = run.glob(f"evaluation_*/{episodes}_episodes.json")
    path.rename(run / f"{way.replace(' ', '_')}.json")


def in_a_process(*words):
    """Starts this script for one run; ends with its exit code if it fails or is stopped."""
    code = subprocess.run([sys.executable, __file__, *map(str, words)], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def interval(values):
    """The mean and half of its 95 % interval (Student's t over seeds; nan for one)."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else np.nan
    return np.mean(values), half


def row(variant, returns, preset):
    """The cells of a variant; both are {seed: return}, and differences are between same seeds."""
    mean, half = interval(list(returns.values()))
    common = returns.keys() & preset.keys()
    difference, about = interval([returns[seed] - preset[seed] for seed in sorted(common)])
    return (
        variant,
        str(len(returns)),
        ", ".join(f"{returns[seed]:.0f}" for seed in sorted(returns)),
        f"{mean:.0f}",
        f"{mean - half:.0f} to {mean + half:.0f}",
        "-" if returns is preset else f"{difference:+.0f} +- {about:.0f}",
    )


def tables(folder, seeds):
    """What is finished so far, as Markdown: the variants, then the two ways to play the preset."""
    trained, played = {}, {}
    for variant in TRAINED:
        for seed in seeds:
            path = directory(folder, variant, seed) / "run.json"
            card = json.loads(path.read_text()) if path.exists() else {}
            if card.get("state") == "finished":
                trained.setdefault(variant, {})[seed] = card["last_returns_mean"]
    for way in PLAYED:
        for seed in seeds:
            path = directory(folder, "the preset", seed) / f"{way.replace(' ', '_')}.json"
            if path.exists():
                returns = json.loads(path.read_text())["returns"]
                played.setdefault(way, {})[seed] = float(np.mean(returns))
    return "\n\n".join(
        markdown_table(
            COLUMNS,
            [
                row(name, returns, next(iter(results.values())))
                for name, returns in results.items()
            ],
        )
        for results in (trained, played)
        if results
    )


def main():
    """Trains what is missing, seed by seed, then plays the preset's agents in both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--episodes", type=int, default=20, help="of each agent that is played")
    parser.add_argument("--table", action="store_true", help="print what is there")
    add_page_option(parser)
    parser.add_argument("--train", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--play", metavar="WAY", help=argparse.SUPPRESS)
    parser.add_argument("--words", nargs="*", default=[], help="overrides of all runs")
    options = parser.parse_args()
    folder, seeds = options.folder.absolute(), options.seeds
    if options.train:
        train(folder, options.train, seeds[0], options.words)
        return
    if options.play:
        play(folder, options.play, seeds[0], options.episodes)
        return
    for seed in () if options.table else seeds:
        for variant in options.only:
            in_a_process(folder, "--seeds", seed, "--train", variant, "--words", *options.words)
    for seed in () if options.table else seeds:
        for way in PLAYED if "the preset" in options.only else ():
            words = ("--seeds", seed, "--episodes", options.episodes, "--play", way)
            in_a_process(folder, *words)
    text = tables(folder, seeds)
    print(text)
    if options.into:
        put_into_page(options.into, "ablations", text)


if __name__ == "__main__":
    main()
