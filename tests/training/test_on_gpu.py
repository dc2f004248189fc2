"""On a GPU: the official update, precisions, CUDA graphs, resume, rendering.

`python -m pytest -m cuda` runs them, and skips them where there is no GPU. So that they can be
tried there as well, `DREAMER_TEST_DEVICE=cpu` before the command takes the CPU in its place.
"""

import contextlib
import math
import os

import pytest
import test_speed
import torch
from test_resume import CUT, stopped_after
from test_speed import distance

import dreamer
import dreamer_utils as utils
import test_update
from common.device import compile_steps, make_autocast, tune_process
from common.opengl import check_picture
from fingerprint import fingerprint
from measuring import find_renderer
from small_runs import SMALL, configure, small

DEVICE = torch.device(os.environ.get("DREAMER_TEST_DEVICE", "cuda:0"))
ON_GPU = DEVICE.type == "cuda"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest relative distance of a gradient from that of float32; TF32 has float16's digits.
BOUNDS = {"float32": 0.01, "bfloat16": 0.05, "float16": 0.01}

pytestmark = [pytest.mark.cuda]
if ON_GPU and not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="this machine has no GPU that PyTorch can use"))


@pytest.fixture(autouse=True)
def full_precision():
    """float32 that is float32, and the same bits each time; a run of its own switches to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact = {"benchmark": False, "deterministic": True, "allow_tf32": False}
    with torch.backends.cudnn.flags(enabled=True, **exact):
        yield
    torch.set_float32_matmul_precision(before)


# --- One update ----------------------------------------------------------------------------------
@pytest.fixture(params=["train_step", "train_step_pcont"])
def step(request, golden):
    """An official training step on the GPU, in float32."""
    return test_update.official_update(golden(request.param, torch.float32), torch.float32, DEVICE)


def test_every_number_of_an_update_is_the_official_one(step):
    assert {parameter.device.type for parameter in step.agent.parameters()} == {DEVICE.type}
    test_update.test_eq01_latent_states_equal_the_official_ones(step)
    test_update.test_eq02_dreams_equal_the_official_ones(step)
    test_update.test_eq06_returns_of_dreams_equal_the_official_ones(step)
    test_update.test_eq07_eq08_eq10_losses_equal_the_official_ones(step)
    test_update.test_alg1_every_gradient_equals_the_official_code(step)
    test_update.test_alg1_every_gradient_norm_equals_the_official_code(step)
    test_update.test_alg1_every_updated_weight_equals_the_official_code(step)
    test_update.test_alg1_noise_is_standard_normal_in_the_official_shapes(step)


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """A precision by its name."""
    return request.param


@pytest.fixture(params=["fast", "compiled"])
def kind(request):
    """How an update is computed: as it is written, or in compiled steps."""
    return request.param


def test_gradients_in_every_precision_are_within_their_bound(precision, kind):
    """float32 as a run computes it, which is TF32 on a GPU."""
    _, exact = test_speed.one_update("plain", device=DEVICE)
    tune_process(DEVICE)
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    _, gradient = test_speed.one_update(kind, PRECISIONS[precision], DEVICE)
    assert gradient.isfinite().all()
    assert 0 < distance(gradient, exact) < BOUNDS[precision]


@contextlib.contextmanager
def waits_are_errors():
    """Inside, PyTorch raises an error where the CPU waits for the GPU."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


def make_update(compiled="false", dtype=torch.float32):
    """A small agent from pixels, and a function of batch and noise that makes one update of it."""
    torch.manual_seed(0)
    cfg = configure(*SMALL, f"optimization.compile={compiled}")
    hp = cfg.optimization
    agent = dreamer.make_agent(cfg, (64, 64, 3), 2).to(DEVICE)
    compile_steps(agent, hp.compile, DEVICE)
    optimizers = utils.make_optimizers(hp, agent, dtype)
    autocast = make_autocast(DEVICE, dtype)
    return agent, lambda *inputs: dreamer.update(agent, optimizers, *inputs, hp, autocast)


