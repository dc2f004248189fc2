"""Markdown tables, and the places in the README that commands fill."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def markdown_table(columns, rows):
    """A table with its header; every cell is a string, and no row makes an empty string."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def put_into_readme(marks, text):
    """Replaces what stands between two marks of the README, which stay; exits if they are gone."""
    start, end = map(re.escape, marks)
    inside = "\n".join((marks[0], text, marks[1]))
    new, places = re.subn(f"{start}.*?{end}", lambda _: inside, README.read_text(), flags=re.S)
    if places != 1:
        raise SystemExit(
            f"README.md needs these two lines once, in this order: {', '.join(marks)}"
        )
    README.write_text(new)
