"""A GPU that computes nothing: what is on it has a shape, a type and strides, but no numbers.

PyTorch's fake tensors are on the device `cuda` of a machine without one. Tensors on the CPU stay
real, so environments, replay, films and checkpoints run as they are. What is read from the GPU is
0.5, or True. Every wait of the CPU for the GPU is noted.

Only in a process that on_fake_gpu.py started.
"""

import contextlib
import functools
from concurrent.futures import Future

import torch
from tensordict import MemoryMappedTensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from common import artist

GPU = torch.device("cuda:0")
aten = torch.ops.aten
READ = aten._local_scalar_dense.default  # item(), float(), bool(), if
# Besides, what must see numbers to know a shape.
WAITS = {READ, aten.equal.default, aten.nonzero.default, aten.masked_select.default}
# Views by another name, memory that nothing is written to yet, and a question.
WITHOUT_KERNEL = {
    torch.ops.prim.device.default,
    aten._unsafe_view.default,
    aten.unsafe_split.Tensor,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
}


# --- The fused GRU cell, of which PyTorch knows no shapes ----------------------------------------
def gru_cell(input_gates, hidden_gates, hx, input_bias=None, hidden_bias=None):
    """The next hidden state [n, D], and what backward needs [n, 5 D]."""
    n, D = hx.shape
    assert input_gates.shape == hidden_gates.shape == (n, 3 * D)
    assert input_gates.dtype == hidden_gates.dtype == hx.dtype
    return torch.empty_like(hx), hx.new_empty(n, 5 * D)


def gru_cell_backward(gradient, workspace, has_bias):
    """Gradients of all five inputs."""
    n, D = gradient.shape
    gates = [gradient.new_empty(n, 3 * D) for _ in range(2)]
    biases = [gradient.new_empty(3 * D) if has_bias else None for _ in range(2)]
    return *gates, torch.empty_like(gradient), *biases


@contextlib.contextmanager
def known_gru_cell():
    """Inside, fake tensors go through the fused GRU cell."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_thnn_fused_gru_cell", gru_cell, "Meta")
    library.impl("_thnn_fused_gru_cell_backward", gru_cell_backward, "Meta")
    yield
    library._destroy()


# --- The GPU -------------------------------------------------------------------------------------
def is_fake(x):
    """Whether x is a tensor on the GPU."""
    return isinstance(x, FakeTensor)


def names_gpu(x):
    """Whether x is a device of the type `cuda`."""
    return isinstance(x, torch.device) and x.type == "cuda"


class FakeGPU(TorchDispatchMode):
    """Inside, `cuda` is a device.

    Attributes:
        truth: what a bool is that comes from the GPU.
        operations: names of all operations.
        kernels: how many of them a GPU would be asked to compute; views need nothing of it.
        waits: a word for each time that the CPU waited for the GPU.
        copies: (up or down, pinned or pageable) of each copy between the two.
        mixed: names of operations, other than copies, that had tensors of both, numbers aside.
        events: for each event that was waited for, how many operations had been launched when it
            was recorded, and when it was waited for.
    """

    def __init__(self):
        super().__init__()
        self.fake, self.truth = FakeTensorMode(), True
        self.clear()

    def clear(self):
        """Forgets what was noted."""
        self.operations, self.waits, self.copies, self.mixed, self.events = [], [], [], [], []
        self.kernels = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(is_fake(x) or names_gpu(x) for x in leaves):
            return operation(*args, **kwargs)
        self.operations.append(str(operation))
        self.kernels += not (operation.is_view or operation in WITHOUT_KERNEL)
        self.note(operation, args, kwargs)
        if operation is READ:
            return self.real(args[0]).item()
        if operation is aten.equal.default:
            return self.truth
        if operation is aten.copy_.default and not is_fake(args[0]):
            return args[0].copy_(self.real(args[1]))
        with self.fake:
            result = operation(*tree_map(self.up, args), **tree_map(self.up, kwargs))
        return tree_map(self.down, result)

    def note(self, operation, args, kwargs):
        """Notes a wait, a copy or a mixture."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if not is_fake(x)]
        device = kwargs.get("device")
        if operation in WAITS:
            self.waits.append(str(operation))
        elif operation is aten.copy_.default and on_cpu:
            self.note_copy(on_cpu[0] is args[0], on_cpu[0], len(args) > 2 and args[2])
        elif operation is aten._to_copy.default and on_cpu:
            self.note_copy(False, on_cpu[0], kwargs.get("non_blocking"))
        elif operation is aten._to_copy.default and device == torch.device("cpu"):
            self.note_copy(True, None, False)
        elif any(x.dim() for x in on_cpu):  # a number is launched with the operation
            self.mixed.append(str(operation))

    def note_copy(self, down, memory, non_blocking):
        """Notes a copy: the CPU goes on at once only if it may, and its memory is pinned."""
        pinned = memory is not None and memory.is_pinned()
        self.copies.append(("down" if down else "up", "pinned" if pinned else "pageable"))
        if not (pinned and non_blocking):
            self.waits.append("copy")

    def real(self, x):
        """A tensor on the CPU with the shape of one on the GPU."""
        return torch.full(x.shape, self.truth if x.dtype == torch.bool else 0.5).to(x.dtype)

    def up(self, x):
        """A tensor on the CPU, as fake ones know it."""
        if not isinstance(x, torch.Tensor) or is_fake(x):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    def down(self, x):
        """A result; on the CPU it is real."""
        return self.real(x) if is_fake(x) and x.device.type == "cpu" else x


# --- torch.cuda, and what cannot be done in a dispatch mode --------------------------------------
class Event:
    """An event of a `FakeGPU`, which notes how far it was."""

    def __init__(self, gpu):
        self.gpu, self.recorded = gpu, None

    def record(self, stream=None):
        self.recorded = len(self.gpu.operations)

    def synchronize(self):
        self.gpu.events.append((self.recorded, len(self.gpu.operations)))


class Stream:
    """The one stream of a `FakeGPU`."""

    def __init__(self, gpu):
        self.gpu = gpu

    def record_event(self):
        event = Event(self.gpu)
        event.record()
        return event


def answers(gpu):
    """What `torch.cuda` says and does with one GPU."""
    state = torch.zeros(16, dtype=torch.uint8)
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "Event": lambda: Event(gpu),
        "current_stream": lambda device=None: Stream(gpu),
        "get_device_name": lambda device=None: "fake",
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda state, device="cuda": None,
        "get_rng_state_all": lambda: [state],
        "set_rng_state_all": lambda states: None,
        "manual_seed_all": lambda seed: None,
    }


class AtOnce:
    """An executor that does at once what it is asked for: dispatch modes are for one thread."""

    def __init__(self, workers):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait=True, cancel_futures=False):
        pass


def without_modes(function):
    """The same function, on the CPU alone."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def fake_gpu(patch):
    """A `FakeGPU` that `torch.cuda` knows.

    Args:
        patch: pytest's `monkeypatch`.
    """
    gpu, save = FakeGPU(), torch.save

    def save_real(state, *args, **kwargs):
        return save(tree_map(lambda x: gpu.real(x) if is_fake(x) else x, state), *args, **kwargs)

    for name, answer in answers(gpu).items():
        patch.setattr(torch.cuda, name, answer)
    patch.setattr(torch, "save", save_real)
    patch.setattr(artist, "ThreadPoolExecutor", AtOnce)
    patch.setattr(MemoryMappedTensor, "__new__", without_modes(MemoryMappedTensor.__new__))
    with known_gru_cell(), gpu:
        yield gpu
