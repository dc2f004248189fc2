"""A Markdown table of runs from their cards: `python benchmarks/results.py FOLDER...`.

A folder is a run, or holds runs: those of one task are its seeds and become one row. A card is the
run.json that every run keeps. `--into` puts the table between the two marks of a page, such as
README.md. Returns of random actions come from benchmarks/results/random.json.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from markdown_tables import add_page_option, markdown_table, put_into_page

ROOT = Path(__file__).resolve().parents[1]
RANDOM = ROOT / "benchmarks" / "results" / "random.json"
COLUMNS = (
    "runs",
    "task",
    "environment steps",
    "updates",
    "random actions",
    "return of each seed",
    "mean",
    "lowest",
    "hours",
    "device",
    "revision",
)


def runs_in(folder):
    """The folder itself if it is a run, else the runs in it."""
    return [
        path.parent
        for path in (folder / "run.json", *sorted(folder.glob("*/run.json")))
        if path.exists()
    ]


def one_of(values):
    """What all values have in common: the value, or the smallest and the largest."""
    different = sorted(set(values), key=lambda text: (len(text), text))  # 60,000 before 100,000
    return " to ".join(dict.fromkeys((different[0], different[-1])))


def row(name, task, cards, random):
    """The cells of the seeds of one task."""
    cards = sorted(cards, key=lambda card: card["seed"])
    returns = [card["eval_return"] for card in cards]
    hours = np.mean([card["wall_seconds"] for card in cards]) / 3600
    return (
        name,
        task,
        one_of(f"{card['environment_steps']:,}" for card in cards),
        one_of(f"{card['updates']:,}" for card in cards),
        f"{random[task]:.0f}" if task in random else "?",
        ", ".join(f"{value:.0f}" for value in returns),
        f"{np.mean(returns):.0f}" if len(returns) > 1 else "single seed",
        f"{min(returns):.0f}",
        f"{hours:.2f}",
        one_of(f"{card['device']}, {card['precision'].removeprefix('torch.')}" for card in cards),
        one_of(
            (card["git_revision"] or "?")[:9] + "+" * bool(card["git_dirty"]) for card in cards
        ),
    )


def table(folders, random):
    """All finished runs in the folders, as Markdown; empty if there are none."""
    groups = defaultdict(list)
    for folder in folders:
        for run in runs_in(folder):
            card = json.loads((run / "run.json").read_text())
            if "eval_return" in card and card.get("state", "finished") == "finished":
                groups[folder.name, card["task"]].append(card)
    rows = [row(*key, cards, random) for key, cards in groups.items()]
    return markdown_table(COLUMNS, rows)


def main():
    """Prints the table, and puts it into a page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    add_page_option(parser)
    options = parser.parse_args()
    text = table(options.folders, json.loads(RANDOM.read_text()) if RANDOM.exists() else {})
    if not text:
        parser.error("none of these holds the run.json of a finished run with an evaluation")
    print(text)
    if options.into:
        put_into_page(options.into, "results", text)


if __name__ == "__main__":
    main()
