"""Device, precision, compilation, and the switches of a process that make it fast."""

import contextlib
import ctypes
import os
import sys

import torch
from torch import nn

from common.errors import UserError


def resolve_device(name):
    """`auto` is CUDA if it is there, else the CPU; `UserError` if the named device is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}; use device=auto") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: choose auto, cpu, cuda or cuda:N")
    return device


def gains_from_bfloat16(device):
    """Whether the device computes faster in bfloat16 than in float32; emulated, it does not.

    AMD's AVX-512 multiplies twice as many numbers of bfloat16 as of float32 in the same time.
    Intel's does not (an update takes 1.2 to 1.3 times as long); its matrix tiles (AMX) do.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities()
    if cpu.get("amx_bf16"):
        return True
    return cpu.get("avx512_bf16", False) and "Intel" not in cpu.get("cpu_name", "")


def resolve_precision(name, device):
    """`optimization.autocast` as a dtype; `auto` is bfloat16 if it is faster, else float32.

    Some GPU and driver pairs fail in bfloat16 (`CUBLAS_STATUS_INVALID_VALUE`): a small layer and a
    GRU run first, and if they fail, float16 is next, then float32, with one line that says so.
    """
    if name == "false" or (name == "auto" and not gains_from_bfloat16(device)):
        return torch.float32
    wanted = torch.float16 if name == "float16" else torch.bfloat16
    for dtype in dict.fromkeys((wanted, torch.float16)):
        reason = why_precision_fails(dtype, device)
        if reason is None:
            return dtype
        print(f"autocast: {dtype} fails on this {device.type} ({reason}); trying the next one")
    return torch.float32


def why_precision_fails(dtype, device):
    """None if a layer and a GRU cell give finite gradients under autocast, else the reason."""
    x = torch.ones(4, 16, device=device)
    layer = nn.Linear(16, 16).to(device)
    cell = nn.GRUCell(16, 16).to(device)
    try:
        with torch.autocast(device.type, dtype):
            cell(layer(x), x).float().sum().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None if torch.isfinite(layer.weight.grad).all() else "gradients are not finite"


def make_autocast(device, dtype):
    """A context that can be entered again and again: networks compute in `dtype` inside."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def route_float32_products():
    """Sends float32 products on a CPU through its fastest library that keeps them float32.

    "medium" is oneDNN, faster on some processors; on those with matrix tiles (AMX) it computes in
    bfloat16, off by one part in 400.
    """
    x = torch.linspace(-1, 1, 128 * 128).view(128, 128).sin()  # without a random number
    exact = x.double() @ x.double()
    for precision in ("medium", "high", "highest"):
        torch.set_float32_matmul_precision(precision)
        if (x @ x - exact).norm() < 1e-5 * exact.norm():
            return


def tune_process(device):
    """Process-wide switches for speed, and the GPU that PyTorch takes where none is named.

    On a CPU freed memory is kept (a fresh page costs more than the arithmetic on it; 2 to 4 GB
    stay resident), and float32 products go through oneDNN. On CUDA they are in TF32, and the
    fastest convolution is looked for once for each shape.
    """
    if device.type == "cpu":
        route_float32_products()
    else:
        torch.cuda.set_device(device)  # else pinned memory would open the first GPU as well
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if device.type == "cpu" and hasattr(libc, "mallopt"):  # glibc only
        trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def compile_steps(agent, mode, device):
    """Compiles what `observe` and `imagine` repeat: transition, representation and action model.

    `auto` is on CUDA only: on a CPU the gain is within the noise, and 2000 updates would not win
    back the 40 s that it takes. Compiling the loops as a whole takes three times as long. Without
    a working compiler one line says so, and everything runs as it is.
    """
    if mode == "false" or (mode == "auto" and device.type == "cpu"):
        return
    torch.compiler.reset()  # what an earlier run in this process compiled counts against a limit
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except RuntimeError as error:
        print(f"compile: no working compiler ({str(error).splitlines()[0]}); going on without")
        return
    graphs = mode == "reduce-overhead"
    for model in (agent.world_model.prior, agent.world_model.posterior, agent.actor):
        model.compile(dynamic=False, mode=mode if graphs else None)
    agent.compiled = True
    if graphs:
        # The memory of CUDA graphs may be used again once the next update begins, which it does
        # with its first network.
        agent.world_model.encoder.register_forward_pre_hook(
            lambda module, inputs: torch.compiler.cudagraph_mark_step_begin()
        )


def say_if_crowded():
    """A sentence if others keep cores busy that PyTorch's threads want, else an empty string.

    Threads that wait for each other spin: two runs with more threads than there are cores slow
    each other five times and more. Nothing is changed here, for the number of threads decides
    the last bits of a run.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads == 1 or not hasattr(os, "getloadavg"):  # Windows has none
        return ""
    busy = round(os.getloadavg()[0])  # on average over the last minute
    if busy + threads <= cores:
        return ""
    free = max(cores - busy, 1)
    return (
        f"other work wants {busy} of the {cores} cores, and this run takes {threads} threads: put"
        f" OMP_NUM_THREADS={free} before the command, or both may become many times slower"
    )


@contextlib.contextmanager
def one_thread():
    """One PyTorch thread while acting: idle ones spin, which slows a software renderer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def fork_rng(device):
    """Random numbers drawn inside leave the generators of the CPU and of `device` as they are."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


# --- Copies between the CPU and a GPU ------------------------------------------------------------
def move_together(tensors, device):
    """{name: tensor on the CPU} -> the same on `device`, in one copy to a GPU."""
    if device.type == "cpu":
        return tensors
    # The widest numbers first: each then begins at a multiple of its width.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    flat = [tensors[name].reshape(-1).contiguous() for name in names]  # bytes lie side by side
    packed = torch.cat([values.view(torch.uint8) for values in flat])
    packed = packed.pin_memory().to(device, non_blocking=True)
    pieces = packed.split([tensors[name].nbytes for name in names])
    moved = {}
    for name, piece in zip(names, pieces, strict=True):
        moved[name] = piece.view(tensors[name].dtype).view(tensors[name].shape)
    return {name: moved[name] for name in tensors}


def bring_together(tensors):
    """Tensors [n, ...] of one dtype -> the same on the CPU, in one copy from a GPU."""
    if tensors[0].device.type == "cpu":
        return tensors
    sizes = [tensor.shape[-1] for tensor in tensors]
    return torch.cat(tensors, -1).cpu().split(sizes, -1)


class ComingTensor:
    """A tensor on its way from a GPU; waits only for what was launched before it was asked for."""

    def __init__(self, tensor):
        self.tensor, self.arrived = tensor, None
        if tensor.device.type == "cuda":
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.arrived = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self):
        """The tensor on the CPU."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor
