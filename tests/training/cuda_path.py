"""What a run does on a GPU, on one that computes nothing (fake_gpu.py); test_cuda_path.py runs it.

"Waits" are those of the CPU for the GPU: each costs a GPU the time until it is told what is next.
"""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import GPU, READ, fake_gpu, is_fake
from tensordict import TensorDict
from test_speed import filled_replay

import dreamer
import dreamer_utils as utils
from common.device import fork_rng, make_autocast, resolve_device, resolve_precision, tune_process
from common.errors import UserError
from common.finite import FiniteCheck
from measure_updates import build_update
from small_runs import SMALL, configure
from variants import CUDA_UPDATES, PHASES, Size

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"pixels": (64, 64, 3), "states": (5,)}
# The most of an eager update; fewer is better, and then these are lowered.
KERNELS = {"float32": 6_100, "bfloat16": 7_050}
FUSED_GRU = "aten._thnn_fused_gru_cell.default"


@pytest.fixture
def gpu(monkeypatch):
    """The GPU, which forgets what building took once it is asked for anything else."""
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


def make_agent(kind="states", *overrides, actions=2):
    """A small agent on the GPU, and its configuration."""
    cfg = configure(*SMALL, "optimization.horizon=3", *overrides)
    return dreamer.make_agent(cfg, SHAPES[kind], actions).to(GPU), cfg


def make_batch(kind, B=2, L=3):
    """A batch on the GPU."""
    observation = torch.rand(B, L, *SHAPES[kind])
    batch = {
        "observation": (observation * 255).byte() if kind == "pixels" else observation,
        "action": torch.rand(B, L, 2) * 2 - 1,
        "reward": torch.rand(B, L),
        "terminated": torch.zeros(B, L, dtype=torch.bool),
    }
    return TensorDict(batch, [B, L]).to(GPU)


# --- Updates -------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("discount", [False, True], ids=["", "discount"])
@pytest.mark.parametrize("kind", SHAPES)
def test_an_update_is_on_the_gpu_alone_and_never_waits(gpu, kind, discount, precision):
    """But in float16, once for each optimizer: did a gradient overflow?"""
    agent, cfg = make_agent(kind, f"optimization.predict_discount={discount}")
    hp, dtype = cfg.optimization, PRECISIONS[precision]
    optimizers, batch = utils.make_optimizers(hp, agent, dtype), make_batch(kind)
    noise = dreamer.draw_noise(*batch.shape, hp, agent.world_model)
    gpu.clear()
    metrics = dreamer.update(agent, optimizers, batch, noise, hp, make_autocast(GPU, dtype))
    assert gpu.waits == [str(READ)] * (3 if precision == "float16" else 0)
    assert gpu.copies == gpu.mixed == []
    assert gpu.operations.count(FUSED_GRU) == 3 + 3  # of a sequence, and of a dream
    assert any("_fused_adam" in name for name in gpu.operations)
    for name, value in metrics.items():
        assert (value.device, value.dtype) == (GPU, torch.float32), name
    for name, parameter in agent.named_parameters():
        got, wanted = (
            (x.device, x.dtype, x.stride()) for x in (parameter.grad, parameter.detach())
        )
        assert got == wanted and got[:2] == (GPU, torch.float32), name


@pytest.mark.parametrize("precision", KERNELS)
def test_an_update_of_the_papers_lengths_asks_for_no_more_kernels(gpu, precision):
    """Each costs a GPU that is not told ahead some microseconds; sizes change nothing."""
    agent, cfg = make_agent("pixels", "optimization.horizon=15")
    hp, dtype = cfg.optimization, PRECISIONS[precision]
    optimizers, batch = utils.make_optimizers(hp, agent, dtype), make_batch("pixels", L=50)
    noise = dreamer.draw_noise(*batch.shape, hp, agent.world_model)
    gpu.clear()
    dreamer.update(agent, optimizers, batch, noise, hp, make_autocast(GPU, dtype))
    assert gpu.kernels <= KERNELS[precision]


def test_networks_compute_in_the_precision_of_autocast(gpu):
    agent, _ = make_agent()
    model, seen = agent.world_model, []
    model.reward[0].register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    for dtype in PRECISIONS.values():
        with make_autocast(GPU, dtype):
            assert model.reward(*model.initial(2)).dtype == torch.float32
    assert seen == list(PRECISIONS.values())


def test_precision_and_device_are_found(gpu):
    assert resolve_device("auto") == GPU
    assert resolve_precision("auto", GPU) == torch.bfloat16
    assert resolve_precision("float16", GPU) == torch.float16
    assert resolve_precision("false", GPU) == torch.float32


