"""Markdown tables, and the places in README.md and docs/ that commands fill."""

import argparse
import re
from pathlib import Path


def markdown_table(columns, rows):
    """A table with its header; every cell is a string, and no row makes an empty string."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def page(name):
    """The path of a page that is there."""
    path = Path(name)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no page {name}")
    return path


def add_page_option(parser):
    """Gives a script the option `--into PAGE`."""
    parser.add_argument("--into", type=page, metavar="PAGE", help="README.md or a page of docs/")


def put_into_page(path, name, text):
    """Replaces what stands in a page between its two marks, which stay; exits if they are gone.

    The first mark says which command made the text: `<!-- NAME: COMMAND -->`. The last one is
    `<!-- end of NAME -->`.
    """
    start, end = rf"<!-- {name}: [^\n]* -->\n", f"<!-- end of {name} -->"
    new, places = re.subn(
        f"({start}).*?({end})",
        lambda marks: f"{marks[1]}{text}\n{marks[2]}",
        path.read_text(),
        flags=re.S,
    )
    if places != 1:
        raise SystemExit(
            f"{path} needs these two lines once, in this order:"
            f" <!-- {name}: COMMAND -->, <!-- end of {name} -->"
        )
    path.write_text(new)