def draw_inputs(agent, sizes=(3, 6)):
    """A made-up batch and the noise of an update."""
    batch = {
        "observation": torch.randint(0, 256, (*sizes, 64, 64, 3), dtype=torch.uint8),
        "action": torch.rand(*sizes, 2) * 2 - 1,
        "reward": torch.rand(sizes),
        "terminated": torch.zeros(sizes, dtype=torch.bool),
    }
    batch = {name: value.to(DEVICE) for name, value in batch.items()}
    return batch, dreamer.draw_noise(*sizes, configure(*SMALL).optimization, agent.world_model)


def test_an_update_never_waits_for_the_gpu():
    """But for the first; PyTorch raises an error at the place where the CPU would wait."""
    for dtype in (torch.float32, torch.bfloat16):
        agent, update = make_update(dtype=dtype)
        inputs = draw_inputs(agent)
        update(*inputs)
        with waits_are_errors():
            update(*inputs)


# --- CUDA graphs ---------------------------------------------------------------------------------
def check_graphs():
    """Asserts that steps were recorded as CUDA graphs, and that none was left out."""
    from torch._dynamo.utils import counters
    from torch._inductor.cudagraph_trees import get_manager

    assert counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager is not None, "no CUDA graph was recorded"


def test_200_updates_with_cuda_graphs_equal_those_without():
    """Each from the same weights: in a row, 200 updates make a last bit grow to a fifth."""
    from torch._dynamo.utils import counters

    counters.clear()
    plain, update_plain = make_update()
    agent, update = make_update("reduce-overhead")
    largest = 0.0
    for _ in range(200):
        inputs = draw_inputs(agent)
        plain.load_state_dict(agent.state_dict())
        wanted, metrics = update_plain(*inputs), update(*inputs)
        for name, value in wanted.items():
            assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name
        gradient, exact = (
            torch.cat([parameter.grad.flatten() for parameter in one.parameters()])
            for one in (agent, plain)
        )
        largest = max(largest, distance(gradient, exact))
    print(f"largest distance of a gradient: {largest:.1e}")
    assert largest < 1e-5
    if ON_GPU:
        check_graphs()


def test_a_run_with_cuda_graphs_acts_evaluates_and_goes_on(tmp_path):
    flags = [f"device={DEVICE}", "env.from_pixels=true", "optimization.autocast=auto"]
    flags += ["optimization.compile=reduce-overhead", "name=graphs"]
    small(tmp_path / "run", *flags, "collector.total_steps=160")
    _, rows = small(tmp_path / "run", *flags)
    assert rows[-1]["environment_steps"] == 240
    assert all(math.isfinite(value) for row in rows for value in row.values())


# --- Resume --------------------------------------------------------------------------------------
def test_stopped_at_every_checkpoint_it_ends_with_the_same_bits_on_the_gpu(tmp_path):
    """From states and not compiled: convolutions may take another algorithm each time."""
    flags = [*CUT, f"device={DEVICE}", "optimization.compile=false", "name=one"]
    small(tmp_path / "whole", *flags)
    starts = 1
    while not stopped_after(1, tmp_path / "stopped", *flags):
        starts += 1
    assert starts >= 4
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


def test_a_run_moves_to_the_cpu_and_back(tmp_path):
    """Weights arrive with the same bits, and the run goes on."""

    def weights(device, steps):
        flags = [f"device={device}", f"collector.total_steps={steps}", "name=moves"]
        digest, rows = small(tmp_path / "run", *flags)
        assert rows[-1]["environment_steps"] == steps
        assert math.isfinite(rows[-1]["world_model/loss"])
        return digest

    on_gpu = weights(DEVICE, 160)
    assert weights("cpu", 160) == on_gpu
    on_cpu = weights("cpu", 200)
    assert on_cpu != on_gpu
    assert weights(DEVICE, 200) == on_cpu
    assert weights(DEVICE, 240) != on_cpu


# --- Rendering -----------------------------------------------------------------------------------
def test_images_are_rendered_on_the_gpu():
    """In an NVIDIA container, this needs NVIDIA_DRIVER_CAPABILITIES=all."""
    renderer = find_renderer("egl")
    assert "NVIDIA" in renderer or not ON_GPU, f"EGL renders with {renderer}, not on the GPU"
    env = utils.make_env(configure(*SMALL, "env.from_pixels=true"))
    try:
        observation = env.reset()["observation"]
        assert os.environ["MUJOCO_GL"] == "egl"
        assert "levels of gray" in check_picture(observation)
    finally:
        utils.close_env(env)
