"""Panels of a run at earlier steps: `python benchmarks/panels.py RUN STEP... --out FILE`.

A run keeps only the panel of its last evaluation; metrics.jsonl and curves.jsonl hold all of them.
Writes <FILE>_<step>.png for the last evaluation at or before each step.
"""

import argparse
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf

# A script finds modules in its own directory only; common/ is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.panel import draw_panel  # noqa: E402
from common.plots import published_curve  # noqa: E402


def rows_until(path, step):
    """The rows of a file of JSON lines, up to a step."""
    rows = map(json.loads, path.read_text().splitlines())
    return [row for row in rows if row["environment_steps"] <= step]


def main():
    """Draws the panels named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("steps", type=int, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("panel"))
    options = parser.parse_args()
    cfg = OmegaConf.load(options.run / "config.yaml")
    for wanted in options.steps:
        evaluations = rows_until(options.run / "curves.jsonl", wanted)
        if not evaluations:
            parser.error(f"{options.run} has no evaluation at or before step {wanted:,}")
        step = evaluations[-1]["environment_steps"]
        path = options.out.with_name(f"{options.out.name}_{step}.png")
        history = rows_until(options.run / "metrics.jsonl", step)
        draw_panel(path, cfg, history, evaluations[-1], published_curve(cfg.env))
        print(f"written: {path}")


if __name__ == "__main__":
    main()
