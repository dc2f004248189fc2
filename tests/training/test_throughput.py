"""`throughput.py --cuda`: its table from made-up numbers, and what it says without a GPU.

And what count_operations.py counts.
"""

import os
import signal
import sys
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from count_operations import computes, count
from measure_runs import count_paper_run
from measure_updates import named
from report_cuda import COLUMNS, OURS, cuda_markdown
from small_runs import start
from throughput import parse_arguments
from variants import CUDA_BASELINE, CUDA_UPDATES, PAPER_SIZE, SIZES, UPDATES


def update_row(median, **more):
    """Of an update that takes 0.1 s at the peak rate."""
    spread = {"median": median, "min": median / 2, "max": 2 * median, "runs": 7}
    return spread | {"gib": 3.25, "floor": 0.1} | more


@pytest.fixture
def report():
    """An update of ours takes 0.25 s, an agent step of two environment steps 5 ms."""
    rows = {
        CUDA_BASELINE: update_row(1.0, vs_baseline=1.0),
        "ours, bfloat16, compiled": update_row(0.25, vs_baseline=4.0, vs_peer=1.5),
    }
    return {
        "date": "2030-01-01",
        "machine": {
            "device": "cuda",
            "gpu": "GPU 1000",
            "cpu": "CPU 1",
            "cores": 16,
            "threads": 8,
            "versions": {"torch": "9.9"},
        },
        "renderer": "NVIDIA, GPU 1000",
        "floor": {"bfloat16": {"gflops": 8800.0}},
        "paper": count_paper_run(None, None),
        "collection": {OURS: {"median": 0.005}},
        "update": {"size": PAPER_SIZE, "rows": rows},
    }


def cells(report):
    """{name of a row: {column: cell}} of the one table, whose caption stands above it."""
    caption, text = cuda_markdown(report).split("\n\n")
    assert "|" not in caption
    header, _, *rows = (
        [c.strip() for c in row.strip("|").split("|")] for row in text.splitlines()
    )
    assert header == [name.strip() for name in COLUMNS]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_the_table_of_a_gpu_says_what_was_measured(report):
    rows = cells(report)
    assert list(rows) == list(report["update"]["rows"])
    ours, baseline = rows["ours, bfloat16, compiled"], rows[CUDA_BASELINE]
    assert (ours["updates/s"], ours["ms, median"], ours["runs"]) == ("4", "250", "7")
    assert (ours["% of the peak rate"], baseline["% of the peak rate"]) == ("40", "10")
    assert ours[f"times faster than {CUDA_BASELINE}"] == "4" and ours["peak GiB"] == "3.25"
    assert ours["environment steps/s"] == "400"
    # (499,600 x 0.25 s + 5,500,000 / 400 s) / 3600
    assert ours["hours for the paper's run"] == "38.5"
    assert baseline["environment steps/s"] == baseline["hours for the paper's run"] == "-"
    caption = " ".join(cuda_markdown(report).split("\n\n")[0].split())
    for said in ("GPU 1000 (CPU 1, 16 cores", "bfloat16 8.8 TFLOP/s", "880 GFLOP", "499,600"):
        assert said in caption
    assert "tried" not in caption


def test_what_was_not_measured_is_a_dash(report):
    small = report | {"update": report["update"] | {"size": "pixels, 8 x 16"}}
    for part in (small, report | {"collection": {}}):
        assert cells(part)["ours, bfloat16, compiled"]["hours for the paper's run"] == "-"


def test_the_paper_run_is_that_of_the_configuration():
    paper = count_paper_run(None, None)
    assert paper == {"updates": 499_600, "environment_steps": 5_500_000, "action_repeat": 2}


def test_every_update_of_ours_has_a_peer_of_torchrl():
    for name, variant in CUDA_UPDATES.items():
        if variant.way == "ours":
            peer = CUDA_UPDATES[variant.peer]
            assert (peer.way, peer.precision) == ("torchrl", variant.precision), name


def test_without_a_gpu_one_sentence_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        parse_arguments()
    assert ended.value.code == "this machine has no GPU that PyTorch can use: nothing is measured"


def test_operations_are_counted_once_and_views_not_at_all():
    x = torch.ones(4, 4)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y = torch.nn.functional.linear(x, x.t()[:4].view(4, 4).to(torch.float32))  # 1: a product
        y = y.reshape(2, 8).unsqueeze(0)
        y = (y + y).tanh_()  # 2 and 3
        torch.empty_like(y).copy_(y.sum())  # 4 and 5
    assert count(profiler.events()) == 5
    assert computes("graph_3_cpp_fused_elu_1") and not computes("ProfilerStep#1")


def test_a_whole_name_chooses_one_and_a_part_all_that_have_it(monkeypatch):
    words = ["--sizes", "pixels, 50 x 50", "--variants", "library, float32; ours, bfloat"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *words])
    options = parse_arguments()
    assert list(named(SIZES, options.sizes)) == ["pixels, 50 x 50"]
    chosen = ["library, float32", "ours, bfloat16", "ours, bfloat16, compiled"]
    assert list(named(UPDATES, options.variants)) == [name for name in UPDATES if name in chosen]
    assert named(SIZES, None) == SIZES


@pytest.mark.parametrize("seconds", [1, 8])  # importing, measuring
def test_ctrl_c_ends_a_measurement_with_one_sentence(seconds):
    """A terminal sends it to the whole group: to the script and to the processes that measure."""
    script = start("-u", "benchmarks/throughput.py", "--quick", start_new_session=True)
    script.stdout.readline()  # the machine; then the processes are started
    time.sleep(seconds)
    os.killpg(script.pid, signal.SIGINT)
    _, errors = script.communicate(timeout=60)
    assert script.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "stopped: nothing was written"
