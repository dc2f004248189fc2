"""A Markdown table of runs from their cards: `python benchmarks/results.py RUN... [--readme]`.

A card is the run.json that every run keeps; a row is named after its directory. `--readme` puts
the table between the two marks in the README's section on results.
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "python benchmarks/results.py benchmarks/results/*/ --readme"
MARKS = f"<!-- results: {COMMAND} -->", "<!-- end of results -->"
COLUMNS = (
    "run",
    "task",
    "environment steps",
    "updates",
    "return, last evaluation",
    "last evaluations, mean and std",
    "published mean",
    "hours",
    "device",
    "revision",
)


def row(name, card):
    """The cells of one run."""
    published = card.get("published_mean")
    revision = (card["git_revision"] or "?")[:9] + "+" * bool(card["git_dirty"])
    last = f"{card['last_returns_mean']:.0f} +- {card['last_returns_std']:.0f}"
    return (
        name,
        card["task"],
        f"{card['environment_steps']:,}",
        f"{card['updates']:,}",
        f"{card['eval_return']:.0f}",
        f"{last} ({card['last_returns']})",
        f"{published:.0f}" if published else "-",
        f"{card['wall_seconds'] / 3600:.2f}",
        f"{card['device']}, {card['precision'].removeprefix('torch.')}",
        revision,
    )


def table(cards):
    """All runs, {name: card}, as Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row(*pair) for pair in cards.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main():
    """Prints the table, and puts it into the README if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    cards = {}
    for run in options.runs:
        path = run / "run.json"
        card = json.loads(path.read_text()) if path.exists() else {}
        if "eval_return" in card:
            cards[run.name] = card
    if not cards:
        parser.error("none of these holds a run.json with an evaluation")
    text = table(cards)
    print(text)
    if options.readme:
        path, (start, end) = ROOT / "README.md", map(re.escape, MARKS)
        inside = "\n".join((MARKS[0], text, MARKS[1]))
        path.write_text(re.sub(f"{start}.*?{end}", lambda _: inside, path.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