def test_a_gpu_that_fails_in_bfloat16_computes_in_float16(gpu, monkeypatch, capsys):
    forward = torch.nn.GRUCell.forward

    def fail(self, *inputs):
        if torch.get_autocast_dtype("cuda") == torch.bfloat16:
            raise RuntimeError("CUBLAS_STATUS_INVALID_VALUE")
        return forward(self, *inputs)

    monkeypatch.setattr(torch.nn.GRUCell, "forward", fail)
    assert resolve_precision("auto", GPU) == torch.float16
    assert "fails on this cuda (CUBLAS_STATUS_INVALID_VALUE)" in capsys.readouterr().out


def test_the_process_is_tuned_for_the_gpu(gpu, monkeypatch):
    chosen, before = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        tune_process(GPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.backends.cudnn.benchmark and chosen == [GPU]


@pytest.mark.parametrize("compiling", [False, True])
def test_a_compiled_step_has_no_fused_gru_cell(gpu, monkeypatch, compiling):
    """A compiler cannot look into it; steps that are not compiled are faster with it."""
    agent, _ = make_agent()
    state, belief = agent.world_model.initial(2)
    action, noise = torch.rand(2, 2, device=GPU), torch.randn(2, 4, device=GPU)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    gpu.clear()
    _, _, _, belief = agent.world_model.prior(state, belief, action, noise)
    assert (FUSED_GRU in gpu.operations) == (not compiling)
    assert belief.shape == (2, 16) and belief.dtype == torch.float32


# --- What is beside updates ----------------------------------------------------------------------
def test_batches_come_from_pinned_memory(gpu, tmp_path):
    replay = filled_replay(tmp_path / "replay", GPU)
    gpu.clear()
    batches = list(replay.batches(3))
    replay.close()
    assert gpu.copies == [("up", "pinned")] * (4 * 3) and gpu.waits == []
    assert all(is_fake(value) for batch in batches for value in batch.values())


@pytest.mark.parametrize("lead", [(), (2,)], ids=["one environment", "two"])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("evaluates", [False, True], ids=["collects", "evaluates"])
def test_acting_moves_one_tensor_up_and_one_down(gpu, kind, lead, evaluates):
    agent, _ = make_agent(kind, actions=1)
    if evaluates:
        policy = utils.Policy(agent, dreamer.evaluation_policy, samples=(100,))
    else:
        policy = utils.Policy(agent, dreamer.collection_policy, scale=0.3)
    observation = torch.rand(*lead, *SHAPES[kind])
    sizes = {"previous_action": 1, "state": 4, "belief": 16}
    # As a collector gives them: one of 9 steps, so that a number of each environment lies apart.
    inputs = {name: torch.zeros(*lead, 9, size)[..., 0, :] for name, size in sizes.items()}
    inputs["observation"] = (observation * 255).byte() if kind == "pixels" else observation
    gpu.clear()
    after = policy(TensorDict(inputs, lead))
    assert gpu.copies == [("up", "pinned"), ("down", "pageable")]
    assert gpu.waits == ["copy"] and gpu.mixed == []
    for key in policy.out_keys:
        assert not is_fake(after[key]) and after[key].shape[: len(lead)] == lead, key
        assert (after[key] == 0.5).all(), f"{key} did not come from the GPU"


def test_the_finite_check_never_waits_for_the_last_update(gpu, tmp_path):
    """The answer of an update was asked for before the next one was launched."""
    check, launched = FiniteCheck(tmp_path), []
    for number in range(1, 4):
        loss = torch.ones((), device=GPU) * 2  # an update
        launched.append(len(gpu.operations))
        check.add_update(number, {}, {"loss": loss}, float16=False)
    assert gpu.waits == []
    assert len(gpu.events) == 2
    for number, (recorded, _) in enumerate(gpu.events):
        assert launched[number] < recorded < launched[number + 1]


@pytest.mark.parametrize("last", [False, True])
def test_the_finite_check_finds_every_update_before_anything_is_saved(gpu, tmp_path, last):
    agent, _ = make_agent()
    check = FiniteCheck(tmp_path)
    batch = make_batch("states")
    gpu.truth = False  # what isfinite() says
    check.add_update(7, batch, {"loss": torch.ones((), device=GPU)}, float16=False)
    gpu.truth = True
    with pytest.raises(UserError, match="loss is not finite in update 7: its batch is in"):
        if last:
            check.check_weights(agent, 7)
        else:
            check.add_update(8, batch, {"loss": torch.ones((), device=GPU)}, float16=False)
    kept = torch.load(tmp_path / "not_finite_7.pt")
    assert kept["batch"]["reward"].shape == (2, 3)


def test_the_check_of_the_weights_waits_once(gpu, tmp_path):
    agent, _ = make_agent()
    gpu.clear()
    FiniteCheck(tmp_path).check_weights(agent, 1)
    assert len(gpu.waits) == 1
    gpu.truth = False
    with pytest.raises(UserError, match="weight is not finite after update 1"):
        FiniteCheck(tmp_path).check_weights(agent, 1)


def test_random_numbers_of_one_gpu_are_put_back_without_a_warning(gpu, monkeypatch):
    """PyTorch warns where there are several and none is named."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or 5)
    put_back = []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *state: put_back.append(state))
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fork_rng(GPU):
            torch.rand(3)
    assert asked == [GPU] and put_back == [(5, GPU)]
    assert torch.equal(torch.get_rng_state(), before)


# --- The benchmark -------------------------------------------------------------------------------
@pytest.fixture
def as_before(monkeypatch):
    """Puts back what `tune_process` switches; and nobody asks for the memory of a GPU."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for name in ("reset_peak_memory_stats", "empty_cache", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: 2**30)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["ours, float32, eager", "ours, bfloat16, eager"])
def test_the_updates_of_the_benchmark_are_on_the_gpu_alone(gpu, as_before, name):
    """Not those of TorchRL's parts, which a fake GPU cannot build."""
    measure = build_update(CUDA_UPDATES[name], Size("pixels", 2, 3, quick=True), str(GPU), None)
    gpu.clear()
    row = measure(1)
    assert row["gib"] == 1 and set(row["phases"]) == set(PHASES)
    assert gpu.mixed == [] and len(gpu.operations) > 1000
    assert any("_fused_adam" in name for name in gpu.operations)


# --- Whole runs ----------------------------------------------------------------------------------
SHORT = """
device=auto optimization.compile=false
env.time_limit=20 collector.random_steps=40 collector.train_every=20 eval.every=40
replay_buffer.batch_size=8 replay_buffer.batch_length=4 optimization.horizon=3
""".split()
RUNS = {
    "pixels": ["logger.video=true", "env.from_pixels=true", "optimization.autocast=auto"],
    "states": ["optimization.predict_discount=true", "optimization.autocast=float16"],
}


@pytest.fixture
def phases(gpu, monkeypatch):
    """What the GPU saw in the updates, and in the evaluations."""
    phases = SimpleNamespace(updates=[], mixed=gpu.mixed)
    update = dreamer.update

    def spy(*args):
        before = len(gpu.waits)
        result = update(*args)
        phases.updates.append(gpu.waits[before:])
        return result

    monkeypatch.setattr(dreamer, "update", spy)
    return phases


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_evaluates_films_saves_and_goes_on(gpu, phases, tmp_path, name):
    run = tmp_path / "run"
    flags = [*SMALL, *SHORT, *RUNS[name], f"run_dir={run}"]
    dreamer.train(configure(*flags, "collector.total_steps=60"))
    agent = dreamer.train(configure(*flags, "collector.total_steps=80"))
    assert all(is_fake(value) for value in agent.state_dict().values())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["environment_steps"] == 80 and rows[-1]["updates"] == len(phases.updates) > 1
    assert rows[-1]["world_model/loss"] == 0.5
    reads = 3 if "optimization.autocast=float16" in RUNS[name] else 0
    assert phases.updates == [[str(READ)] * reads] * len(phases.updates)
    assert phases.mixed == [], "tensors of two devices met"
    assert ("up", "pinned") in gpu.copies
    films = {path.name for path in run.glob("videos/*.mp4")}
    assert len(films) == (9 if name == "pixels" else 0)
    card = json.loads((run / "run.json").read_text())
    assert card["device"].startswith("cuda: fake") and card["state"] == "finished"


def test_a_checkpoint_is_evaluated_filmed_and_dreamed_from(gpu, tmp_path, capsys):
    run = tmp_path / "run"
    flags = [*SMALL, *SHORT, "env.from_pixels=true", f"run_dir={run}"]
    dreamer.train(configure(*flags, "collector.total_steps=40", "eval.every=0"))
    gpu.clear()
    wanted = ["eval.episodes=2", "eval.video=true", "eval.dream_episode=2", "eval.dream_step=10"]
    cfg = configure("device=auto", f"eval.checkpoint={run}", *wanted)
    utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation)
    assert "episode 2: return" in capsys.readouterr().out
    assert gpu.mixed == []
    written = {path.name for path in (run / "evaluation_000000040").iterdir()}
    films = {"dream.mp4", "evaluation_1.mp4", "evaluation_2.mp4", "open_loop.mp4"}
    dream = {f"dream_from_2_10.{ending}" for ending in ("gif", "mp4", "png")}
    assert written == films | dream | {"2_episodes.json"}
