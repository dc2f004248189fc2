"""The numbers of `throughput.py --cuda` as one Markdown table with its caption."""

import textwrap

from report_throughput import table
from variants import CUDA_BASELINE, GFLOP, PAPER_SIZE, SIZES

OURS = "our collector and replay"
COLUMNS = (
    "",
    "updates/s",
    "ms, median",
    "min",
    "max",
    "runs",
    f"times faster than {CUDA_BASELINE}",
    "than TorchRL's, same precision and switches",
    "% of the peak rate",
    "peak GiB",
    "environment steps/s",
    "hours for the paper's run",
)


def steps_per_second(report):
    """Environment steps of our collector in a second, or None if they were not measured."""
    row = report.get("collection", {}).get(OURS)
    return report["paper"]["action_repeat"] / row["median"] if row else None


def hours(seconds_per_update, report):
    """Of the paper's run: its updates and its environment steps, one after the other.

    None if updates of its size or environment steps were not measured.
    """
    steps, paper = steps_per_second(report), report["paper"]
    if steps is None or report["update"]["size"] != PAPER_SIZE:
        return None
    seconds = paper["updates"] * seconds_per_update + paper["environment_steps"] / steps
    return seconds / 3600


def cuda_row(name, row, report):
    """The cells of one variant; a run acts with our collector only."""
    ours = name.startswith("ours")
    share = 100 * row["floor"] / row["median"] if "floor" in row else None
    return [
        name,
        1 / row["median"],
        *(1e3 * row[key] for key in ("median", "min", "max")),
        row["runs"],
        row.get("vs_baseline"),
        row.get("vs_peer"),
        share,
        row["gib"],
        steps_per_second(report) if ours else None,
        hours(row["median"], report) if ours else None,
    ]


def caption(report):
    """What was measured, where, and how to read the table."""
    machine, paper = report["machine"], report["paper"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    rates = ", ".join(
        f"{name} {row['gflops'] / 1e3:.3g} TFLOP/s" for name, row in report["floor"].items()
    )
    size = report["update"]["size"].removeprefix("pixels, ")
    frames = SIZES[report["update"]["size"]].frames
    sentences = [
        f"One update from {size} frames and {frames} dreams of 15 steps,"
        f" {GFLOP * frames / 2500:.0f} GFLOP, on one {machine['gpu']}"
        f" ({machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {versions}),"
        f" {report['date']}.",
        "Variants took turns, each in a process of its own; a ratio is the median of the ratios"
        " within a round.",
        '"Tuned" gives TorchRL\'s parts what ours have: TF32, and the fastest convolution for each'
        ' shape. A run is "bfloat16, compiled" unless it is told otherwise.',
        "The peak rate is that of a large square product in the same precision, measured in the"
        f" same run: {rates}; for float32 the higher one counts.",
        "Peak GiB is what PyTorch reserved on the GPU.",
        "Environment steps are those of cheetah run with our policy, collector and replay, and"
        f" images from {report['renderer']}.",
        f"The hours are those of {paper['updates']:,} updates and"
        f" {paper['environment_steps']:,} environment steps, evaluation included, one after the"
        " other: computed from this table, not a run.",
    ]
    if machine["device"] == "cpu":
        sentences.insert(0, "NO GPU: the command was only tried, on a CPU.")
    return textwrap.fill(" ".join(sentences), 130, break_on_hyphens=False)


def cuda_markdown(report):
    """The caption and the table."""
    rows = report["update"]["rows"]
    lines = [cuda_row(name, row, report) for name, row in rows.items()]
    return f"{caption(report)}\n\n{table(list(COLUMNS), lines)}"
