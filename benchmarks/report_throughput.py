"""The numbers of throughput.py as Markdown tables."""

from variants import BASELINE, GFLOP, PHASES


def table(header, rows):
    """A Markdown table; numbers with three digits, nothing as a dash."""

    def cell(value):
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
        return "-" if value is None else str(value)

    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def statistics_table(rows, unit, scale, ratio=None):
    """Median, min, max and runs of each row, and, as `ratio`, its speed-up over the first."""
    header = ["", f"{unit}, median", "min", "max", "runs"]
    if ratio:
        header.append(ratio)
    lines = []
    for name, row in rows.items():
        line = [name, *(row[key] * scale for key in ("median", "min", "max")), row["runs"]]
        if ratio:
            line.append(row.get("vs_baseline"))
        lines.append(line)
    return table(header, lines)


def about(report):
    """Machine, versions and how to read the tables."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        "# Throughput\n",
        f"{machine['gpu'] or 'CPU'}; {machine['cpu']}, {machine['cores']} cores,"
        f" {machine['threads']} threads, {machine['isa']}; {machine['free_gib']} GiB free, load"
        f" {machine['load']:.1f} at the start.\n"
        f"{versions}. {report['date']}{', --quick' * report['quick']}.\n\n"
        "Variants took turns; a ratio is the median of the ratios within a round.\n"
        '"tuned": the allocator keeps big blocks, and float32 matmuls take the fast path; ours'
        " always does unless it says untuned.\n",
    ]


def floor_section(rows):
    """Matmul rates."""
    header = ["matmul", "GFLOP/s", f"{GFLOP} GFLOP, s", "relative error", "runs"]
    keys = ("gflops", "floor", "error", "runs")
    lines = [[name, *(row[key] for key in keys)] for name, row in rows.items()]
    return [
        "## Floor\n",
        f"One update from 50 x 50 frames is {GFLOP} GFLOP.\n",
        table(header, lines),
    ]


def update_section(sizes):
    """Two tables for each size: whole updates, and their phases."""
    header = ["", "s, median", "min", "max", "runs"]
    header += [f"times faster than {BASELINE}", "than the library, same precision and switches"]
    header += ["peak GiB", "floor, s"]
    keys = ("median", "min", "max", "runs", "vs_baseline", "vs_peer", "gib", "floor")
    parts = []
    for title, measured in sizes.items():
        rows = measured["rows"]
        lines = [[name, *(row.get(key) for key in keys)] for name, row in rows.items()]
        phases = [
            [name, *(row["phases"][phase] for phase in PHASES)] for name, row in rows.items()
        ]
        lean = "Memory was short: every turn warmed up anew.\n\n" * measured["lean"]
        parts += [
            f"## One update, {title}\n",
            lean + table(header, lines),
            "Seconds by phase (medians).\n",
            table(["", *PHASES], phases),
        ]
    return parts


def ablation_section(measured):
    """Our update with one thing switched off."""
    return [
        f"## One update, {measured['size']}, with one thing switched off\n",
        statistics_table(measured["rows"], "s", 1, "times the time of everything on"),
    ]


def collection_section(rows):
    """One agent step."""
    return [
        "## One agent step: two physics steps and a 64 x 64 image of cheetah run\n",
        statistics_table(rows, "ms", 1e3, "times faster than bare"),
    ]


def replay_section(measured):
    """One batch."""
    stored = f"{measured['rows_stored']:,} rows, {measured['gib_stored'] or 0:.1f} GiB"
    return [
        f"## One batch of 50 x 50 frames from {stored} on disk\n",
        statistics_table(measured["rows"], "ms", 1e3, "times faster than the gather"),
    ]


def start_section(measured):
    """The stages of a fresh process."""
    return [
        "## From a fresh process to the first update\n",
        f"`python dreamer.py {' '.join(measured['overrides'])}`\n",
        statistics_table(measured["rows"], "s", 1),
    ]


def loop_section(measured):
    """What a run does besides updating and acting."""
    return [
        "## What a run does besides, without evaluation: per cent of the wall time\n",
        statistics_table(measured["rows"], "%", 100),
    ]


SECTIONS = {
    "floor": floor_section,
    "update": update_section,
    "ablation": ablation_section,
    "collection": collection_section,
    "replay": replay_section,
    "start": start_section,
    "loop": loop_section,
}


def markdown(report):
    """The whole report as Markdown."""
    parts = about(report)
    for name, section in SECTIONS.items():
        if name in report:
            parts += section(report[name])
    return "\n".join(parts)
