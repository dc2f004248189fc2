"""How many operations an update of the paper's lengths takes, eager and with compiled steps.

`python benchmarks/count_operations.py` lets PyTorch's profiler look at one update on the CPU, from
two sequences of 50 frames (the number does not depend on how many). It counts operations that call
no other, each fused kernel once, and leaves out views and empty memory. Compiling takes a minute.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

# A script finds modules in its own directory only; dreamer.py is one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare_commits import build_new  # noqa: E402
from measuring import AUTOCAST, configuration, make_rows  # noqa: E402
from report_throughput import table  # noqa: E402

LENGTHS = ("replay_buffer.batch_size=100", "replay_buffer.batch_length=50", "device=cpu")
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
FUSED = "cpp_fused"  # in the name of every kernel that the compiler wrote


def computes(name):
    """Whether an event of the profiler is an operation, and neither a view nor empty memory."""
    if not name.startswith("aten::"):
        return FUSED in name
    name = name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or name in EMPTY:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    overloads = [x for x in overloads if torch._C._dispatch_has_kernel(x.name())]
    if any(overload.is_view for overload in overloads):
        return False
    # What is written in terms of other operations, and called none, found nothing to do.
    return not all(overload.has_kernel_for_dispatch_key(COMPOSITE) for overload in overloads)


def calls_what_computes(event):
    """Whether an event leaves the work to others, at whatever depth."""
    return any(computes(child.name) or calls_what_computes(child) for child in event.cpu_children)


def count(events):
    """How many of the events compute something, and call nothing that does."""
    return sum(computes(event.name) and not calls_what_computes(event) for event in events)


def count_update(precision, compiled):
    """The operations of the third update of an agent; the first two compile."""
    cfg = configuration(
        *LENGTHS,
        f"optimization.autocast={AUTOCAST[precision]}",
        f"optimization.compile={str(compiled).lower()}",
    )
    device = torch.device("cpu")
    length = cfg.replay_buffer.batch_length
    rows = make_rows("pixels", cfg.replay_buffer.batch_size // length, length, device)
    update = build_new(cfg, rows, device)
    update()
    update()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        update()
    events = profiler.events()
    if compiled and not any(FUSED in event.name for event in events):
        raise SystemExit("nothing was compiled: install a C++ compiler (g++)")
    return count(events)


def main():
    """Counts in both precisions, and prints the table."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch._inductor.config.cpp.enable_kernel_profile = True  # else fused kernels are invisible
    lines = [
        [precision, *(f"{count_update(precision, compiled):,}" for compiled in (False, True))]
        for precision in AUTOCAST
    ]
    print(table(["one update", "eager", "compiled steps"], lines), end="")


if __name__ == "__main__":
    main()
