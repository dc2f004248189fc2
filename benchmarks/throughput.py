"""How long everything takes, side by side: `python benchmarks/throughput.py [--quick | --cuda]`.

Sections (`--only floor,update`): what the arithmetic alone costs (`floor`), one update of ours and
of TorchRL's parts (`update`), ours with one thing switched off (`ablation`), one step of
experience (`collection`), one batch from disk (`replay`), from a fresh process to the first update
(`start`), and what a whole run does besides (`loop`), on the CPU or on CUDA. The numbers go to
`benchmarks/results/throughput.json`, and as tables to the `.md` beside it. How the variants take
turns is said in workers.py.

`--cuda` asks a GPU what there is to know about the paper's run, in less than ten minutes: the one
table goes to `benchmarks/results/throughput_cuda.md`.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

# A script finds modules in its own directory only; dreamer.py is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure_experience import measure_collection, measure_replay  # noqa: E402
from measure_runs import count_paper_run, measure_loop, measure_start  # noqa: E402
from measure_updates import (  # noqa: E402
    measure_ablation,
    measure_cuda_updates,
    measure_floor,
    measure_updates,
)
from measuring import ROOT, find_renderer, set_threads  # noqa: E402
from report_cuda import cuda_markdown  # noqa: E402
from report_throughput import markdown  # noqa: E402
from workers import available_gib, run_until_stopped  # noqa: E402

SECTIONS = {
    "floor": measure_floor,
    "update": measure_updates,
    "ablation": measure_ablation,
    "collection": measure_collection,
    "replay": measure_replay,
    "start": measure_start,
    "loop": measure_loop,
}
CUDA_SECTIONS = {  # the longest last: what is left of the time is its
    "floor": measure_floor,
    "paper": count_paper_run,
    "collection": measure_collection,
    "update": measure_cuda_updates,
}
CUDA_SECONDS = 400  # no round of measurements begins later


def machine(args):
    """What the numbers depend on: processor, GPU, memory, threads, versions."""
    device = torch.device(args.device)
    set_threads(args.threads)
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).split(":")[1].strip()
    versions = {name: metadata.version(name) for name in ("torch", "torchrl", "tensordict")}
    if device.type == "cuda":
        versions["CUDA"] = torch.version.cuda
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "free_gib": round(available_gib(), 1),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **versions},
    }


def listed(text, separator=","):
    """A comma-separated list."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def listed_names(text):
    """A list separated by semicolons, because names of sizes and variants have commas."""
    return listed(text, ";")


def parse_arguments():
    """The command line, with its defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--cuda", action="store_true", help="one table about a GPU, ten minutes")
    parser.add_argument("--only", type=listed, help=", ".join(SECTIONS))
    parser.add_argument(
        "--sizes", type=listed_names, help="updates whose size has, or is: pixels, 50 x 50; 8 x 16"
    )
    parser.add_argument(
        "--variants",
        type=listed_names,
        help="updates whose name has, or is: ours, bfloat16; library",
    )
    parser.add_argument("--rounds", type=int, help="turns of each variant; default 7, quick 3")
    # With --cuda, `--device cpu` tries its code where there is no GPU.
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/throughput.json")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() or args.cuda else "cpu"
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that PyTorch can use: nothing is measured")
    if args.device == "cuda":
        args.device = "cuda:0"  # a process is tuned for one GPU, see common.device.tune_process
    args.rounds = args.rounds or (3 if args.quick else 7)
    if wrong := set(args.only or ()) - set(SECTIONS):
        parser.error(f"--only {','.join(wrong)}: choose from {', '.join(SECTIONS)}")
    if args.only and args.cuda:
        parser.error("--cuda is one table: it takes no --only")
    args.sections = CUDA_SECTIONS if args.cuda else SECTIONS
    args.only = args.only or list(args.sections)
    name = "throughput_cuda.json" if args.cuda else "throughput.json"
    args.out = args.out or ROOT / "benchmarks" / "results" / name
    args.until = time.monotonic() + CUDA_SECONDS if args.cuda else math.inf
    return args


def main():
    """Measures the chosen sections, prints the tables and writes both files."""
    args = parse_arguments()
    report = {
        "date": datetime.date.today().isoformat(),
        "quick": args.quick,
        "machine": machine(args),
    }
    if args.cuda:
        os.environ["MUJOCO_GL"] = "egl"  # osmesa never renders on a GPU
        report["renderer"] = find_renderer("egl")
    print(json.dumps(report["machine"]), flush=True)
    for section, measure in args.sections.items():
        if section in args.only:
            start = time.perf_counter()
            report[section] = measure(args, report)
            print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    text = cuda_markdown(report) if args.cuda else markdown(report)
    args.out.with_suffix(".md").write_text(text)
    print(f"\n{text}\nwritten: {args.out} and {args.out.with_suffix('.md').name}")


if __name__ == "__main__":
    run_until_stopped(main)
