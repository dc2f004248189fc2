"""The numbers of `throughput.py --cuda` as one Markdown table with its caption."""

from report_throughput import table
from variants import CUDA_BASELINE, GFLOP

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
    """Of the paper's run: its updates and its environment steps, one after the other."""
    steps, paper = steps_per_second(report), report["paper"]
    if steps is None:
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
    rates = "; ".join(
        f"{name} {row['gflops'] / 1e3:.3g} TFLOP/s" for name, row in report["floor"].items()
    )
    sequences, length = report["update"]["size"].removeprefix("pixels, ").split(" x ")
    frames = int(sequences) * int(length)
    return (
        f"One update from {sequences} x {length} frames, {frames} dreams of 15 steps:"
        f" {GFLOP * frames / 2500:.0f} GFLOP. {machine['gpu'] or 'CPU'};"
        f" {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {versions};"
        f" {report['date']}. Variants took turns, each in a process of its own; a ratio is the"
        ' median of the ratios within a round. "Tuned" is as ours: TF32, and the fastest'
        " convolution for each shape. The peak rate is that of a large square product at the same"
        f" precision, measured in the same run ({rates}; for float32 the faster one). Peak GiB is"
        " what PyTorch reserved. Environment steps are those of cheetah run with policy, collector"
        f" and replay; images come from {report['renderer']}. The hours are those of"
        f" {paper['updates']:,} updates and {paper['environment_steps']:,} environment steps,"
        " evaluation included, one after the other.\n"
    )


def cuda_markdown(report):
    """The caption and the table."""
    rows = report["update"]["rows"]
    lines = [cuda_row(name, row, report) for name, row in rows.items()]
    return f"{caption(report)}\n{table(list(COLUMNS), lines)}"
